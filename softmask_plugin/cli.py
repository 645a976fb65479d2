"""The ``softmask`` command."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import softmask_plugin
from softmask_plugin.config.paths import find_file, shipped_configs, shipped_plans
from softmask_plugin.errors import StartAgain, UserError, advice_on, one_line, reason_of, suggest
from softmask_plugin.host import stack

Command = Callable[..., int | None]
Argument = tuple[Sequence[str], dict[str, Any]]

PARSER = argparse.ArgumentParser(
    prog="softmask",
    description="SoftMask++ pretraining for Salesforce LAVIS.",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="""\
examples:
  softmask demo
  softmask explain --image dog.jpg --caption "a dog on a sofa" --checkpoint checkpoint_best.pth
  softmask train --cfg-path my.yaml --options run.max_epoch=5 model.model_type=tiny
  softmask evaluate --cfg-path my.yaml --options model.pretrained=outputs/.../checkpoint_best.pth
  softmask ablate --plan lavis_configs/ablation/small.yaml
  softmask shards --captions train.json --images photos --out shards
  torchrun --nproc_per_node=8 -m softmask_plugin.train --cfg-path my.yaml
""",
)
PARSER.add_argument("--version", action="version", version=version("softmask-plugin"))
COMMANDS = PARSER.add_subparsers(title="commands", metavar="COMMAND", required=True)
FLAGS: dict[str, list[str]] = {}  # options of each command
GPU_FULL = (
    "the GPU has too little memory: for a run, lower run.batch_size_train (and raise "
    "run.accum_grad_iters) or run.batch_size_eval, or set run.amp=auto; for other commands, "
    "CUDA_VISIBLE_DEVICES= takes the CPU"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0; 1 if the doctor finds a problem; 2 for a user error or one of files and
        networks, 130 for Ctrl-C, each with one line; 75 if a signal ended a training run that the
        same command with run.resume_ckpt_path=auto goes on with; 141 if the output's pipe is
        closed.
        Any other exception keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # another encoding than UTF-8 lacks characters
            stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt_once)
    try:
        try:
            _require_known(sys.argv[1:] if argv is None else argv)
            return _run(**vars(PARSER.parse_args(argv)))
        finally:
            sys.stdout.flush()  # fails here, if it must, and not when the interpreter ends
    except UserError as error:
        return _end(2, f"error: {error}")
    except StartAgain:
        return StartAgain.CODE
    except KeyboardInterrupt as stop:
        first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes, which all get it
        how = str(stop) or "the same command starts anew"
        return _end(130, f"interrupted: {how}" if first else "")
    except UnicodeEncodeError as error:
        return _end(2, f"error: {reason_of(error)}: choose a UTF-8 locale, as in LC_ALL=C.UTF-8")
    except BrokenPipeError:  # as after "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell reports SIGPIPE
    except OSError as error:
        return _end(2, f"error: {advice_on(error)}")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; it may not be imported yet
            raise
        return _end(2, f"error: {GPU_FULL}")
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupt_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if launch := sys.modules.get("softmask_plugin.launch"):
            launch.leave_distributed()


def _require_known(argv: Sequence[str]) -> None:
    """Name what is nearest to an unknown command or option; argparse lists all, or none."""
    name = argv[0] if argv else "-"
    if name.startswith("-"):
        return
    if name not in FLAGS:
        raise UserError(f"unknown command '{name}': {suggest(name, FLAGS)}")
    for flag in (given.partition("=")[0] for given in argv[1:]):
        is_name = flag.startswith("--") and " " not in flag  # argparse takes the start of one, too
        if is_name and not any(known.startswith(flag) for known in FLAGS[name]):
            raise UserError(f"{name} has no option '{flag}': {suggest(flag, FLAGS[name])}")


def _run(run: Command, **args: Any) -> int:
    if run is not _doctor and (problems := stack.problems(stack.installed())):
        raise UserError(problems[0])
    alone = (_configs, _doctor)  # without LAVIS; the doctor reloads by itself
    if softmask_plugin.only_command and run not in alone:
        importlib.reload(softmask_plugin)
    return run(**args) or 0


def _interrupt_once(*_: Any) -> None:
    """Handle Ctrl-C; a second one would only interrupt the end of data loaders and processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end(code: int, line: str) -> int:
    if line:
        sys.stderr.write(f"softmask: {line}\n")  # LAVIS mutes print on ranks above 0
    return code


