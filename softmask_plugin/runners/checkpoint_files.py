"""The checkpoints of a run's folder: what goes into them, and when they are written and removed."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softmask_plugin.errors import UserError, reason_of
from softmask_plugin.files.checkpoint import BEST, StateDict, furthest_first, require_sound
from softmask_plugin.files.whole import LEFTOVERS, write_whole


def trained_state(model: nn.Module) -> StateDict:
    """Return the state of a model without frozen parameters, which LAVIS leaves out as well."""
    frozen = _frozen(model)
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def load_trained_state(model: nn.Module, state: StateDict, source: object) -> None:
    """Load the result of :func:`trained_state`; only frozen parameters may be missing.

    UserError, with the name of ``source``, if keys are missing or unexpected, shapes differ, or
    numbers are not finite. The model then stays as it was.
    """
    own, frozen = model.state_dict(), _frozen(model)
    for what, names in (
        ("lacks", own.keys() - state.keys() - frozen),
        ("has unknown", state.keys() - own.keys()),
    ):
        if names:
            raise UserError(
                f"{source} is of another model: it {what} {len(names)} weights, first "
                f"'{min(names)}'"
            )
    for name, value in state.items():
        if value.shape != own[name].shape:
            shapes = f"{tuple(value.shape)}, not {tuple(own[name].shape)}"
            raise UserError(f"{source} is of another model: '{name}' is {shapes}")
    require_sound(state, source)
    model.load_state_dict(state, strict=False)


class CheckpointFiles:
    """The checkpoints of a run's folder, under LAVIS's names.

    ``checkpoint_<epoch>.pth`` after an epoch, ``checkpoint_<epoch>_<step>.pth`` within one (the
    step counts over the whole run), and ``checkpoint_best.pth``.

    Args:
        folder: The run's folder.
        keep: Number of checkpoints to keep besides the best; None: all.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        self.folder, self.keep = folder, keep

    def save(self, content: dict[str, Any], epoch: int, step: int | None, is_best: bool) -> None:
        """Write a checkpoint, also as the best one if it is; then remove those beyond ``keep``.

        The best one comes first: a run killed in between repeats the epoch and writes it again.
        UserError if the file cannot be written; earlier checkpoints then stay as they were.
        """
        path = self.folder / f"checkpoint_{epoch}{'' if step is None else f'_{step}'}.pth"
        try:
            for half in self.folder.glob(LEFTOVERS):  # of a process that was killed
                half.unlink()
            first = self.folder / BEST if is_best else path
            write_whole(first, lambda temporary: torch.save(content, temporary))
            if is_best:
                write_whole(path, lambda temporary: _link(first, temporary))
            for old in furthest_first(self.folder)[self.keep :] if self.keep else ():
                old.unlink()
        except (OSError, RuntimeError) as error:  # a full disk: torch's writer raises the latter
            last = next((str(file) for file in furthest_first(self.folder)), "none")
            raise UserError(
                f"cannot save {path} ({reason_of(error)[:200]}): make room, then resume with "
                f"run.resume_ckpt_path=auto; the last whole checkpoint: {last}"
            ) from error
        logging.info("saved %s", path)

    def take_best_from(self, folder: Path) -> bool:
        """Copy the best checkpoint of another run; False if it has none."""
        if not (folder / BEST).is_file():
            return False
        write_whole(self.folder / BEST, lambda temporary: _link(folder / BEST, temporary))
        return True


def _link(source: Path, path: Path) -> None:
    """Hard-link a file; copy it if the file system has no links."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


def _frozen(model: nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if not value.requires_grad}
