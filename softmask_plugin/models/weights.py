"""Load weights: checkpoints of this plugin, ALBEF or BLIP, or pretrained encoders to start from."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lavis.models.vit import interpolate_pos_embed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import cached_file

from softmask_plugin.config.options import BertOptions
from softmask_plugin.errors import UserError
from softmask_plugin.files.checkpoint import Checkpoint, StateDict, open_checkpoint, require_sound
from softmask_plugin.files.download import from_hub
from softmask_plugin.files.packages import PACKAGED, packaged_file
from softmask_plugin.models.backbones import load_backbone
from softmask_plugin.models.checkpoint_keys import adapt, fold_token_types
from softmask_plugin.nn.hybrid import HybridEmbed

BERT_FILES = ("pytorch_model.bin", "model.safetensors")
# Tensors of the encoders, without the MLM head and the position ids, which are no weights
_ENCODER = re.compile(r"(visual_encoder|text_(en|de)coder)(_m)?\.(?!cls\.)(?!.*position_ids$)")
_LAYER = re.compile(r"\.layer\.|^visual_encoder(_m)?\.blocks\.")
_NUMBER = re.compile(r"(.*\.layer\.)(\d+)(\..*)")
_SMALL = 10_000  # weights that a tensor counts for beside its own: modules take memory too
DEIT_URL = "https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth"


class BoundedBy(TorchDispatchMode):
    """Context in which models are built: UserError before one is far larger than its checkpoint.

    Args:
        path: The checkpoint. It must hold the encoders, so a model has at most as many weights as
            the file has bytes, twice that with momentum encoders, and 64 million in queues, heads
            and positions.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._left = path, 2 * path.stat().st_size + 2**26

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        size = args[0] if args else None  # of torch.empty and the like, or torch.arange's end
        size = size if isinstance(size, (list, tuple)) else [size]
        if all(isinstance(side, int) for side in size):
            self._left -= math.prod(size) + _SMALL
            if self._left < 0:
                raise UserError(
                    f"{self._path} does not fit the model, which would be far larger: set "
                    "model.vit and model.bert as they were when it was trained (only for a file "
                    "that you trust: model.trust_checkpoint=true)"
                )
        return func(*args, **(kwargs or {}))


def load(model: nn.Module, checkpoint: Checkpoint, bert: BertOptions) -> set[str]:
    """Load a checkpoint of this plugin, of LAVIS's ALBEF or BLIP, or of the original ones.

    Position embeddings are interpolated to the model's image size. Momentum encoders that the
    checkpoint lacks start from its online encoders. The encoders must fit. Heads and queues may
    differ: one line of the log lists the differences, as a warning if shapes differ.

    Args:
        model: The model.
        checkpoint: Its keys may have any layout of ``checkpoint_keys``.
        bert: Options of the model's text encoder.

    Returns:
        Keys of the model's tensors that it left as they were.

    Raises:
        UserError: Nothing in the checkpoint fits the model, its encoders have another shape, or a
            tensor that fits holds NaN or infinite values.
    """
    own, source = model.state_dict(), checkpoint.path
    state = adapt(fold_token_types(checkpoint.state, source), own, bert)
    for key in [k for k in state if k.endswith("pos_embed") and k in own]:
        encoder = model.get_submodule(key.rpartition(".")[0])
        state[key] = _resized(state[key], encoder, f"{source}: '{key}'")
    for momentum in own.keys() - state.keys():
        online = momentum.replace("_m.", ".", 1)
        if online != momentum and online in state:
            state[momentum] = state[online]
    state.pop("idx_queue", None)  # other data sets number other images alike
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    if "image_queue" not in fitting:  # a position in a queue of another size means nothing here
        fitting.pop("queue_ptr", None)
    if not fitting:
        raise UserError(f"{source} has no tensor that fits this model: is it a checkpoint?")
    # A decoder that is made of a pretrained encoder may look at states of another width
    has_decoder = any("text_decoder" in key for key in checkpoint.state)
    fixed = {k: v for k, v in own.items() if has_decoder or not k.startswith("text_decoder")}
    _require_encoders(state, fixed, source)
    require_sound(fitting, source)
    if "queue_ptr" in fitting:
        pointer, size = int(fitting["queue_ptr"]), own["image_queue"].shape[1]
        if not 0 <= pointer < max(1, size):
            raise UserError(f"{source}: 'queue_ptr' is {pointer}, outside of its queue")
    model.load_state_dict(fitting, strict=False)
    left, other = own.keys() - fitting.keys(), (state.keys() & own.keys()) - fitting.keys()
    logging.log(
        logging.WARNING if other else logging.INFO,
        "loaded %d of %d tensors from %s%s%s%s",
        len(fitting),
        len(own),
        source,
        _listed("; left as they were: ", left),
        _listed("; other shape: ", other),
        _listed("; not used: ", state.keys() - own.keys()),
    )
    return left


def _require_encoders(state: StateDict, own: StateDict, source: object) -> None:
    """Raise UserError where an encoder would keep random weights or lose trained ones."""
    ours, theirs = ({k for k in keys if _ENCODER.match(k)} for keys in (own, state))
    mine = {key.partition(".")[0] for key in ours}
    layers = {k for k in theirs if k.partition(".")[0] in mine and _LAYER.search(k)}
    for key in sorted(ours | layers):
        given, wanted = (str(tuple(d[key].shape)) if key in d else "none" for d in (state, own))
        if given != wanted:
            raise UserError(
                f"{source} does not fit the model's encoders: '{key}' is {given} in the file, "
                f"{wanted} in the model: set model.vit, model.bert and model.tokenizer as they "
                "were when it was trained"
            )


