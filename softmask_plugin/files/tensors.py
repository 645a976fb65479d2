"""Tensors of a checkpoint, loaded without running code that the file may hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from lavis.common.utils import is_url
from safetensors.torch import load_file
from torch import Tensor

from softmask_plugin.config.paths import PACKAGE
from softmask_plugin.errors import UserError, suggest
from softmask_plugin.files.download import fetch

StateDict = dict[str, Tensor]
ASSETS = PACKAGE / "assets"
SHIPPED = "shipped:"  # before the name of weights that come with the package


def read_state_dict(url_or_filename: str, trusted: bool = False) -> StateDict:
    """Read the tensors of a checkpoint, without running code that it may hold.

    Args:
        url_or_filename: a file, a URL that is downloaded once, or ``shipped:NAME``.
        trusted: read any pickled object, which can run any code; for files of your own only.

    Raises:
        UserError: no such file, or the file is no checkpoint of tensors.
    """
    path = _located(url_or_filename)
    if not path.is_file():
        raise UserError(f"no checkpoint at {url_or_filename}: give a file or a URL")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=not trusted)
    except Exception as error:  # the unpickler raises nearly anything for a file of another kind
        raise UserError(
            f"{path} is no readable checkpoint ({type(error).__name__}): it is cut short, of "
            "another kind, or holds objects other than tensors, which could run code (only for a "
            "file that you trust: model.trust_checkpoint=true)"
        ) from error
    state = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else {}
    if not isinstance(state, dict):
        state = {}
    return {
        key: value
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }


def _located(url_or_filename: str) -> Path:
    """The file of a checkpoint, which need not be there unless it was shipped or downloaded."""
    if is_url(url_or_filename):
        return fetch(url_or_filename)
    if not url_or_filename.startswith(SHIPPED):
        return Path(url_or_filename)
    name, files = url_or_filename.removeprefix(SHIPPED), ASSETS.glob("*.safetensors")
    shipped = {file.stem: file for file in files}
    if name not in shipped:
        raise UserError(f"no weights '{name}' are shipped: {suggest(name, shipped)}")
    return shipped[name]


def _read_safetensors(path: Path) -> StateDict:
    """Read a file of a format that knows tensors only."""
    try:
        return load_file(path)
    except Exception as error:
        raise UserError(
            f"{path} is no readable checkpoint ({type(error).__name__}): it is cut short or of "
            "another kind"
        ) from error


def require_sound(state: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError at a tensor that would poison whatever is computed from it."""
    for name, tensor in state.items():
        special = tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized
        if special or tensor.is_complex():
            raise UserError(f"{source}: '{name}' is no plain tensor of real numbers")
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{source}: '{name}' holds NaN or infinite values: take an earlier checkpoint"
            )
