"""Momentum encoders (ALBEF, arXiv 2107.07651, section 3.2): a slow copy of each online module."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def momentum_copy(online: Module) -> Module:
    """Return a copy of ``online`` whose parameters are buffers under their usual names.

    Buffers get no gradient, no optimizer and no gradient exchange, and LAVIS's runner, which drops
    frozen parameters from its checkpoints, keeps them.
    """
    slow = copy.deepcopy(online)
    buffers: dict[int, Tensor] = {}  # tied parameters stay tied
    for module in slow.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(
                    name, buffers.setdefault(id(parameter), parameter.detach().clone())
                )
    return slow


class MomentumPairs:
    """Online parameters and their momentum buffers, updated in one fused operation."""

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        self.modules = list(pairs)

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Online parameters and momentum buffers in the same order, each buffer once."""
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        for fast_module, slow_module in self.modules:
            buffers = dict(slow_module.named_buffers(remove_duplicate=False))
            # By buffer, not by parameter: a move to another device unties tied buffers.
            for name, parameter in fast_module.named_parameters(remove_duplicate=False):
                pairs[id(buffers[name])] = (parameter.detach(), buffers[name])
        return [online for online, _ in pairs.values()], [slow for _, slow in pairs.values()]

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """slow = momentum * slow + (1 - momentum) * online."""
        online, slow = self.tensors()
        if slow:
            torch._foreach_lerp_(slow, online, 1 - momentum)

    @torch.no_grad()
    def copy(self) -> None:
        """slow = online."""
        online, slow = self.tensors()
        if slow:
            torch._foreach_copy_(slow, online)
