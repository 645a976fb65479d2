"""Scaled dot-product attention, by whichever of torch's ways is the faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softmask_plugin.nn.dropout import drop


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Attend with queries (N, H, T, d) to keys and values (N, H, S, d); returns (N, H, T, d).

    ``mask``, bool and of a shape that expands to (N, H, T, S), is True for the keys that count;
    None: all. ``dropout`` is the rate at which probabilities are dropped.
    """
    if not _fused_is_slow(query, dropout):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return drop(scores.softmax(dim=-1), dropout) @ value


def _fused_is_slow(query: Tensor, dropout: float) -> bool:
    """Whether torch's fused attention loses on a CPU. It has no dropout there, and its fallback
    copies the keys to scale them; its backward pass in bf16 is several times as slow."""
    if query.device.type != "cpu":
        return False
    return dropout > 0 or (torch.is_grad_enabled() and query.dtype != torch.float32)
