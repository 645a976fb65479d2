"""Captions packed without their padding, so that no layer computes states that nothing needs.

Linear layers, norms and the feed-forward work on a *packed* row of tokens, (M, width), one caption
after the other. Only attention needs the *grid*, (N, T), one caption per row. A layer that computes
only some tokens, such as [CLS] for ITM or masked words for MLM, uses the same two forms. The host
knows all lengths, so nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Which cells of a grid (N, T) the packed row holds."""

    mask: Tensor  # True for cells with a token, (N, T)
    # Flat position in the grid of each packed token, (M,), int64. It may include padding, which is
    # never read, if only the device knows the number of tokens.
    index: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Packing:
        """Pack the cells of a mask (N, T); waits for the device unless the mask is on the CPU."""
        return cls(mask, mask.flatten().nonzero().squeeze(1))

    @classmethod
    def cat(cls, packings: Sequence[Packing]) -> Packing:
        """Stack all captions in one grid, as wide as the widest."""
        width, start, indices, masks = max(each.mask.shape[1] for each in packings), 0, [], []
        for each in packings:
            rows, columns = each.mask.shape
            masks.append(torch.nn.functional.pad(each.mask, (0, width - columns)))
            indices.append(each.cells_in(width) + start * width)
            start += rows
        return cls(torch.cat(masks), torch.cat(indices))

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Packing:
        """Copy from the host to a device, by default without waiting for it."""
        mask, index = (t.to(device, non_blocking=non_blocking) for t in (self.mask, self.index))
        return Packing(mask, index)

    @property
    def cls_only(self) -> Packing:
        """The packing of each caption's first token, [CLS]."""
        first = torch.arange(len(self.mask), device=self.mask.device)
        return Packing(self.mask[:, :1], first)

    def cells_in(self, width: int) -> Tensor:
        """Flat positions of the packed tokens, (M,), in a grid of ``width`` columns."""
        own = self.mask.shape[1]
        return self.index if own == width else self.index // own * width + self.index % own

    def rows_of(self, cells: Tensor) -> Tensor:
        """Packed row of each cell (flat position in the grid); 0 if the cell is not packed."""
        rows = torch.arange(len(self.index), device=self.index.device)
        return rows.new_zeros(self.mask.numel()).index_copy_(0, self.index, rows)[cells]

    def pad(self, packed: Tensor) -> Tensor:
        """(M, width) -> (N, T, width), zero for padding."""
        n, t = self.mask.shape
        if len(packed) < n * t:
            packed = packed.new_zeros(n * t, packed.shape[1]).index_copy(0, self.index, packed)
        return packed.view(n, t, packed.shape[1])

    def pack(self, grid: Tensor) -> Tensor:
        """(N, T, width) -> (M, width)."""
        flat = grid.flatten(0, 1)
        return flat if len(self.index) == len(flat) else flat.index_select(0, self.index)


@dataclass(frozen=True)
class Tokens:
    """States of the tokens of N captions, packed: (M, width)."""

    states: Tensor
    packing: Packing

    @classmethod
    def cat(cls, parts: Sequence[Tokens]) -> Tokens:
        """Join captions, one part after the other."""
        states = torch.cat([part.states for part in parts])
        return cls(states, Packing.cat([part.packing for part in parts]))

    def split(self, packings: Sequence[Packing]) -> list[Tokens]:
        """Undo ``cat``."""
        parts = self.states.split([len(packing.index) for packing in packings])
        return [Tokens(*part) for part in zip(parts, packings, strict=True)]

    @property
    def cls(self) -> Tensor:
        """States of each caption's first token, (N, width)."""
        return self.only(self.packing.cls_only).states

    @property
    def mean(self) -> Tensor:
        """Mean state of each caption's tokens, [CLS] and [SEP] included, (N, width)."""
        mask = self.packing.mask[..., None]
        return (self.packing.pad(self.states) * mask).sum(dim=1) / mask.sum(dim=1)

    def only(self, wanted: Packing) -> Tokens:
        """Select tokens; ``wanted`` packs the first columns of the same captions."""
        if wanted is self.packing:
            return self
        rows = self.packing.rows_of(wanted.cells_in(self.packing.mask.shape[1]))
        return Tokens(self.states.index_select(0, rows), wanted)

    def take(self, captions: Tensor, trim: bool | None = None) -> Tokens:
        """Select captions in any order, also repeatedly.

        Args:
            captions: Their indices, (n,), int64.
            trim: Whether to drop padding, which waits for the device; None: only on the CPU.
        """
        width, mask = self.packing.mask.shape[1], self.packing.mask[captions]
        if trim or (trim is None and not mask.is_cuda):
            mask = mask[:, : max(1, int(mask.any(dim=0).sum()))]
            packing = Packing.of(mask)
        else:
            packing = Packing(mask, torch.arange(mask.numel(), device=mask.device))
        columns = mask.shape[1]
        cells = captions[packing.index // columns] * width + packing.index % columns
        return Tokens(self.states.index_select(0, self.packing.rows_of(cells)), packing)


@dataclass(frozen=True)
class DecoderText:
    """N texts as a decoder scores them: each token predicts the next."""

    ids: Tensor  # (N, T)
    packing: Packing
    predicting: Packing  # all tokens but each text's last, M in all
    targets: Tensor  # the tokens that those predict, (M,)

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor, device: torch.device) -> DecoderText:
        """Prepare ids and mask (N, T) on the CPU, where finding the tokens is free."""
        width = int(mask.any(dim=0).sum())
        ids, mask = ids[:, :width], mask[:, :width]
        predicting = Packing.of(mask[:, 1:])
        targets = ids[:, 1:].flatten()[predicting.index]
        packing = Packing.of(mask).to(device)
        ids, targets = (t.to(device, non_blocking=True) for t in (ids, targets))
        return cls(ids, packing, predicting.to(device), targets)

    @property
    def owner(self) -> Tensor:
        """The text that each predicting token belongs to, (M,)."""
        return self.predicting.index // self.predicting.mask.shape[1]
