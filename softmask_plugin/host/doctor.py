"""``softmask doctor``: what is installed, registered and usable here, and how to fix problems."""

from __future__ import annotations

import importlib
import json
import logging
import os
import platform
import shutil
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from tempfile import gettempdir

import torch
import torch.distributed as dist
from huggingface_hub import try_to_load_from_cache

import softmask_plugin
from softmask_plugin.config.paths import CONFIGS, shipped_configs
from softmask_plugin.errors import UserError, one_line
from softmask_plugin.host import stack
from softmask_plugin.host.environment import has_bf16

KINDS = ("model", "processor", "builder", "task", "runner", "lr_scheduler")

# The doctor takes a few steps of this run
RUN = "scenes/train/pretrain_tiny"
OPTIONS = (
    *("run.batch_size_train=4", "datasets.scenes_pretrain.num.train=32", "run.num_workers=0"),
    *("run.valid_splits=[]", "run.test_splits=[]", "run.tensorboard=false"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``advice`` says how to fix a problem, "" if there is none."""

    section: str
    name: str
    value: str
    advice: str = ""


def main(as_json: bool = False) -> int:
    """Print the report.

    Returns:
        0 if all is well, 1 if there is a problem.
    """
    findings = examine()
    healthy = not any(finding.advice for finding in findings)
    if as_json:
        print(json.dumps({"ok": healthy, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        print(_text(findings))
    return 0 if healthy else 1


def examine() -> list[Finding]:
    """Check everything, or without a working LAVIS everything that does not need it."""
    sections = {"Installed": _installed(), "Devices": _devices(), "Files": _files()}
    if not stack.problems(stack.installed()):
        sections["With LAVIS"] = _with_lavis()
    return [Finding(section, *line) for section, lines in sections.items() for line in lines]


def _installed() -> Iterator[tuple[str, ...]]:
    versions = stack.installed()
    yield "python", platform.python_version()
    for name, have in versions.items():
        yield name, have or "missing"
    if problems := stack.problems(versions):
        for problem in problems:
            yield "stack", "does not work", problem
    else:
        beyond = ", ".join(stack.beyond_pins(versions))
        yield "stack", f"newer than LAVIS's pins: {beyond}" if beyond else "LAVIS's own versions"


def _devices() -> Iterator[tuple[str, ...]]:
    capability = torch.backends.cpu.get_cpu_capability()
    fast = has_bf16(torch.device("cpu"))
    bf16 = "fast bf16: use run.amp=bf16" if fast else "no fast bf16: use run.amp=false"
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    yield "cpu", f"{threads}, {capability}, {bf16}"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        fast = has_bf16(torch.device("cuda", index))
        bf16 = "bf16" if fast else "no bf16: use run.amp=fp16"
        yield f"cuda:{index}", f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {bf16}"
    if not torch.cuda.is_available():
        yield _no_cuda()
    known = ("gloo", "nccl") if dist.is_available() else ()
    backends = [name for name in known if getattr(dist, f"is_{name}_available")()]
    yield "torchrun", " and ".join(backends) or "not available"


def _no_cuda() -> tuple[str, str, str]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    remedy = "update its driver (see nvidia-smi)" if torch.version.cuda else "install a CUDA build"
    advice = f"PyTorch cannot use the NVIDIA card here: {remedy}" * bool(shutil.which("nvidia-smi"))
    return "cuda", f"none (this torch is built for {build})", advice


def _files() -> Iterator[tuple[str, ...]]:
    shipped = shipped_configs()
    missing = "" if shipped else "the shipped YAML files are missing: reinstall softmask-plugin"
    yield "configs", f"{len(shipped)} in {CONFIGS}", missing
    folder = Path("outputs").absolute()
    writable = os.access(folder if folder.exists() else folder.parent, os.W_OK)
    value = f"{folder} is {'' if writable else 'not '}writable"
    yield "outputs", value, "" if writable else f"{value}: set run.output_dir to another folder"
    cached = isinstance(try_to_load_from_cache("bert-base-uncased", "vocab.txt"), str)
    where = "in the Hugging Face cache" if cached else "downloaded when first used"
    yield "bert-base-uncased", f"vocabulary is {where}"


def _with_lavis() -> Iterator[tuple[str, ...]]:
    try:
        if softmask_plugin.only_command:
            importlib.reload(softmask_plugin)
    except UserError as error:
        yield "lavis", "cannot be imported", str(error)
        return
    yield from _registered()
    yield _step("cuda" if torch.cuda.is_available() else "cpu")


def _registered() -> Iterator[tuple[str, ...]]:
    from lavis.common.registry import registry

    from softmask_plugin.registry import list_losses

    for kind in KINDS:
        ours = [
            _with_types(name, cls)
            for name, cls in sorted(registry.mapping[f"{kind}_name_mapping"].items())
            if cls.__module__.startswith("softmask_plugin.")
        ]
        yield kind, ", ".join(ours) or "none"
    yield "loss", ", ".join(list_losses())


def _with_types(name: str, cls: type) -> str:
    types = getattr(cls, "PRETRAINED_MODEL_CONFIG_DICT", None)
    return f"{name} ({', '.join(types)})" if types else name


def _step(device: str) -> tuple[str, ...]:
    from softmask_plugin.check import check

    logging.disable()
    try:
        with redirect_stdout(StringIO()):
            options = [f"run.device={device}", f"run.output_dir={gettempdir()}"]
            lines = check(RUN, [*OPTIONS, *options])
            done = dict(line.split(maxsplit=1) for line in lines)
        return "step", f"{RUN} on {device}: {done['step']}"
    except Exception as error:  # of any part of the host
        place = traceback.extract_tb(error.__traceback__)[-1]
        file = "/".join(Path(place.filename).parts[-3:])
        return (
            "step",
            f"{RUN} on {device} fails",
            f"a training step fails in {file}, line {place.lineno} ({type(error).__name__}: "
            f"{one_line(str(error))}): install the tested versions (requirements/), or report this",
        )
    finally:
        logging.disable(logging.NOTSET)


def _text(findings: list[Finding]) -> str:
    width = max(len(finding.name) for finding in findings)
    lines, section = [], ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ["", section]
        mark = "!" if finding.advice else " "
        first, indent = f"{mark} {finding.name:<{width}}  ", " " * (width + 4)
        lines += textwrap.wrap(finding.value, 100, initial_indent=first, subsequent_indent=indent)
    advice = [f"! {finding.advice}" for finding in findings if finding.advice]
    lines += ["", *(["What to do", *advice] if advice else ["All is well."])]
    return "\n".join(lines).lstrip()
