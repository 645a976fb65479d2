"""Weights in: checkpoints of this plugin and of ALBEF, and the encoders' own pre-training."""

from __future__ import annotations

import logging
import re
from collections import Counter

from lavis.models.vit import interpolate_pos_embed
from torch import Tensor, nn
from transformers.utils import cached_file

from softmask_plugin.errors import UserError
from softmask_plugin.files.tensors import StateDict, read_state_dict, require_sound
from softmask_plugin.models.layouts import adapt

BERT_FILES = ("pytorch_model.bin", "model.safetensors")
DEIT_URL = "https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth"


def load(model: nn.Module, url_or_filename: str, fusion_layer: int, trusted: bool = False) -> None:
    """Load a checkpoint of this plugin, of LAVIS's ALBEF or of the original ALBEF.

    Position embeddings are interpolated to the model's image size. Momentum encoders that the
    checkpoint lacks start from its online encoders. What did not match is logged in one line, a
    warning where tensors have another shape.

    Args:
        model: the model.
        url_or_filename: of the checkpoint, or ``shipped:NAME`` for one that comes with the package;
            see ``layouts`` for what it may look like.
        fusion_layer: the model's first text layer with cross-attention.
        trusted: whether the file may run code, see ``read_state_dict``.

    Raises:
        UserError: no such file, not a checkpoint, nothing in it fits the model, or a tensor that
            fits holds NaN or infinite values.
    """
    own = model.state_dict()
    state = adapt(read_state_dict(url_or_filename, trusted), own, fusion_layer)
    for key in [k for k in state if k.endswith("pos_embed") and k in own]:
        encoder = model.get_submodule(key.rpartition(".")[0])
        state[key] = _resized(state[key], encoder, f"{url_or_filename}: '{key}'")
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
    require_sound(fitting, url_or_filename)
    if "queue_ptr" in fitting:
        _require_position(int(fitting["queue_ptr"]), own["image_queue"], url_or_filename)
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


def initialise(model: nn.Module, vit: str | None, bert: str | None) -> None:
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
        encoder = model.get_submodule("visual_encoder")
        if "pos_embed" in state:
            where = f"{vit}: 'pos_embed'"
            state["pos_embed"] = _resized(state["pos_embed"], encoder, where)
        _load_matching(encoder, state, vit)
    if bert is not None:
        state = read_bert(bert)
        for name in ("text_encoder", "text_decoder"):
            if (text := getattr(model, name, None)) is not None:
                _load_matching(text, bert_keys(state, text), bert)


def read_bert(name: str) -> StateDict:
    """Read the tensors of a BERT under the keys of the hub's masked language model.

    The file is read here, not by transformers, whose older versions run code that it may hold.

    Args:
        name: of a model on the Hugging Face hub, or a local folder.

    Raises:
        UserError: there is no such model, or its file holds other objects than tensors.
    """
    try:
        cached_file(name, "config.json")  # if not even this is to be had, one wait is enough
        path = _first_file(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no BERT '{name}' (model.bert_weights) in a local folder, on the Hugging Face hub "
            "or in its cache: null starts from random weights"
        ) from error
    return {_modern(key): tensor for key, tensor in read_state_dict(path).items()}


def _first_file(name: str) -> str:
    first, second = BERT_FILES
    try:
        return str(cached_file(name, first))
    except (OSError, ValueError):
        return str(cached_file(name, second))


def _modern(key: str) -> str:
    """A key of BERT's first release, or of a BERT without its MLM head, as the hub has it now."""
    key = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", key))
    return key if key.startswith(("bert.", "cls.")) else f"bert.{key}"


def bert_keys(state: StateDict, encoder: nn.Module) -> StateDict:
    """A hub's BERT under the keys of an encoder with or without an MLM head."""
    if hasattr(encoder, "bert"):
        return state
    return {key.removeprefix("bert."): tensor for key, tensor in state.items()}


def _resized(embedding: Tensor, encoder: nn.Module, name: str) -> Tensor:
    try:
        return interpolate_pos_embed(embedding, encoder)
    except Exception as error:  # LAVIS looks at neither the shape nor the type
        raise UserError(
            f"{name} of shape {tuple(embedding.shape)} is of no square image: is it a checkpoint "
            "of a vision transformer?"
        ) from error


def _require_position(pointer: int, queue: Tensor, source: str) -> None:
    if not 0 <= pointer < max(1, queue.shape[1]):
        raise UserError(f"{source}: 'queue_ptr' is {pointer}, outside of its queue")


def _load_matching(module: nn.Module, state: StateDict, name: str) -> None:
    own = module.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    if not fitting:
        raise UserError(f"{name} has no tensor that fits the encoder it is for")
    require_sound(fitting, name)
    module.load_state_dict(fitting, strict=False)
    logging.info("%s: %d of %d tensors of the encoder", name, len(fitting), len(own))


def _listed(label: str, keys: set[str]) -> str:
    """The keys by the module that they belong to: ``cls_head (4), temp``."""
    modules = Counter(key.partition(".")[0] for key in sorted(keys))
    named = [f"{name} ({n})" if n > 1 else name for name, n in modules.items()]
    return label + ", ".join(named) if named else ""
