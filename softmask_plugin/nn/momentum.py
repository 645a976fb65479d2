"""Momentum encoders: moving averages of online modules (ALBEF, arXiv 2107.07651, 3.2)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
_FROZEN = "is_frozen"


def momentum_copy(online: Module) -> Module:
    """Copy ``online``, with buffers under the same names in place of its parameters.

    Frozen modules, see :func:`freeze`, are shared: they have nothing to average.
    """
    shared = {id(each): each for each in online.modules() if is_frozen(each)}
    momentum = copy.deepcopy(online, shared)
    _parameters_to_buffers(momentum)
    return momentum


def freeze(module: nn.Module) -> None:
    """Make buffers of a module's parameters, in place, so that it never changes."""
    setattr(module, _FROZEN, True)
    _parameters_to_buffers(module)


def is_frozen(module: nn.Module) -> bool:
    """Whether a module itself, not one around it, was given to :func:`freeze`."""
    return getattr(module, _FROZEN, False)


def _parameters_to_buffers(module: nn.Module) -> None:
    """Buffers take no part in gradients, optimizers and gradient exchange. LAVIS's runner saves
    them; it drops frozen parameters from its checkpoints."""
    buffers: dict[int, Tensor] = {}  # tied parameters stay tied
    for each in module.modules():
        for name, parameter in list(each.named_parameters(recurse=False, remove_duplicate=False)):
            delattr(each, name)
            each.register_buffer(name, buffers.setdefault(id(parameter), parameter.detach()))


class MomentumPairs:
    """Online parameters and their momentum buffers, updated in one fused operation."""

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        self.pairs = list(pairs)

    def restart(self) -> None:
        """momentum = online, buffers included."""
        for online, momentum in self.pairs:
            momentum.load_state_dict(online.state_dict())

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """momentum = rate * momentum + (1 - rate) * online; exactly online at a rate of 0."""
        # By buffer, not by parameter: moving to another device unties tied buffers.
        online_of: dict[Tensor, Tensor] = {}
        for online, momentum in self.pairs:
            buffers = dict(momentum.named_buffers(remove_duplicate=False))
            for name, parameter in online.named_parameters(remove_duplicate=False):
                online_of[buffers[name]] = parameter
        if online_of:
            torch._foreach_lerp_([*online_of], [*online_of.values()], 1 - rate)
