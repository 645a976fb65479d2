"""Pretrained weights of timm backbones: match the tensors of a file to those of the model."""

from __future__ import annotations

import logging

import timm

from softmask_plugin.errors import UserError
from softmask_plugin.files.checkpoint import StateDict, require_sound
from softmask_plugin.nn.hybrid import HybridEmbed

_UNUSED = "num_batches_tracked"  # the norms keep their statistics, and older files lack it


def load_backbone(embed: HybridEmbed, state: StateDict, source: str) -> None:
    """Load a file's weights into the backbone; one line of the log lists those it does not use.

    Tensors are matched by timm's names or, where other code named them, by order: each must then
    have the shape and the kind (weight, bias, running mean or variance) of timm's. Either way each
    tensor of the file must be one of the whole model, and each of the backbone must be in the file.

    Args:
        embed: The patches of a hybrid ViT.
        state: The file's tensors.
        source: The file, for messages.

    Raises:
        UserError: The file is of another model, or holds NaN or infinite values.
    """
    backbone, name = embed.backbone, embed.backbone_name
    whole = _plain(timm.create_model(name).state_dict())
    given = _plain(state)
    if not given.keys() <= whole.keys():
        given = _by_order(given, whole, name, source)
    own = {key: tensor for key, tensor in backbone.state_dict().items() if _UNUSED not in key}
    found = {key: given[_flat(key)] for key in own if _flat(key) in given}
    for key, tensor in own.items():
        if key not in found or found[key].shape != tensor.shape:
            has = tuple(found[key].shape) if key in found else "none"
            raise _misfit(source, name, f"'{key}' is {has} in the file, not {tuple(tensor.shape)}")
    require_sound(found, source)
    backbone.load_state_dict(found, strict=False)
    unused = sorted(given.keys() - {_flat(key) for key in found})
    logging.info(
        "%s: all %d tensors of %s%s",
        source,
        len(found),
        name,
        f"; not used: {', '.join(unused)}" if unused else "",
    )


def _flat(key: str) -> str:
    """A name that is the same in the whole model and in its ``features_only`` form, in which some
    dots are underscores."""
    return key.replace(".", "_")


def _plain(state: StateDict) -> StateDict:
    return {_flat(key): tensor for key, tensor in state.items() if _UNUSED not in key}


def _by_order(given: StateDict, whole: StateDict, name: str, source: str) -> StateDict:
    if len(given) != len(whole):
        raise _misfit(source, name, f"it has {len(given)} tensors, not {len(whole)}")
    for (key, tensor), (own, wanted) in zip(given.items(), whole.items(), strict=True):
        kind, other = (each.rpartition("_")[2] for each in (key, own))
        if tensor.shape != wanted.shape or kind != other:
            shapes = tuple(tensor.shape), tuple(wanted.shape)
            raise _misfit(source, name, f"'{key}' {shapes[0]} stands for '{own}' {shapes[1]}")
    return dict(zip(whole, given.values(), strict=True))


def _misfit(source: str, name: str, why: str) -> UserError:
    return UserError(
        f"{source} is of another model than model.vit.backbone '{name}': {why}; set "
        "model.vit_weights to weights of this model"
    )
