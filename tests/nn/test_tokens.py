"""Packed captions: what is padded, packed, taken apart and put together again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softmask_plugin.nn.tokens import Packing, Tokens

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=5)
WIDTH = 3


def captions(lengths: list[int], columns: int | None = None) -> Tokens:
    """Captions of these lengths with random states, in a grid of this many columns."""
    mask = torch.arange(columns or max(lengths)) < torch.tensor(lengths)[:, None]
    return Tokens(torch.randn(int(mask.sum()), WIDTH), Packing.of(mask))


def rows(tokens: Tokens) -> list[torch.Tensor]:
    """The states of each caption, (length, width), without padding."""
    grid = tokens.packing.pad(tokens.states)
    return [row[kept] for row, kept in zip(grid, tokens.packing.mask, strict=True)]


def assert_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@given(LENGTHS)
def test_padding_is_zero_and_packing_undoes_it(lengths):
    tokens = captions(lengths)
    grid = tokens.packing.pad(tokens.states)
    assert grid.shape == (len(lengths), max(lengths), WIDTH)
    assert (grid[~tokens.packing.mask] == 0).all()
    assert torch.equal(tokens.packing.pack(grid), tokens.states)
    assert_equal([tokens.cls], [grid[:, 0]])


@given(LENGTHS, LENGTHS)
def test_joined_captions_come_apart_again(first, second):
    parts = [captions(first), captions(second)]
    joined = Tokens.cat(parts)
    assert joined.packing.mask.shape == (len(first + second), max(first + second))
    assert_equal(rows(joined), rows(parts[0]) + rows(parts[1]))
    assert torch.equal(joined.cls, torch.cat([part.cls for part in parts]))
    for got, part in zip(joined.split([p.packing for p in parts]), parts, strict=True):
        assert torch.equal(got.states, part.states)


@given(LENGTHS, st.data(), st.booleans())
def test_captions_are_selected_in_any_order_and_number(lengths, data, trim):
    tokens = captions(lengths, columns=7)
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6))
    taken = tokens.take(torch.tensor(chosen), trim=trim)
    longest = max(lengths[i] for i in chosen)
    assert taken.packing.mask.shape == (len(chosen), longest if trim else 7)
    assert len(taken.states) == (sum(lengths[i] for i in chosen) if trim else 7 * len(chosen))
    assert_equal(rows(taken), [rows(tokens)[i] for i in chosen])
    assert torch.equal(taken.cls, tokens.cls[chosen])


@given(LENGTHS, st.integers(0, 99))
def test_some_tokens_are_selected_from_all(lengths, seed):
    tokens = captions(lengths)
    generator = torch.Generator().manual_seed(seed)
    chosen = tokens.packing.mask & (
        torch.rand(tokens.packing.mask.shape, generator=generator) < 0.5
    )
    grid = tokens.packing.pad(tokens.states)
    assert torch.equal(tokens.only(Packing.of(chosen)).states, grid[chosen])
    assert torch.equal(tokens.only(tokens.packing.cls_only).states, grid[:, 0])


@pytest.mark.parametrize("trim", [True, False])
def test_gradients_reach_the_selected_states(trim):
    tokens = captions([2, 4, 1])
    tokens.states.requires_grad_()
    taken = tokens.take(torch.tensor([0, 0, 2]), trim=trim)
    sum(row.sum() for row in rows(taken)).backward()
    expected = torch.tensor([2.0] * 2 + [0] * 4 + [1])
    assert torch.equal(tokens.states.grad, expected[:, None].expand(-1, WIDTH))
