"""Compares what two runs left behind, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

CLOCK = ("time", "pairs_per_s")  # keys of metrics.jsonl that differ between any two runs


def trace(folder: Path) -> dict[str, Any]:
    """Everything in a run's folder that does not depend on the clock or the folder's path: all
    checkpoints, ``metrics.jsonl`` and LAVIS's logs."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.pth")):
        content = torch.load(path, weights_only=True)
        del content["config"], content["progress"]["seconds"], content["progress"]["logs"]
        found[path.name] = content
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    found["metrics.jsonl"] = [{k: v for k, v in x.items() if k not in CLOCK} for x in lines]
    found["log.txt"] = (folder / "log.txt").read_text().split("\n}\n")[1]  # behind the config
    scores = folder / "evaluate.txt"
    found["evaluate.txt"] = scores.read_text() if scores.exists() else ""
    return found


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Places where two traces differ."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [place]
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{place}: {sorted(map(str, one.keys() ^ other.keys()))} in one alone"]
        pairs = [(f"{place}/{key}", one[key], other[key]) for key in one]
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return [f"{place}: {len(one)} and {len(other)} entries"]
        pairs = [(f"{place}/{i}", a, b) for i, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        return [] if one == other else [f"{place}: {one!r} and {other!r}"]
    return [found for where, a, b in pairs for found in differences(a, b, where)]
