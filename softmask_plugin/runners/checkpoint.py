"""Checkpoint files: written whole or not at all, read without running code, checked before use."""

from __future__ import annotations

import logging
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softmask_plugin.errors import UserError, reason_of
from softmask_plugin.files.tensors import require_sound
from softmask_plugin.files.whole import LEFTOVERS, write_whole

BEST = "best"
_NAME = re.compile(r"checkpoint_(\d+)(?:_(\d+))?\.pth")


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """State of ``model`` less its frozen parameters, which LAVIS leaves out of checkpoints too."""
    frozen = _frozen(model)
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def load_trained_state(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load what :func:`trained_state` gave; only frozen parameters may be missing.

    Raises:
        UserError: keys are missing, unexpected, of another shape, or hold numbers that are not
            finite; ``source`` is named, and the model is as it was.
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

    ``checkpoint_<epoch>.pth`` after an epoch, ``checkpoint_<epoch>_<step>.pth`` within one (after
    so many optimizer steps of the run), ``checkpoint_best.pth``.

    Args:
        folder: the run's folder.
        keep: how many to keep beside the best one; None: all.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        self.folder, self.keep = folder, keep

    def save(self, content: dict[str, Any], epoch: int, step: int | None, is_best: bool) -> None:
        """Write a checkpoint, as the best one too if it is; then remove those beyond ``keep``.

        The best one first: a run that is killed in between comes to it again.

        Raises:
            UserError: it cannot be written. What was there before stays as it was.
        """
        path = self.folder / _name(epoch, step)
        try:
            self._remove_leftovers()
            if is_best:
                best = self.folder / f"checkpoint_{BEST}.pth"
                write_whole(best, lambda temporary: _serialize(content, temporary))
                write_whole(path, lambda temporary: _link(best, temporary))
            else:
                write_whole(path, lambda temporary: _serialize(content, temporary))
            for old in self.newest_first()[self.keep :] if self.keep else ():
                old.unlink()
        except (OSError, RuntimeError) as error:  # a full disk: torch's writer raises the latter
            last = next((str(file) for file in self.newest_first()), "none")
            raise UserError(
                f"cannot save {path} ({reason_of(error)[:200]}): make room, then go on with "
                f"run.resume_ckpt_path=auto; the last whole checkpoint: {last}"
            ) from error
        logging.info("saved %s", path)

    def newest_first(self) -> list[Path]:
        """Files of all checkpoints but the best, the furthest one first."""
        found = []
        for path in self.folder.glob("checkpoint_*.pth"):
            if match := _NAME.fullmatch(path.name):
                epoch, step = int(match[1]), match[2]
                # A file of the whole epoch comes after those within it.
                found.append(((epoch, int(step)) if step else (epoch + 1, -1), path))
        return [path for _, path in sorted(found, reverse=True)]

    def take_best_from(self, folder: Path) -> bool:
        """Copy the best checkpoint of another run's folder; False if it has none."""
        name = f"checkpoint_{BEST}.pth"
        if not (folder / name).is_file():
            return False
        write_whole(self.folder / name, lambda temporary: _link(folder / name, temporary))
        return True

    def _remove_leftovers(self) -> None:
        for half in self.folder.glob(LEFTOVERS):  # of a process that was killed
            half.unlink()


def load(path: str | Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint of this runner or LAVIS's: model, optimizer, scaler, config, epoch.

    Raises:
        UserError: no such file, a damaged one, one that could run code, or another kind of file.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}: give the path of a checkpoint_<epoch>.pth file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not compare checksums when it reads
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # on a damaged file the unpickler fails in any way it can
        raise UserError(
            f"{path} cannot be read: it is damaged, or holds objects that could run code when "
            "loaded; a checkpoint holds tensors and plain values only"
        ) from error
    expected = ("model", "optimizer", "epoch")
    if not (isinstance(content, dict) and all(key in content for key in expected)):
        raise UserError(
            f"{path} is no training checkpoint (it needs {', '.join(expected)}): to start from "
            "weights alone, set model.pretrained instead"
        )
    return content


def _name(epoch: int, step: int | None) -> str:
    return f"checkpoint_{epoch}.pth" if step is None else f"checkpoint_{epoch}_{step}.pth"


def _serialize(content: dict[str, Any], path: Path) -> None:
    torch.save(content, path)


def _link(source: Path, path: Path) -> None:
    """A second name for a file, or where the file system has none, a copy."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


def _frozen(model: nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if not value.requires_grad}
