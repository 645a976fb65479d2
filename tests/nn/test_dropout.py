"""Dropout against its definition and torch's own gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from softmask_plugin.nn.dropout import Dropout, drop

SIZE = 400_003  # no multiple of the four draws in a random number


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.99])
def test_the_rate_is_right_in_each_of_the_four_parts_of_a_random_number(rate):
    torch.manual_seed(0)
    dropped = drop(torch.ones(SIZE), rate) == 0
    deviation = (rate * (1 - rate) / (SIZE / 4)) ** 0.5
    for part in range(4):
        assert abs(float(dropped[part::4].double().mean()) - rate) < 4 * deviation


def test_neighbours_are_dropped_independently():
    torch.manual_seed(1)
    dropped = (drop(torch.ones(SIZE), 0.3) == 0).double() - 0.3
    for lag in range(1, 9):
        correlation = float((dropped[lag:] * dropped[:-lag]).mean()) / (0.3 * 0.7)
        assert abs(correlation) < 4 / SIZE**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_scaled_and_its_gradient_too(dtype):
    torch.manual_seed(2)
    x = (torch.rand(3, 5, 7, dtype=dtype) + 1).transpose(0, 2).requires_grad_()
    y = drop(x, 0.25)
    kept = y != 0
    assert y.dtype == dtype and 0.6 < kept.float().mean() < 0.9
    torch.testing.assert_close(y, torch.where(kept, x / 0.75, 0.0), rtol=1e-2, atol=0)
    (given,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(given, kept.to(dtype) / 0.75, rtol=1e-2, atol=0)


def test_the_seed_decides():
    x, found = torch.rand(50, 50), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(drop(x, 0.5))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_nothing_is_drawn_where_nothing_is_dropped():
    x, state = torch.rand(9), torch.get_rng_state()
    assert torch.equal(drop(x, 0.0), x) and torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(Dropout(0.5)(x), x)


def test_elsewhere_than_on_a_cpu_it_is_torchs(monkeypatch):
    calls = []
    monkeypatch.setattr(F, "dropout", lambda x, *given: calls.append(given) or x)
    drop(torch.rand(3, device="meta"), 0.5)
    assert calls == [(0.5, True)]
