"""``softmask doctor``: what is installed, registered and usable here, and what to do about it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import try_to_load_from_cache

from softmask_plugin.config.paths import CONFIGS
from softmask_plugin.host import stack

KINDS = ("model", "processor", "builder", "task", "runner", "lr_scheduler")


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``advice`` says what to do, where something needs doing."""

    section: str
    name: str
    value: str
    advice: str = ""


def main(as_json: bool = False) -> int:
    """Print the report.

    Returns:
        0 if all is well, 1 if something needs action.
    """
    findings = examine()
    healthy = not any(finding.advice for finding in findings)
    if as_json:
        print(json.dumps({"ok": healthy, "findings": [asdict(f) for f in findings]}, indent=2))
    else:
        print(_text(findings))
    return 0 if healthy else 1


def examine() -> list[Finding]:
    """Look at everything; what needs a working LAVIS is left out where there is none."""
    findings = [*_installed(), *_devices(), *_files()]
    if not stack.problems(stack.installed()):
        findings += _registered()
    return findings


def _installed() -> Iterator[Finding]:
    section, versions = "Installed", stack.installed()
    yield Finding(section, "python", platform.python_version())
    for name, have in versions.items():
        yield Finding(section, name, have or "missing")
    problems = stack.problems(versions)
    for problem in problems:
        yield Finding(section, "stack", "does not work", problem)
    if not problems:
        beyond = ", ".join(stack.beyond_pins(versions))
        yield Finding(
            section, "stack", f"beyond LAVIS's own: {beyond}" if beyond else "LAVIS's own versions"
        )


def _devices() -> Iterator[Finding]:
    section = "Devices"
    capability = torch.backends.cpu.get_cpu_capability()
    cores = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores, {capability}"
    yield Finding(section, "cpu", cores)
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if card.major >= 8 else "no bf16: use run.amp=fp16"
        memory = card.total_memory / 2**30
        yield Finding(section, f"cuda:{index}", f"{card.name}, {memory:.0f} GiB, {bf16}")
    if not torch.cuda.is_available():
        yield _no_cuda(section)
    backends = [name for name in ("gloo", "nccl") if _has_backend(name)]
    yield Finding(section, "torchrun", " and ".join(backends) or "not available")


def _no_cuda(section: str) -> Finding:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    value = f"none (this torch is built for {build})"
    if not shutil.which("nvidia-smi"):
        return Finding(section, "cuda", value)
    if torch.version.cuda:
        advice = "PyTorch cannot use the NVIDIA card here: update its driver (see nvidia-smi)"
    else:
        advice = (
            "there is an NVIDIA driver, but this torch is built for CPUs only: install a CUDA build"
        )
    return Finding(section, "cuda", value, advice)


def _has_backend(name: str) -> bool:
    return dist.is_available() and getattr(dist, f"is_{name}_available")()


def _files() -> Iterator[Finding]:
    section = "Files"
    shipped = sorted((CONFIGS / "projects").rglob("*.yaml"))
    yield Finding(
        section,
        "configs",
        f"{len(shipped)} in {CONFIGS}",
        "" if shipped else "the shipped YAML files are missing: reinstall softmask-plugin",
    )
    folder = Path("outputs").absolute()
    writable = os.access(folder if folder.exists() else folder.parent, os.W_OK)
    yield Finding(
        section,
        "outputs",
        f"{folder} {'can' if writable else 'cannot'} be written",
        "" if writable else f"{folder} cannot be written: set run.output_dir to another folder",
    )
    cached = isinstance(try_to_load_from_cache("bert-base-uncased", "vocab.txt"), str)
    yield Finding(
        section,
        "bert-base-uncased",
        "vocabulary is in the hub cache" if cached else "vocabulary is downloaded when first used",
    )


def _registered() -> Iterator[Finding]:
    from lavis.common.registry import registry

    from softmask_plugin.registry import list_losses

    for kind in KINDS:
        classes = registry.mapping[f"{kind}_name_mapping"].items()
        names = [_with_types(name, cls) for name, cls in sorted(classes) if _is_ours(cls)]
        yield Finding("Registered with LAVIS", kind, ", ".join(names) or "none")
    yield Finding("Registered with LAVIS", "loss", ", ".join(list_losses()))


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("softmask_plugin.")


def _with_types(name: str, cls: type) -> str:
    types = getattr(cls, "PRETRAINED_MODEL_CONFIG_DICT", None)
    return f"{name} ({', '.join(types)})" if types else name


def _text(findings: list[Finding]) -> str:
    width = max(len(finding.name) for finding in findings)
    lines, section = [], ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ["", section]
        mark = "!" if finding.advice else " "
        first, indent = f"{mark} {finding.name:<{width}}  ", " " * (width + 4)
        lines += textwrap.wrap(
            finding.value, 100, initial_indent=first, subsequent_indent=indent
        ) or [first]
    advice = [finding.advice for finding in findings if finding.advice]
    lines += ["", "What to do" if advice else "All is well."]
    lines += [f"! {text}" for text in advice]
    return "\n".join(lines).lstrip()
