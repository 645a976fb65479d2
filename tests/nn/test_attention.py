"""Attention, by either way, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from softmask_plugin.nn.attention import attend

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def tensors(dtype, queries=5, keys=7):
    """Queries, keys and values as the heads of linear layers lie in memory."""
    torch.manual_seed(0)
    sizes = (queries, keys, keys)
    rows = [torch.randn(3, n, 2, 8, dtype=dtype, requires_grad=True) for n in sizes]
    return rows, [each.transpose(1, 2) for each in rows]


def defined(query, key, value, mask):
    """softmax(q k / sqrt(d)) v, one query at a time, and without the keys that do not count."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    for n, h, t in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        seen = mask[n, h, t]
        scores = key[n, h][seen].double() @ query[n, h, t].double() / query.shape[-1] ** 0.5
        out[n, h, t] = scores.softmax(0) @ value[n, h][seen].double()
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [None, (3, 1, 1, 7), (3, 1, 5, 7)])
def test_it_is_what_it_is_defined_to_be(dtype, shape):
    rows, (query, key, value) = tensors(dtype)
    mask = None
    if shape is not None:
        mask = torch.rand(shape) < 0.6
        mask[..., 0] = True
    whole = torch.ones(3, 2, 5, 7, dtype=torch.bool) if mask is None else mask.expand(3, 2, 5, 7)
    expected = defined(query, key, value, whole)
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype], "check_dtype": False}
    with torch.no_grad():
        torch.testing.assert_close(attend(query, key, value, mask), expected, **close)
    found = attend(query, key, value, mask)
    torch.testing.assert_close(found, expected, **close)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), rows)
    given = torch.autograd.grad((found.double() * weight).sum(), rows)
    torch.testing.assert_close(given, wanted, **close)


def test_dropout_drops_probabilities_and_scales_the_others():
    _, (query, key, _) = tensors(torch.float32, queries=50)
    eye = torch.eye(7).expand(3, 2, 7, 7)  # so that the output is the probabilities
    whole, dropped = attend(query, key, eye), attend(query, key, eye, dropout=0.4)
    gone = dropped == 0
    torch.testing.assert_close(dropped[~gone], whole[~gone] / 0.6, rtol=1e-4, atol=0)
    assert 0.3 < gone.float().mean() < 0.5


@pytest.mark.parametrize("dtype, written_out", [(torch.float32, False), (torch.bfloat16, True)])
def test_the_slow_backward_pass_of_a_cpu_is_avoided(dtype, written_out):
    _, parts = tensors(dtype)
    assert written_out != ("ScaledDotProduct" in attend(*parts).grad_fn.name())