def command(name: str, text: str, *args: Argument, **fixed: Any) -> Callable[[Command], Command]:
    """Function decorator: make it a command, called with these arguments by name."""
    parser = COMMANDS.add_parser(name, help=text, description=text)
    FLAGS[name] = ["--help", *(flag for flags, _ in args for flag in flags if flag[:2] == "--")]
    for flags, settings in args:
        parser.add_argument(*flags, **settings)

    def add(run: Command) -> Command:
        parser.set_defaults(run=run, **fixed)
        return run

    return add


def argument(*flags: str, **settings: Any) -> Argument:
    """An argument as argparse's ``add_argument`` takes it."""
    return flags, settings


def utf8(given: str) -> str:
    """An argument of any bytes as text: UTF-8, whatever the locale."""
    return given.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


FILE = "a YAML file, or one that 'softmask configs' lists"
OPTIONS = partial(  # given twice, both count
    argument, "--options", action="extend", nargs="+", default=[], metavar="KEY=VALUE"
)
OF_YAML = OPTIONS(help="override keys of the YAML, such as run.max_epoch=5")
YAML = (argument("--cfg-path", required=True, help=FILE), OF_YAML)
WEIGHTS = (
    argument(
        "--checkpoint",
        metavar="FILE",
        help="a run's folder, file, URL or hub:OWNER/NAME; default: the bundled tiny model",
    ),
    argument("--model", dest="arch", help="model of a checkpoint that names none, like ALBEF.pth"),
    argument("--type", dest="model_type", metavar="TYPE", help="type of that model, such as base"),
    OPTIONS(help="override keys of the model, such as model.trust_checkpoint=true"),
)

# Commands import what they need when they run: the doctor must work where LAVIS does not, and help
# must not wait for torch.


@command("train", "train a model from a YAML file, then test it", *YAML, evaluate=False)
@command("evaluate", "test a model from a YAML file, a run or a checkpoint", *YAML, evaluate=True)
def _launch(**args: Any) -> None:
    from lavis.common.dist_utils import is_main_process

    from softmask_plugin import launch
    from softmask_plugin.report.summary import run_summary

    try:
        runner, results = launch.run(**args)
    except launch.Interrupted as stop:
        raise KeyboardInterrupt(_how_to_resume(stop.checkpoint, **args)) from None
    if is_main_process():
        print(run_summary(runner, results))


def _how_to_resume(checkpoint: Any, cfg_path: str, options: list[str], evaluate: bool) -> str:
    if evaluate:
        return ""
    if checkpoint is None:
        return "nothing is saved yet, so the same command starts anew (see run.save_every_steps)"
    train = "torchrun ... -m softmask_plugin.train" if "RANK" in os.environ else "softmask train"
    kept = [each for each in options if not each.startswith("run.resume_ckpt_path=")]
    given = shlex.join(["--cfg-path", cfg_path, "--options", *kept, "run.resume_ckpt_path=auto"])
    return f"{train} {given} goes on from {checkpoint}"


@command("check", "try a YAML file before a long run: data, a batch, steps, then its time", *YAML)
def _check(**args: Any) -> None:
    from softmask_plugin.check import check

    for line in check(**args):
        print(line, flush=True)
    print("All is well; nothing was written into run.output_dir")


@command(
    "demo",
    "train a tiny model on rendered scenes and write a report (about 6 minutes on two cores)",
    argument("--output-dir", default="outputs/demo", help="default: %(default)s"),
    OF_YAML,
)
def _demo(**args: Any) -> None:
    from softmask_plugin import demo

    demo.main(**args)


