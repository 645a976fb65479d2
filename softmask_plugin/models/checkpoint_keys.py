"""Key layouts of checkpoints: what each of ALBEF's files calls what a model of ours has.

- ``ALBEF.pth`` and other pre-training, here and in LAVIS: ``text_encoder.bert.*`` and, for MLM,
  ``text_encoder.cls.*``; the original retrieval files as well.
- Fine-tuned by LAVIS or here: ``text_encoder.*``, and for VQA ``text_decoder.bert.*``.
- Fine-tuned by ALBEF's own code: as the second, where it has no MLM head.
- ALBEF's own files also have token types, which LAVIS drops and ``fold_token_types`` keeps.

Two models are made of parts of a pre-trained one: VQA's decoder starts as the fusion layers, and
the doubled fusion layers of NLVR2 as two copies of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from softmask_plugin.config.options import BertOptions
from softmask_plugin.errors import UserError
from softmask_plugin.files.checkpoint import TOKEN_TYPES, StateDict

POSITIONS = "embeddings.position_embeddings.weight"
SUFFIXES = ("", "_m")  # online and momentum
# Of DistributedDataParallel, around the whole, and of torch.compile, around any part
_WRAPPER = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
_LAYER = re.compile(r"^(text_encoder(?:_m)?\.encoder\.layer\.)(\d+)\.(.*)$")


def adapt(state: StateDict, own: Iterable[str], bert: BertOptions) -> StateDict:
    """Rename a checkpoint's tensors to a model's keys; those without a place keep their names.

    Args:
        state: The checkpoint's tensors, in any of the layouts above.
        own: The keys of the model.
        bert: The text encoder's options. A model with more layers has two for each fusion layer.
    """
    own, fusion_layer = list(own), bert.fusion_layer
    plain = {_plain(key): tensor for key, tensor in state.items()}
    if _depth(plain) == bert.layers < _depth(own):
        plain = _double_fusion(plain, fusion_layer)
    for suffix in SUFFIXES:
        encoder, decoder = f"text_encoder{suffix}.", f"text_decoder{suffix}."
        if _any(own, decoder) and not _any(plain, decoder):
            plain |= _decoder_of(plain, encoder, decoder, fusion_layer)
        if _any(own, f"{encoder}bert."):
            inner = re.compile(rf"^{re.escape(encoder)}(?!cls\.)")
            plain = {inner.sub(f"{encoder}bert.", key): each for key, each in plain.items()}
    return plain


def fold_token_types(state: StateDict, source: object) -> StateDict:
    """Add BERT's token type 0, which it gives to every token, to the position embeddings;
    UserError if the two have different widths."""
    folded = dict(state)
    for key in [key for key in state if key.endswith(TOKEN_TYPES)]:
        types, positions = folded.pop(key), key.removesuffix(TOKEN_TYPES) + POSITIONS
        if positions not in state:
            continue
        if types.ndim != 2 or len(types) == 0 or types.shape[1:] != state[positions].shape[1:]:
            raise UserError(
                f"{source}: '{key}' of shape {tuple(types.shape)} does not fit the position "
                f"embeddings of shape {tuple(state[positions].shape)}"
            )
        folded[positions] = state[positions] + types[0]
    return folded


def _plain(key: str) -> str:
    """Without what wrappers add and without the ``bert.`` of an encoder with an MLM head."""
    return re.sub(r"^(text_encoder(?:_m)?)\.bert\.", r"\1.", _WRAPPER.sub("", key))


def _any(keys: Iterable[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)


def _depth(keys: Iterable[str]) -> int:
    """How many layers the text encoder has."""
    matches = (_LAYER.match(_plain(key)) for key in keys)
    return 1 + max((int(match[2]) for match in matches if match), default=-1)


def _double_fusion(state: StateDict, fusion_layer: int) -> StateDict:
    doubled = dict(state)
    for key, tensor in state.items():
        if (match := _LAYER.match(key)) and (layer := int(match[2])) >= fusion_layer:
            for copy in (2 * layer - fusion_layer, 2 * layer - fusion_layer + 1):
                doubled[f"{match[1]}{copy}.{match[3]}"] = tensor
    return doubled


def _decoder_of(state: StateDict, encoder: str, decoder: str, fusion_layer: int) -> StateDict:
    """A decoder's tensors from the fusion layers, embeddings and MLM head of an encoder."""
    made = {}
    for key, tensor in state.items():
        if not key.startswith(encoder):
            continue
        rest = key.removeprefix(encoder)
        if rest.startswith("cls."):
            made[decoder + rest] = tensor
        elif (match := _LAYER.match(key)) is None:
            made[f"{decoder}bert.{rest}"] = tensor
        elif int(match[2]) >= fusion_layer:
            layer = int(match[2]) - fusion_layer
            made[f"{decoder}bert.encoder.layer.{layer}.{match[3]}"] = tensor
    return made