def initialise(model: Any, vit: str | None, bert: str | None) -> None:
    """Start the encoders from pretrained weights, as ALBEF does.

    Args:
        model: The model.
        vit: ``deit`` (downloaded), ``package:NAME``, or the path or URL of a checkpoint of a ViT
            or, if the image encoder has one, of its backbone; None: random weights.
        bert: Name or folder of a BERT, or ``package:NAME``; None: random weights. If it has fewer
            layers than the model, the others start as copies of its last ones.

    Raises:
        UserError: The weights are not available, or those of another model.
    """
    if vit is not None:
        _initialise_vision(model.get_submodule("visual_encoder"), vit)
    if bert is not None:
        state = deepen(open_bert(bert), model.options.bert.layers)
        for name in ("text_encoder", "text_decoder"):
            if hasattr(model, name):
                _initialise_text(model, name, state, bert)


def _initialise_vision(encoder: Any, source: str) -> None:
    state = open_checkpoint(DEIT_URL if source == "deit" else source).state
    if isinstance(encoder.patch_embed, HybridEmbed):
        load_backbone(encoder.patch_embed, state, source)
        return
    if "pos_embed" in state:
        where = f"{source}: 'pos_embed'"
        state["pos_embed"] = _resized(state["pos_embed"], encoder, where)
    _load_matching(encoder, state, source)


def _initialise_text(model: Any, name: str, state: StateDict, source: str) -> None:
    encoder, prefix = model.get_submodule(name), f"{name}."
    own = {prefix + key: tensor for key, tensor in encoder.state_dict().items()}
    state = {prefix + key: tensor for key, tensor in state.items()}
    state = adapt(state, own, model.options.bert)
    added = len(model.tokenizer) - model.tokenizer.vocab_size  # tokens that a BERT lacks
    for key, tensor in state.items():
        if not added or not tensor.ndim or key not in own:
            continue
        if own[key].shape == (len(tensor) + added, *tensor.shape[1:]):
            state[key] = torch.cat([tensor, own[key][-added:]])
    state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    _load_matching(encoder, state, source)


def deepen(state: StateDict, layers: int) -> StateDict:
    """Let layers that a BERT lacks start as copies of its last ones, in their order."""
    numbered = [(_NUMBER.fullmatch(key), tensor) for key, tensor in state.items()]
    depth = 1 + max((int(match[2]) for match, _ in numbered if match), default=-1)
    deeper = dict(state)
    for match, tensor in numbered:
        if match:
            for layer in range(layers - depth + int(match[2]), depth - 1, -depth):
                deeper[f"{match[1]}{layer}{match[3]}"] = tensor
    return deeper


def open_bert(name: str) -> StateDict:
    """Open a BERT; its tensors get the keys of the hub's masked language model, and the position
    embeddings include the token type.

    transformers does not open the file, since its older versions run code that it may hold.

    Args:
        name: A model on the Hugging Face hub, a local folder, or ``package:NAME``.

    Raises:
        UserError: There is no such model, or its file holds objects other than tensors.
    """
    path = packaged_file(name, *BERT_FILES) if name.startswith(PACKAGED) else _from_hub(name)
    state = {_modern(key): tensor for key, tensor in open_checkpoint(path).state.items()}
    return fold_token_types(state, path)


def _from_hub(name: str) -> str:
    what = f"no BERT '{name}' (model.bert_weights)"
    try:
        return str(from_hub(what, name, _first_file))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{what} in a local folder, on the Hugging Face hub or in its cache: null starts from "
            "random weights"
        ) from error


def _first_file(name: str, **options: bool) -> str:
    first, second = BERT_FILES
    try:
        return str(cached_file(name, first, **options))
    except (OSError, ValueError):
        return str(cached_file(name, second, **options))


def _modern(key: str) -> str:
    """Today's name of a key from BERT's first release, or from a BERT without an MLM head."""
    key = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", key))
    return key if key.startswith(("bert.", "cls.")) else f"bert.{key}"


def _resized(embedding: Tensor, encoder: nn.Module, name: str) -> Tensor:
    try:
        return interpolate_pos_embed(embedding, encoder)
    except Exception as error:  # LAVIS looks at neither the shape nor the type
        raise UserError(
            f"{name} of shape {tuple(embedding.shape)} is of no square image: is it a checkpoint "
            "of a vision transformer?"
        ) from error


def _load_matching(module: nn.Module, state: StateDict, name: str) -> None:
    own = module.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and not k.endswith("position_ids")}
    if not fitting:
        raise UserError(f"{name} has no tensor that fits the encoder it is for")
    for key, tensor in fitting.items():
        if tensor.shape != own[key].shape:
            raise UserError(
                f"{name}: '{key}' is {tuple(tensor.shape)} in the file, {tuple(own[key].shape)} in "
                "the model: set model.vit, model.bert and model.tokenizer as the file has them"
            )
    require_sound(fitting, name)
    module.load_state_dict(fitting, strict=False)
    logging.info(
        "%s: %d of %d tensors of the encoder%s%s",
        name,
        len(fitting),
        len(own),
        _listed("; new: ", {k.removeprefix("bert.") for k in own.keys() - state.keys()}),
        _listed("; not used: ", {k.removeprefix("bert.") for k in state.keys() - own.keys()}),
    )


def _listed(label: str, keys: set[str]) -> str:
    """Count keys by module: ``cls_head (4), temp``."""
    modules = Counter(key.partition(".")[0] for key in sorted(keys))
    named = [f"{name} ({n})" if n > 1 else name for name, n in modules.items()]
    return label + ", ".join(named) if named else ""