@command(
    "explain",
    "show where in an image each word of a caption looks, and what masking it does",
    argument("--image", metavar="FILE"),
    argument("--caption", metavar="TEXT", type=utf8),
    argument("--captions", metavar="FILE", help="captions in a file, not --image and --caption"),
    argument("--images", metavar="FOLDER", help="the images of that file"),
    *WEIGHTS,
    argument("--word", action="append", type=utf8, help="explain this word only; may be repeated"),
    argument(
        "--box",
        action="append",
        metavar="PHRASE=X0,Y0,X1,Y1",
        type=utf8,
        help="box of a phrase of the caption, in shares of the image: does the phrase's map peak "
        "in it? may be repeated",
    ),
    argument("-o", "--output", help="figure (.png, .pdf, .svg); for a file of captions, a folder"),
    argument("--width", type=float, help="figure's width in inches; 3.3 fits a paper's column"),
    argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="also write words, scores and maps as JSON; without FILE to standard output",
    ),
)
def _explain(
    image: str | None,
    caption: str | None,
    captions: str | None,
    images: str | None,
    word: list[str] | None,
    box: list[str] | None,
    output: str | None,
    width: float | None,
    json: str | None,
    **weights: Any,
) -> None:
    from json import dumps

    from softmask_plugin.explain.image import (
        explain_file,
        explain_image,
        require_format,
        require_width,
    )
    from softmask_plugin.explain.trained import load_trained
    from softmask_plugin.files.whole import require_other

    if captions and images and not any((image, caption, word, box, width, json)):
        output = output or "explanations"
        done, left_out = explain_file(captions, images, output, load_trained(**weights).on_gpu())
        print(f"{done} pairs explained, {left_out} left out: {output}")
        return
    if not image or caption is None or captions or images:
        raise UserError(
            "give --image and --caption; or only --captions, --images, -o and the model's options"
        )
    output = output or "explanation.png"
    require_format(output)
    require_other(output, image)
    require_width(width)
    boxes = _boxes(box or [])
    found = explain_image(image, caption, load_trained(**weights).on_gpu(), word, boxes=boxes)
    figure = found.save(output, width)
    if json == "-":
        print(dumps(found.as_dict()))
        return
    if json is not None:
        Path(json).write_text(dumps(found.as_dict()) + "\n", encoding="utf-8")
    print(f"{found.table()}\n\nFigure: {figure}")


def _boxes(given: Sequence[str]) -> dict[str, list[Any]]:
    """The boxes of each phrase from ``PHRASE=X0,Y0,X1,Y1``."""
    boxes: dict[str, list[Any]] = {}
    for each in given:
        phrase, _, sides = each.rpartition("=")
        try:
            x0, y0, x1, y1 = map(float, sides.split(","))
        except ValueError as error:
            raise UserError(
                f"--box '{each}': give a phrase and four numbers, such as 'a dog=0.1,0.2,0.5,0.6'"
            ) from error
        boxes.setdefault(phrase, []).append((x0, y0, x1, y1))
    return boxes


@command(
    "features",
    "encode a folder of images once, to search it by text",
    argument("--images", required=True, metavar="FOLDER"),
    *WEIGHTS,
    argument("-o", "--output", default="features.npz", help="default: %(default)s"),
)
def _features(images: str, output: str, **weights: Any) -> None:
    from softmask_plugin.explain.gallery import save_features
    from softmask_plugin.explain.trained import load_trained

    done, left_out = save_features(load_trained(**weights).on_gpu(), Path(images), Path(output))
    print(f"{done} images encoded, {left_out} unreadable: {output}")


@command(
    "search",
    "find the images that a text describes best, among those of softmask features",
    argument("text", metavar="TEXT", type=utf8),
    argument("--features", default="features.npz", metavar="FILE", help="default: %(default)s"),
    argument("--count", type=int, default=8, help="images to list; default: %(default)s"),
    *WEIGHTS,
)
def _search(text: str, features: str, count: int, **weights: Any) -> None:
    from softmask_plugin.explain.gallery import search_features
    from softmask_plugin.explain.trained import load_trained

    hits = search_features(load_trained(**weights).on_gpu(), Path(features), text, count)
    print("match  similarity")
    for file, hit in hits:
        print(f" {hit.match:.2f}       {hit.similarity:+.2f}  {one_line(str(file))}")


@command(
    "app",
    "open a web page to click the words of a caption: where the model looks, what the mask hides",
    *WEIGHTS,
    argument("--images", metavar="FOLDER", help="images to search; default: rendered scenes"),
    argument("--port", type=int, default=8501, help="default: %(default)s"),
)
def _app(images: str | None, port: int, **weights: Any) -> None:
    from softmask_plugin.explain import app

    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server has its own way to stop
    app.serve(app.Weights(**weights), images, port)


@command(
    "report",
    "write a run's folder as one page: metrics, curves, pictures; or several runs side by side",
    argument("runs", metavar="RUN", nargs="+", help="folder of a running, killed or finished run"),
    argument("-o", "--output", metavar="FILE", help="default: RUN/report.html; of several, here"),
)
def _report(runs: list[str], output: str | None) -> None:
    from softmask_plugin import report

    many = len(runs) > 1
    page = report.report_runs(runs, output) if many else report.report_run(runs[0], output)
    print(f"Report: {page}")


