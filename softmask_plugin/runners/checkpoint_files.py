"""The checkpoints of a run's folder: what goes into them, and when they are written and removed."""

from __future__ import annotations

import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from lavis.datasets.data_utils import apply_to_sample
from torch import Tensor, nn

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
    step counts over the whole run), and ``checkpoint_best.pth``. A thread writes them, one at a
    time, from a copy in the host's memory.

    Args:
        folder: The run's folder.
        keep: Number of checkpoints to keep besides the best; None: all.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        self.folder, self.keep = folder, keep
        self._written: Future[None] | None = None

    def save(self, content: dict[str, Any], epoch: int, step: int | None, is_best: bool) -> None:
        """Copy a checkpoint, and begin to write it, also as the best one if it is; then those
        beyond ``keep`` are removed. Waits for the one before, as :meth:`finish` does.

        The best one comes first: a run killed in between repeats the epoch and writes it again.
        """
        self.finish()
        path = self._path(epoch, step)
        thread = ThreadPoolExecutor(1)
        self._written = thread.submit(self._write, _in_memory(content), path, is_best)
        thread.shutdown(wait=False)

    def continue_from(self, path: Path, epoch: int, step: int | None) -> None:
        """Give the checkpoint from which the run resumes the name that :meth:`save` would give it
        now, so that no other passes for a further one.

        Those that cannot be used end in ``.refused`` from then on. Those that have higher numbers
        only because a step had fewer items are removed.
        """
        order = furthest_first(self.folder)
        named = path if step is None else self._path(epoch, step)
        for refused in order[: order.index(path)]:
            refused.rename(refused.with_name(f"{refused.name}.refused"))
        path.replace(named)
        for older in takewhile(lambda file: file != named, furthest_first(self.folder)):
            older.unlink()

    def _path(self, epoch: int, step: int | None) -> Path:
        return self.folder / f"checkpoint_{epoch}{'' if step is None else f'_{step}'}.pth"

    def finish(self) -> None:
        """Wait until the last checkpoint is written; UserError if it cannot be, from then on each
        time. Earlier ones then stay as they were."""
        if self._written is not None:
            self._written.result()

    def _write(self, content: dict[str, Any], path: Path, is_best: bool) -> None:
        try:
            for half in self.folder.glob(LEFTOVERS):  # of a process that was killed
                half.unlink()
            first = self.folder / BEST if is_best else path
            write_whole(first, lambda temporary: torch.save(content, temporary))
            if is_best:
                write_whole(path, lambda temporary: link(first, temporary))
            for old in furthest_first(self.folder)[self.keep :] if self.keep else ():
                old.unlink()
        except (OSError, RuntimeError) as error:  # a full disk: torch's writer raises the latter
            last = next((str(file) for file in furthest_first(self.folder)), "none")
            raise UserError(
                f"cannot save {path} ({reason_of(error)[:200]}): make room, then resume with "
                f"run.resume_ckpt_path=auto; the last whole checkpoint: {last}"
            ) from error
        logging.info("saved %s", path)


def _in_memory(content: dict[str, Any]) -> dict[str, Any]:
    """Copy the tensors to the host's memory; those that share theirs (tied weights) still do."""
    copies: dict[Any, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        place = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True)
        return copies[place]

    copied: dict[str, Any] = apply_to_sample(copy, content)
    return copied


def link(source: Path, path: Path) -> None:
    """Hard-link a file; copy it if the file system has no links."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


def _frozen(model: nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if not value.requires_grad}
