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
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(
                    name, buffers.setdefault(id(parameter), parameter.detach().clone())
                )
    return momentum


class MomentumPairs:
    """Online parameters and their momentum buffers, updated in one fused operation."""

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        self.pairs = list(pairs)

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Online parameters and momentum buffers in the same order, each buffer once."""
        tensors: dict[int, tuple[Tensor, Tensor]] = {}
        for online, momentum in self.pairs:
            buffers = dict(momentum.named_buffers(remove_duplicate=False))
            # By buffer, not by parameter: moving to another device unties tied buffers.
            for name, parameter in online.named_parameters(remove_duplicate=False):
                tensors[id(buffers[name])] = (parameter.detach(), buffers[name])
        return [each for each, _ in tensors.values()], [each for _, each in tensors.values()]

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """momentum = rate * momentum + (1 - rate) * online; exactly online at a rate of 0."""
        online, momentum = self.tensors()
        if momentum:
            torch._foreach_lerp_(momentum, online, 1 - rate)
