"""Weights in: checkpoints of this plugin and of ALBEF, and the encoders' own pre-training."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lavis.common.utils import is_url
from lavis.models.vit import interpolate_pos_embed
from torch import Tensor, nn
from transformers import BertForMaskedLM

from softmask_plugin.download import fetch
from softmask_plugin.errors import UserError
from softmask_plugin.models.layouts import StateDict, adapt

if TYPE_CHECKING:
    from softmask_plugin.models.base import SoftMaskBase

DEIT_URL = "https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth"


def load(model: SoftMaskBase, url_or_filename: str, trusted: bool = False) -> None:
    """Load a checkpoint of this plugin, of LAVIS's ALBEF or of the original ALBEF.

    Position embeddings are interpolated to the model's image size. Momentum encoders that the
    checkpoint lacks start from its online encoders. What did not match is logged in one line, a
    warning where tensors have another shape.

    Args:
        model: the model.
        url_or_filename: of the checkpoint; see ``layouts`` for what it may look like.
        trusted: whether the file may run code, see ``read_state_dict``.

    Raises:
        UserError: no such file, not a checkpoint, or nothing in it fits the model.
    """
    own = model.state_dict()
    state = adapt(read_state_dict(url_or_filename, trusted), own, model.bert.shape.fusion_layer)
    for key in [k for k in state if k.endswith("pos_embed") and k in own]:
        state[key] = interpolate_pos_embed(state[key], model.get_submodule(key.rpartition(".")[0]))
    for momentum in own.keys() - state.keys():
        online = momentum.replace("_m.", ".", 1)
        if online != momentum and online in state:
            state[momentum] = state[online]
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    if "image_queue" not in fitting:  # a position in a queue of another size means nothing here
        fitting.pop("queue_ptr", None)
    if not fitting:
        raise UserError(
            f"{url_or_filename} has no tensor that fits this model: is it a checkpoint?"
        )
    model.load_state_dict(fitting, strict=False)
    other = (state.keys() & own.keys()) - fitting.keys()
    logging.log(
        logging.WARNING if other else logging.INFO,
        "loaded %d of %d tensors from %s%s%s%s",
        len(fitting),
        len(own),
        url_or_filename,
        _listed("; left as they were: ", own.keys() - fitting.keys()),
        _listed("; other shape: ", other),
        _listed("; not used: ", state.keys() - own.keys()),
    )


def read_state_dict(url_or_filename: str, trusted: bool = False) -> StateDict:
    """Read the tensors of a checkpoint, without running code that it may hold.

    Args:
        url_or_filename: a file, or a URL that is downloaded once.
        trusted: read any pickled object, which can run any code; for files of your own only.

    Raises:
        UserError: no such file, or the file is no checkpoint of tensors.
    """
    path = fetch(url_or_filename) if is_url(url_or_filename) else Path(url_or_filename)
    if not path.is_file():
        raise UserError(f"no checkpoint at {url_or_filename}: give a file or a URL")
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
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def initialise(model: SoftMaskBase, vit: str | None, bert: str | None) -> None:
    """Start the encoders from their own pre-training, as ALBEF does.

    Args:
        model: the model.
        vit: ``deit`` (downloaded) or a checkpoint of a ViT, path or URL; None leaves it random.
        bert: name or folder of a BERT; None leaves it random.

    Raises:
        UserError: the weights cannot be had.
    """
    if vit is not None:
        state = read_state_dict(DEIT_URL if vit == "deit" else vit)
        if "pos_embed" in state:
            state["pos_embed"] = interpolate_pos_embed(state["pos_embed"], model.visual_encoder)
        _load_matching(model.visual_encoder, state, vit)
    if bert is not None:
        try:
            pretrained = BertForMaskedLM.from_pretrained(bert)
        except (OSError, ValueError) as error:
            raise UserError(
                f"no BERT '{bert}' (model.bert_weights) in a local folder, on the Hugging Face hub "
                "or in its cache: null starts from random weights"
            ) from error
        for name in ("text_encoder", "text_decoder"):
            if (encoder := getattr(model, name, None)) is not None:
                _load_matching(encoder, bert_keys(pretrained.state_dict(), encoder), bert)


def bert_keys(state: StateDict, encoder: nn.Module) -> StateDict:
    """A hub's BERT under the keys of an encoder with or without an MLM head."""
    if hasattr(encoder, "bert"):
        return state
    return {key.removeprefix("bert."): tensor for key, tensor in state.items()}


def _load_matching(module: nn.Module, state: StateDict, name: str) -> None:
    own = module.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    if not fitting:
        raise UserError(f"{name} has no tensor that fits the encoder it is for")
    module.load_state_dict(fitting, strict=False)
    logging.info("%s: %d of %d tensors of the encoder", name, len(fitting), len(own))


def _listed(label: str, keys: set[str]) -> str:
    """The keys by the module that they belong to: ``cls_head (4), temp``."""
    modules = Counter(key.partition(".")[0] for key in sorted(keys))
    named = [f"{name} ({n})" if n > 1 else name for name, n in modules.items()]
    return label + ", ".join(named) if named else ""
