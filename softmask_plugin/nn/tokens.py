"""Captions of different lengths without their padding: no layer computes what nobody reads.

Linear layers, norms and the feed-forward work on a *packed* row of tokens, (M, width), in which the
captions follow each other. Only attention needs the *grid*, (N, T), one caption per row. The same
two forms serve a layer of which only some tokens are read later: [CLS] for ITM, masked words for
MLM. All lengths are known on the host, so that nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Which cells of a grid (N, T) are in the packed row.

    Attributes:
        mask: True for cells that count, (N, T).
        index: flat position in the grid of each packed token, (M,), int64. Where the number of
            counting cells is known to the device alone it names others too, which nothing reads.
    """

    mask: Tensor
    index: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Layout:
        """The layout of a mask (N, T); waits for the device unless the mask is on the CPU."""
        return cls(mask, mask.flatten().nonzero().squeeze(1))

    @classmethod
    def cat(cls, layouts: Sequence[Layout]) -> Layout:
        """All captions in one grid, as wide as the widest."""
        width, start, indices, masks = max(one.mask.shape[1] for one in layouts), 0, [], []
        for one in layouts:
            rows, columns = one.mask.shape
            masks.append(torch.nn.functional.pad(one.mask, (0, width - columns)))
            indices.append(one.cells_in(width) + start * width)
            start += rows
        return cls(torch.cat(masks), torch.cat(indices))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Layout:
        """Move to a device."""
        mask, index = (t.to(device, non_blocking=non_blocking) for t in (self.mask, self.index))
        return Layout(mask, index)

    @property
    def cls_only(self) -> Layout:
        """The first token of each caption, where [CLS] is."""
        first = torch.arange(len(self.mask), device=self.mask.device)
        return Layout(self.mask[:, :1], first)

    def cells_in(self, width: int) -> Tensor:
        """Flat positions of the packed tokens, (M,), in a grid of ``width`` columns."""
        own = self.mask.shape[1]
        return self.index if own == width else self.index // own * width + self.index % own

    def rows_of(self, cells: Tensor) -> Tensor:
        """Packed row of each of these cells (flat positions in the grid); 0 for those left out."""
        rows = torch.arange(len(self.index), device=self.index.device)
        return rows.new_zeros(self.mask.numel()).index_copy_(0, self.index, rows)[cells]

    def pad(self, packed: Tensor) -> Tensor:
        """(M, width) -> (N, T, width), zeros where the grid is empty."""
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
    layout: Layout

    @classmethod
    def cat(cls, parts: Sequence[Tokens]) -> Tokens:
        """One after the other."""
        states = torch.cat([part.states for part in parts])
        return cls(states, Layout.cat([part.layout for part in parts]))

    def split(self, layouts: Sequence[Layout]) -> list[Tokens]:
        """Undo ``cat``: the tokens of each layout in turn."""
        parts = self.states.split([len(layout.index) for layout in layouts])
        return [Tokens(*part) for part in zip(parts, layouts, strict=True)]

    @property
    def cls(self) -> Tensor:
        """States of the first token of each caption, (N, width)."""
        first = self.layout.cls_only.cells_in(self.layout.mask.shape[1])
        return self.states.index_select(0, self.layout.rows_of(first))

    def only(self, wanted: Layout) -> Tokens:
        """The tokens that ``wanted`` names, a layout of the first columns of the same captions."""
        if wanted is self.layout:
            return self
        rows = self.layout.rows_of(wanted.cells_in(self.layout.mask.shape[1]))
        return Tokens(self.states.index_select(0, rows), wanted)

    def take(self, captions: Tensor, trim: bool | None = None) -> Tokens:
        """Some captions, or in another order, or repeatedly.

        Args:
            captions: index of each, (n,), int64.
            trim: leave out the padding, which waits for the device; None: only on the CPU, where
                there is nothing to wait for.
        """
        width, mask = self.layout.mask.shape[1], self.layout.mask[captions]
        if trim or (trim is None and not mask.is_cuda):
            mask = mask[:, : max(1, int(mask.any(dim=0).sum()))]
            layout = Layout.of(mask)
        else:
            layout = Layout(mask, torch.arange(mask.numel(), device=mask.device))
        columns = mask.shape[1]
        cells = captions[layout.index // columns] * width + layout.index % columns
        return Tokens(self.states.index_select(0, self.layout.rows_of(cells)), layout)
