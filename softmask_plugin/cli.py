"""The ``softmask`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

import torch.distributed as dist

from softmask_plugin.errors import UserError
from softmask_plugin.host import stack

EXAMPLES = """\
examples:
  softmask demo                        train a tiny model on rendered scenes, write a report
  softmask explain --image dog.jpg --caption "a dog on a sofa" --checkpoint checkpoint_best.pth
  softmask configs                     list the YAML files that come with the plugin
  softmask shards --captions train.json --images photos --out shards
  softmask ablate --plan lavis_configs/ablation/small.yaml
  softmask train --cfg-path my.yaml --options run.max_epoch=5 model.model_type=tiny
  softmask evaluate --cfg-path my.yaml --options model.pretrained=outputs/.../checkpoint_best.pth
  torchrun --nproc_per_node=8 -m softmask_plugin.train --cfg-path my.yaml
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        The exit code: 0, or 1 when the doctor finds something wrong, or 2 for a mistake of the
        user's, which is printed in one line. Any other exception keeps its traceback.
    """
    args = _parser().parse_args(argv)
    try:
        if args.run is not _doctor:
            _require_working_stack()
        return args.run(args)
    except UserError as error:
        sys.stderr.write(f"softmask: error: {error}\n")  # LAVIS mutes print on ranks above 0
        return 2
    finally:
        if dist.is_initialized():
            _leave_distributed()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="softmask",
        description="SoftMask++ pretraining for Salesforce LAVIS.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("softmask-plugin"))
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    for name, text in (
        ("train", "train a model as a YAML file says, then test it"),
        ("evaluate", "test a model as a YAML file says"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--cfg-path",
            required=True,
            help="a YAML file, or the name of one of 'softmask configs'",
        )
        _add_options(command)
        command.set_defaults(run=_launch, evaluate=name == "evaluate")

    text = "train a tiny model on rendered scenes and write a report (under 5 minutes on two cores)"
    command = commands.add_parser("demo", help=text, description=text)
    command.add_argument("--output-dir", default="outputs/demo", help="default: %(default)s")
    _add_options(command)
    command.set_defaults(run=_demo)

    text = "show where in an image each word of a caption looks, and what masking it does"
    command = commands.add_parser("explain", help=text, description=text)
    command.add_argument("--image", required=True, metavar="FILE")
    command.add_argument("--caption", required=True, metavar="TEXT")
    _add_weights(command)
    command.add_argument(
        "--word",
        action="append",
        metavar="W",
        help="a word to explain, may be given again; default: every word of the caption",
    )
    command.add_argument(
        "-o",
        "--output",
        default="explanation.png",
        metavar="FILE",
        help="the figure, a .png, .pdf or .svg; default: %(default)s",
    )
    command.add_argument(
        "--width",
        type=float,
        metavar="INCHES",
        help="of the figure, whose letters keep their size: 3.3 for a paper's column; default: as "
        "many as its words need",
    )
    command.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write words, scores and maps as JSON as well; without FILE to the standard output",
    )
    _add_options(command)
    command.set_defaults(run=_explain)

    text = "train a plan's variants over seeds at equal budget, and tell what each is worth"
    command = commands.add_parser("ablate", help=text, description=text)
    for option, kind, help_text in (
        ("--plan", str, "a YAML file, or a shipped one such as lavis_configs/ablation/scenes.yaml"),
        ("--output-dir", str, "of all runs and the table, default: outputs/ablation/<plan>"),
        ("--seeds", int, "how many of the plan's seeds, default: all"),
        ("--jobs", int, "runs at the same time on a CPU, default: 1; with CUDA one per device"),
        ("--baseline", str, "compare with this variant instead of the plan's baseline"),
    ):
        command.add_argument(option, type=kind, required=option == "--plan", help=help_text)
    command.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="variants to run, default: all"
    )
    command.add_argument(
        "--again", action="store_true", help="throw the results of these variants away first"
    )
    _add_options(command)
    command.set_defaults(run=_ablate, jobs=1)

    text = "write a run's folder as one page: curves, metrics, pictures of the masks, configuration"
    command = commands.add_parser("report", help=text, description=text)
    command.add_argument(
        "run_dir", metavar="RUN_DIR", help="of a run under way, killed or finished"
    )
    command.add_argument("-o", "--output", metavar="FILE", help="default: RUN_DIR/report.html")
    command.set_defaults(run=_report)

    text = "click the words of a caption on a web page: where the model looks, what the mask hides"
    command = commands.add_parser("app", help=text, description=text)
    _add_weights(command)
    command.add_argument(
        "--images", metavar="FOLDER", help="to search by text, default: rendered scenes"
    )
    command.add_argument("--port", type=int, default=8501, help="default: %(default)s")
    _add_options(command)
    command.set_defaults(run=_app)

    text = "tell what is installed, registered and usable here, and what to do about problems"
    command = commands.add_parser("doctor", help=text, description=text)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_doctor)

    text = "pack a folder of images and a file of captions into WebDataset shards, to stream them"
    command = commands.add_parser("shards", help=text, description=text)
    for option, value, help_text in (
        ("--captions", "FILE", "JSON, JSONL, CSV, TSV or Karpathy's layout (its train split)"),
        ("--images", "FOLDER", "the folder that the names in it start from"),
        ("--out", "FOLDER", "a new folder, for the shards"),
    ):
        command.add_argument(option, required=True, metavar=value, help=help_text)
    command.add_argument(
        "--per-shard", type=int, default=1000, help="images per shard, default: %(default)s"
    )
    command.add_argument("--seed", type=int, default=42, help="of the order, default: %(default)s")
    command.set_defaults(run=_shards)

    text = "repeat a step that stopped a run, and say where its numbers went bad"
    command = commands.add_parser("replay", help=text, description=text)
    command.add_argument("file", help="bad_step_<step>_rank<n>.pth of a run's folder")
    command.set_defaults(run=_replay)

    text = "list the YAML files that come with the plugin"
    command = commands.add_parser("configs", help=text, description=text)
    command.set_defaults(run=_configs)
    return parser


def _add_weights(command: argparse.ArgumentParser) -> None:
    for option, value, help_text in (
        (
            "--checkpoint",
            "FILE",
            "a file or URL, of a run or other; default: the tiny model that comes along",
        ),
        ("--model", "ARCH", "of a checkpoint that no run left, such as ALBEF.pth"),
        ("--type", "TYPE", "of that model, such as base"),
    ):
        command.add_argument(option, metavar=value, help=help_text)


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="overrides of the YAML, such as run.max_epoch=5",
    )


def _require_working_stack() -> None:
    problems = stack.problems(stack.installed())
    if problems:
        raise UserError(problems[0])


# The modules below import LAVIS, which the doctor must do without where it does not work.


def _launch(args: argparse.Namespace) -> int:
    from softmask_plugin import launch

    runner, _ = launch.run(args.cfg_path, args.options, evaluate=args.evaluate)
    print(f"Everything about this run is in {runner.output_dir}")
    return 0


def _leave_distributed() -> None:
    from softmask_plugin import launch

    launch.leave_distributed()


def _demo(args: argparse.Namespace) -> int:
    from softmask_plugin import demo

    demo.main(output_dir=args.output_dir, options=args.options)
    return 0


def _explain(args: argparse.Namespace) -> int:
    from softmask_plugin.explain import image
    from softmask_plugin.explain.trained import load_trained

    image.require_format(args.output)
    image.require_width(args.width)
    trained = load_trained(args.checkpoint, args.model, args.type, args.options)
    found = image.explain_image(args.image, args.caption, trained, args.word)
    figure = found.save(args.output, args.width)
    if args.json is not None:
        found.write_json(args.json)
    if args.json != "-":
        print(f"{found.table()}\n\nFigure: {figure}")
    return 0


def _ablate(args: argparse.Namespace) -> int:
    from softmask_plugin.ablate import command

    command.main(
        args.plan,
        output_dir=args.output_dir,
        only=args.only,
        seeds=args.seeds,
        jobs=args.jobs,
        again=args.again,
        baseline=args.baseline,
        options=args.options,
    )
    return 0


def _report(args: argparse.Namespace) -> int:
    from softmask_plugin import report

    print(f"Report: {report.report_run(args.run_dir, args.output)}")
    return 0


def _app(args: argparse.Namespace) -> int:
    from softmask_plugin.explain import app

    weights = app.Weights(args.checkpoint, args.model, args.type, tuple(args.options))
    app.serve(weights, args.images, args.port)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from softmask_plugin.host import doctor

    return doctor.main(as_json=args.json)


def _shards(args: argparse.Namespace) -> int:
    from softmask_plugin.datasets.shards.pack import pack_shards

    counts = pack_shards(args.captions, args.images, args.out, args.per_shard, args.seed)
    print(f"{sum(counts.values())} images in {len(counts)} shards: {args.out}")
    return 0


def _replay(args: argparse.Namespace) -> int:
    from softmask_plugin.runners.replay import replay

    print("\n".join(replay(args.file)))
    return 0


def _configs(args: argparse.Namespace) -> int:
    from softmask_plugin.ablate.plan import shipped_plans
    from softmask_plugin.config.check import shipped_configs, summary

    shipped = {**shipped_configs(), **shipped_plans()}
    width = max(map(len, shipped), default=0)
    for name, file in shipped.items():
        print(f"{name:<{width}}  {summary(file)}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
