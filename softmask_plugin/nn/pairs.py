"""One batched fusion pass for groups of pairs: positives, soft positives, negatives, MLM."""

from __future__ import annotations

import torch
from torch import Tensor

from softmask_plugin.nn.bert import BertModel, ImageMemory
from softmask_plugin.nn.image_memory import View


class Pairs:
    """Collects groups of captions, each with its view of the images, to fuse them at once.

    Args:
        mask: True where a token is no padding, (B, T); the default of every group.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.groups: dict[str, tuple[Tensor, Tensor, View]] = {}

    def add(
        self, name: str, states: Tensor, view: View = View(), mask: Tensor | None = None
    ) -> None:
        """Add a group of B captions: text states (B, T, width), and a mask if not the batch's."""
        self.groups[name] = (states, self.mask if mask is None else mask, view)

    def fuse(self, bert: BertModel, memory: ImageMemory) -> dict[str, Tensor]:
        """Multi-modal states of each group, (B, T, width), by name."""
        states, masks, views = zip(*self.groups.values(), strict=True)
        fused = bert.fuse(torch.cat(states), torch.cat(masks), memory, views)
        return dict(zip(self.groups, fused.chunk(len(self.groups)), strict=True))
