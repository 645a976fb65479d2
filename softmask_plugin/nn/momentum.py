"""Momentum encoders: moving averages of online modules (ALBEF, arXiv 2107.07651, 3.2)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def momentum_copy(online: Module) -> Module:
    """Copy ``online``, with buffers under the same names in place of its parameters.

    Buffers take no part in gradients, optimizers and gradient exchange. LAVIS's runner saves them;
    it drops frozen parameters from its checkpoints.
    """
    momentum = copy.deepcopy(online)
    buffers: dict[int, Tensor] = {}  # tied parameters stay tied
    for module in momentum.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            delattr(module, name)
            buffer = buffers.setdefault(id(parameter), parameter.detach().clone())
            module.register_buffer(name, buffer)
    return momentum


class MomentumPairs:
    """Online parameters and their momentum buffers, updated in one fused operation."""

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        self.pairs = list(pairs)

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
