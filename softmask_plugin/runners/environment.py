"""What a run ran on: versions, processor, devices."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from lavis.common.dist_utils import get_world_size

from softmask_plugin.stack import installed


def environment(device: torch.device) -> dict[str, object]:
    """Versions and devices by name, as plain values."""
    cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "processes": get_world_size(),
        **installed(),
    }


def _processor() -> str:
    """Its name; Linux tells it in a file, not to Python."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