@command(
    "compare",
    "compare two runs item by item: paired difference, its interval, McNemar's test",
    argument("first", metavar="RUN", help="folder of a run whose task saves a result of each item"),
    argument("second", metavar="RUN", help="folder of another run on the same items"),
    argument("--split", default="test", help="default: %(default)s"),
)
def _compare(first: str, second: str, split: str) -> None:
    from softmask_plugin.compare import compare, table

    print(table(compare(first, second, split)))


@command(
    "export",
    "write a trained model as a folder to share: weights, configuration, vocabulary, model card",
    argument("trained", metavar="RUN", help="a run's folder, or a checkpoint of one"),
    argument("folder", metavar="FOLDER", help="new folder"),
    argument("--license", metavar="NAME", help="license of the weights, such as apache-2.0"),
    argument(
        "--layout",
        choices=("lavis", "albef"),
        help="write a plain .pth for LAVIS's or ALBEF's own code instead, momentum included",
    ),
)
def _export(**args: Any) -> None:
    from softmask_plugin.export import export

    print(f"Model: {export(**args)}")


@command(
    "ablate",
    "train the variants of a plan over several seeds at equal budget, and compare them",
    argument("--plan", required=True, help=FILE),
    argument("--output-dir", help="folder of the runs; default: outputs/ablation/<plan>"),
    argument("--seeds", type=int, help="how many of the plan's seeds to use; default: all"),
    argument("--jobs", type=int, default=1, help="runs at once; with CUDA always one per device"),
    argument("--baseline", help="variant to compare with; default: the plan's baseline"),
    argument("--only", nargs="+", default=[], metavar="NAME", help="variants to run; default: all"),
    argument("--again", action="store_true", help="first discard the results of these variants"),
    OF_YAML,
)
def _ablate(**args: Any) -> None:
    from softmask_plugin.ablate.command import main as ablate

    ablate(**args)


@command(
    "shards",
    "pack a folder of images and a file of captions into WebDataset shards",
    argument("--captions", required=True, help="JSON, JSONL, CSV, TSV or Karpathy's train split"),
    argument("--images", required=True, help="folder of the images"),
    argument("--out", required=True, help="new folder for the shards"),
    argument("--per-shard", type=int, default=1000, help="images per shard; default: %(default)s"),
    argument("--seed", type=int, default=42, help="seed of the order; default: %(default)s"),
)
def _shards(**args: Any) -> None:
    from softmask_plugin.datasets.shards.pack import pack_shards

    counts = pack_shards(**args)
    print(f"{sum(counts.values())} images in {len(counts)} shards: {args['out']}")


@command(
    "foils",
    "change one word of each caption of a file, so that it is false of its image",
    argument("captions", metavar="CAPTIONS", help="a file of captions, best several of an image"),
    argument("-o", "--output", default="foils.json", help="default: %(default)s"),
    argument("--seed", type=int, default=42, help="seed of the changes; default: %(default)s"),
)
def _foils(**args: Any) -> None:
    from softmask_plugin.datasets.word_foils import write_foils

    done, left_out = write_foils(**args)
    print(f"{done} captions changed, {left_out} left out: {args['output']}")


@command(
    "replay",
    "repeat a step that stopped a run, and say where its numbers went bad",
    argument("file", help="bad_step_<step>_rank<n>.pth in the run's folder"),
)
def _replay(file: str) -> None:
    from softmask_plugin.runners.replay import replay

    print("\n".join(replay(file)))


@command(
    "doctor",
    "list what is installed and registered, try a training step, and say what to do about problems",
    argument("--json", action="store_true", help="print JSON"),
)
def _doctor(json: bool) -> int:
    from softmask_plugin.host import doctor

    return doctor.main(as_json=json)


@command(
    "configs",
    "list the shipped YAML files, or print one",
    argument("name", nargs="?", metavar="NAME", help="the file to print"),
)
def _configs(name: str | None) -> None:
    shipped = {**shipped_configs(), **shipped_plans()}
    if name is not None:
        print(find_file("softmask configs", name, shipped).read_text(encoding="utf-8"), end="")
        return
    width = max(map(len, shipped))
    for short, file in shipped.items():
        first = file.read_text(encoding="utf-8").partition("\n")[0]  # a comment in each of them
        print(f"{short:<{width}}  {first.lstrip('# ')}")


if __name__ == "__main__":
    sys.exit(main())
