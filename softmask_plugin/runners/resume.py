"""State needed to resume a run exactly, and how to find the checkpoint that holds it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from torch import nn
from torch.optim import Optimizer

from softmask_plugin.config.options import read_options
from softmask_plugin.config.values import comparable, differences, flat
from softmask_plugin.errors import UserError
from softmask_plugin.files.checkpoint import Checkpoint, furthest_first, open_checkpoint
from softmask_plugin.models.base import SoftMaskBase
from softmask_plugin.runners.checkpoint_files import load_trained_state
from softmask_plugin.runners.peers import from_main_process
from softmask_plugin.vocabulary import vocabulary_of

# Settings of the optimizer that a resumed run takes from its YAML
APPLIED = ("weight_decay", "betas", "lr_scale")
# Options of a run that say where it runs, not how
PLACES = "output_dir resume_ckpt_path rank gpu world_size distributed dist_backend dist_url".split()


@dataclass
class Progress:
    """A run's position: what a checkpoint needs besides weights, optimizer and scaler. Random
    generators need no state, since each is seeded by its purpose and the place in training."""

    epoch: int = 0  # the current one
    taken: int = 0  # items of it that were trained on, over all processes
    step_items: int = 0  # items per batch, over all processes
    unvalidated: bool = False  # all steps of it are done, but its validation is not
    best_epoch: int | None = None  # with the best validation so far
    best_score: float = -math.inf
    seconds: float = 0.0  # training time
    skipped: int = 0  # steps skipped because of numbers that were not finite
    skipped_in_a_row: int = 0
    # Losses of the epoch so far, see LossMeter.fold
    meter: dict[str, Any] = field(default_factory=lambda: {"folded": {}, "drained": {}})
    stream: dict[str, Any] | None = None  # position in shards, see StreamLoader.state
    logs: dict[str, int] = field(default_factory=dict)  # length of each log file, bytes

    @classmethod
    def of(cls, training: Mapping[str, Any]) -> Progress:
        """Progress of a checkpoint; LAVIS's checkpoints know only the last whole epoch."""
        known = training.get("progress", {"epoch": training["epoch"] + 1})
        names = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in known.items() if name in names})


def load_run(path: str | Path, model: nn.Module, device: torch.device) -> Checkpoint:
    """Open a training checkpoint and load its weights into the model; UserError if the file cannot
    be opened, is no training checkpoint, or fits another model."""
    checkpoint = open_checkpoint(path, device=device)
    if not {"optimizer", "epoch"} <= checkpoint.training.keys():
        raise UserError(
            f"{path} is no training checkpoint (it needs model, optimizer, epoch): to start from "
            "weights alone, set model.pretrained instead"
        )
    _require_vocabulary(checkpoint, model)
    _require_sep_token(checkpoint, model)
    load_trained_state(model, checkpoint.state, path)
    return checkpoint


def load_furthest(
    folder: Path, model: nn.Module, device: torch.device, config: Mapping[str, Any]
) -> Checkpoint | None:
    """Load the furthest usable checkpoint of a run's folder, the same one on every rank; None if
    the folder has none. Unusable checkpoints are named in the log and passed over.

    Raises:
        UserError: No checkpoint can be used, or the run had another configuration.
    """
    loaded: dict[Path, Checkpoint] = {}  # on the main process

    def find() -> Path | None:
        found = _furthest_usable(folder, model, device)
        if found is None:
            return None
        _require_same(found.config or config, config, folder)
        loaded[found.path] = found
        return found.path

    path = from_main_process(find)
    return None if path is None else loaded.get(path) or load_run(path, model, device)


def _furthest_usable(folder: Path, model: nn.Module, device: torch.device) -> Checkpoint | None:
    refused = []
    for path in furthest_first(folder):
        try:
            return load_run(path, model, device)
        except UserError as error:
            refused.append(error)
            logging.warning("refused a checkpoint: %s", error)
    if refused:
        raise UserError(
            f"none of the {len(refused)} checkpoints in {folder} can be used, the furthest: "
            f"{refused[0]} (remove that folder, or set run.output_dir, to start anew)"
        )
    return None


def restore_optimizer(
    checkpoint: Checkpoint, optimizer: Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Load a checkpoint's optimizer and, in fp16, scaler; the settings in ``APPLIED`` stay.

    Raises:
        UserError: They belong to other parameters.
    """
    given = [
        {key: group[key] for key in APPLIED if key in group} for group in optimizer.param_groups
    ]
    try:
        optimizer.load_state_dict(checkpoint.training["optimizer"])
        if scaler.is_enabled() and checkpoint.training.get("scaler"):
            scaler.load_state_dict(checkpoint.training["scaler"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint.path}: its optimizer is of another run ({error})") from error
    for group, values in zip(optimizer.param_groups, given, strict=True):
        group.update(values)


def log_changes(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Name the run options that differ from the checkpoint's; the new ones are used."""
    before, now = (
        comparable(flat({"run": {k: v for k, v in each["run"].items() if k not in PLACES}}))
        for each in (checkpoint.config or config, config)
    )
    for key, was, now_is in differences(before, now):
        logging.warning("%s was %s in %s, it is %s now", key, was, checkpoint.path, now_is)


def _require_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    for key, was, now_is in differences(_fixed(before), _fixed(now)):
        raise UserError(
            f"the run in {folder} had {key} = {was}, this one has {now_is}: set run.output_dir to "
            "another folder to start anew, or run.resume_ckpt_path to the file of a checkpoint to "
            "resume all the same"
        )


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values that must not change when a run resumes by itself, by dotted key.

    The model's include all its defaults, which not every version writes out.
    """
    model, run = config.get("model", {}), config.get("run", {})
    schema = getattr(registry.get_model_class(model.get("arch")), "OPTIONS", None)
    if schema is not None:
        model = asdict(read_options(schema, model))
        model.pop("sep_token", None)  # older versions did not record it; load_run compares it
    datasets = config.get("datasets", {})
    return flat({"model": model, "datasets": datasets, "run": {"seed": run.get("seed")}})


def _require_vocabulary(checkpoint: Checkpoint, model: nn.Module) -> None:
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is None or checkpoint.vocabulary is None:
        return
    own = vocabulary_of(tokenizer)
    for i, (was, now_is) in enumerate(zip_longest(checkpoint.vocabulary, own)):
        if was != now_is:
            raise UserError(
                f"{checkpoint.path} has another vocabulary than model.tokenizer: token {i} is "
                f"{was!r}, not {now_is!r}; name the run's vocab.txt"
            )


def _require_sep_token(checkpoint: Checkpoint, model: nn.Module) -> None:
    was = checkpoint.sep_token
    if isinstance(model, SoftMaskBase) and model.options.sep_token != was:
        raise UserError(
            f"{checkpoint.path} was trained on texts {'with' if was else 'without'} [SEP] at their "
            f"end: set model.sep_token={str(was).lower()}"
        )
