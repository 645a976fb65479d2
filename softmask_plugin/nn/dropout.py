"""Dropout with draws that are cheap on a CPU, where torch's own are serial."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """``drop`` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements in training mode only."""
        return drop(x, self.p if self.training else 0.0)


def drop(x: Tensor, rate: float) -> Tensor:
    """Zero each element with probability ``rate``, in [0, 1), and scale the others to keep the mean
    (Srivastava et al., JMLR 2014). On a CPU the rate is rounded to a multiple of 2^-16."""
    if rate == 0 or x.device.type != "cpu":
        return F.dropout(x, rate, rate > 0)
    dropped = round(rate * 2**16)  # of the 2^16 values of a draw; one int64 holds four draws
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return torch.where(kept, x * (2**16 / (2**16 - dropped)), 0.0)
