"""The environment of a run: versions, processor and devices, at each start; needs no LAVIS."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch
import torch.distributed as dist

from softmask_plugin.config.paths import PACKAGE
from softmask_plugin.errors import UserError
from softmask_plugin.files.whole import write_json
from softmask_plugin.host.stack import installed, version_of

FILE = "environment.json"  # in a run's folder: a list, which grows when the environment changes


def environment(device: torch.device) -> dict[str, object]:
    """Versions and devices by name, as plain values for JSON."""
    cuda, distributed = device.type == "cuda", dist.is_available() and dist.is_initialized()
    number, commit = version_of("softmask-plugin"), _commit(PACKAGE.parent / ".git")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "processes": dist.get_world_size() if distributed else 1,
        "softmask-plugin": f"{number}+{commit[:9]}" if commit else number,
        **installed(),
    }


def has_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bf16; one without emulates it, far more slowly."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def note_environment(folder: Path, device: torch.device) -> None:
    """Append this start's environment to the run's list, unless it equals the last one."""
    noted, now = noted_environments(folder), environment(device)
    if noted[-1:] != [now]:
        write_json(folder / FILE, [*noted, now])


def noted_environments(folder: Path) -> list[dict[str, object]]:
    """Environments of a run in the order of its starts; empty if none was noted.

    Raises:
        UserError: The file is broken.
    """
    path = folder / FILE
    try:
        noted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        return [dict(start) for start in noted]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a JSON list of objects: delete it") from error


def _commit(git: Path) -> str | None:
    """The commit of a checkout, from git's own files: running git could run its hooks as well."""
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        name = head.removeprefix("ref: ")
        if name == head:  # detached
            return head
        if (git / name).is_file():
            return (git / name).read_text(encoding="utf-8").strip()
        packed = (git / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next(line.split()[0] for line in packed if line.endswith(f" {name}"))
    except (OSError, StopIteration):
        return None


def _processor() -> str:
    """The processor's name, which on Linux Python does not know."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
