"""Checkpoint files: written whole or not at all, read without running code."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softmask_plugin.errors import UserError


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """State of ``model`` less its frozen parameters, which LAVIS leaves out of checkpoints too."""
    frozen = _frozen(model)
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def load_trained_state(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load what :func:`trained_state` gave; only frozen parameters may be missing.

    Raises:
        UserError: keys are missing, unexpected or of another shape; ``source`` is named.
    """
    try:
        keys = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # torch's message lists every key; the first shows the point
        detail = str(error).splitlines()[1].strip()
        raise UserError(f"{source} is of another model: {detail}") from error
    missing = sorted(set(keys.missing_keys) - _frozen(model))
    for what, names in ("lacks", missing), ("has unknown", keys.unexpected_keys):
        if names:
            raise UserError(
                f"{source} is of another model: it {what} {len(names)} weights, first '{names[0]}'"
            )


def save(content: dict[str, Any], path: Path) -> None:
    """Write ``content`` to ``path`` by way of a temporary file, so that a kill leaves no half."""
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)
    logging.info("saved %s", path)


def load(path: str | Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint of this runner or LAVIS's: model, optimizer, scaler, config, epoch.

    Raises:
        UserError: no such file, a damaged one, one that could run code, or another kind of file.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint at {path}: give the path of a checkpoint_<epoch>.pth file")
    try:
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


def _frozen(model: nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if not value.requires_grad}
