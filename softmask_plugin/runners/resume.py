"""What a run must remember to go on as if nothing had happened, and where it finds it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_world_size, is_main_process
from torch import nn

from softmask_plugin.config.values import differences, flat
from softmask_plugin.errors import UserError
from softmask_plugin.runners import checkpoint
from softmask_plugin.runners.checkpoint import CheckpointFiles

# Sections of a YAML in which a run that goes on by itself may not differ from the one before.
FIXED = ("model", "datasets")


@dataclass
class Progress:
    """Where a run is, beyond weights, optimizer and scaler. Random draws need no state: each is
    seeded by what it is for.

    Attributes:
        epoch: the one under way.
        taken: its items that were trained on, over all processes.
        step_items: items per batch, over all processes.
        best_epoch, best_score: of the best validation so far.
        seconds: of training.
        skipped, skipped_in_a_row: steps skipped for numbers that were not finite.
        meter: the epoch's losses so far, see ``LossMeter.fold``.
        stream: place in a stream of shards, see ``StreamLoader.state``.
        logs: bytes of the log files.
    """

    epoch: int = 0
    taken: int = 0
    step_items: int = 0
    best_epoch: int | None = None
    best_score: float = -math.inf
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    meter: dict[str, Any] = field(default_factory=lambda: {"folded": {}, "drained": {}})
    stream: dict[str, Any] | None = None
    logs: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Progress:
        """That of a checkpoint; one of LAVIS's knows the last whole epoch only."""
        known = content.get("progress", {"epoch": content["epoch"] + 1})
        names = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in known.items() if name in names})


def find(
    files: CheckpointFiles, model: nn.Module, device: torch.device, config: Mapping[str, Any]
) -> tuple[Path, dict[str, Any]] | None:
    """The furthest usable checkpoint of a run's folder, loaded into the model; the same on every
    rank. Those that cannot be used are named and passed over.

    Returns:
        Its path and content; None where there is no checkpoint.

    Raises:
        UserError: none of them can be used, or the run was configured otherwise.
    """
    box: list[Any] = [None]
    content: dict[str, Any] | None = None
    if is_main_process():
        try:
            box[0], content = next(_usable(files, model, device), (None, None))
            if content is not None:
                _require_same(content.get("config", config), config, files.folder)
        except UserError as error:
            box[0] = error
    if get_world_size() > 1:
        dist.broadcast_object_list(box)
    (path,) = box
    if isinstance(path, UserError):
        raise path
    if path is None:
        return None
    return path, read(path, model, device) if content is None else content


def read(path: str | Path, model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Load a checkpoint's weights into the model; returns all that it holds.

    Raises:
        UserError: it cannot be read, or is of another model.
    """
    content = checkpoint.load(path, device)
    checkpoint.load_trained_state(model, content["model"], str(path))
    return content


def _usable(
    files: CheckpointFiles, model: nn.Module, device: torch.device
) -> Iterator[tuple[Path, dict[str, Any]]]:
    paths, refused = files.newest_first(), []
    for path in paths:
        try:
            content = read(path, model, device)
        except UserError as error:
            refused.append(error)
            logging.warning("refused a checkpoint: %s", error)
        else:
            yield path, content
    if paths and len(refused) == len(paths):
        raise UserError(
            f"none of the {len(paths)} checkpoints in {files.folder} can be used, the furthest: "
            f"{refused[0]} (remove that folder, or set run.output_dir, to start anew)"
        )


def _require_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    for section in FIXED:
        old, new = (flat(each.get(section, {})) for each in (before, now))
        for key, was, now_is in differences(old, new):
            raise UserError(
                f"the run in {folder} had {section}.{key} = {was}, this one has {now_is}: set "
                "run.output_dir to another folder to start anew, or run.resume_ckpt_path to the "
                "file of a checkpoint to go on all the same"
            )
