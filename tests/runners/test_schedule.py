"""The learning-rate schedule against torch's."""

from __future__ import annotations

# isort: split
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from softmask_plugin.errors import UserError
from softmask_plugin.runners import CosineLRScheduler


@given(
    warmup=st.integers(0, 12),
    decay=st.integers(1, 30),
    init_lr=st.floats(1e-5, 1.0),
    start=st.floats(0.01, 1.0),
    end=st.floats(0.0, 1.0),
)
def test_schedule_is_torchs(warmup, decay, init_lr, start, end):
    def optimizer():
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=init_lr)

    ours, theirs = optimizer(), optimizer()
    iters = warmup + decay
    schedule = CosineLRScheduler(
        ours,
        max_epoch=2,
        iters_per_epoch=iters,
        min_lr=end * init_lr,
        init_lr=init_lr,
        warmup_steps=warmup,
        warmup_start_lr=start * init_lr,
    )
    lr_scheduler = torch.optim.lr_scheduler
    cosine = lr_scheduler.CosineAnnealingLR(theirs, 2 * iters - warmup, eta_min=end * init_lr)
    if warmup:
        linear = lr_scheduler.LinearLR(theirs, start_factor=start, total_iters=warmup)
        reference = lr_scheduler.SequentialLR(theirs, [linear, cosine], milestones=[warmup])
    else:
        reference = cosine
    for step in range(2 * iters):
        schedule.step(cur_epoch=step // iters, cur_step=step % iters)
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-6)
        theirs.step()
        reference.step()
    assert schedule.lr_at(2 * iters) == pytest.approx(end * init_lr)


def test_warmup_longer_than_the_run_is_told(caplog):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = CosineLRScheduler(
        optimizer, max_epoch=1, iters_per_epoch=10, min_lr=0.0, init_lr=1.0, warmup_steps=40
    )
    assert [schedule.lr_at(step) for step in range(10)] == pytest.approx(
        [step / 40 for step in range(10)]
    )
    assert "run.warmup_steps" in caplog.text


def test_schedule_under_a_runner_that_gives_no_steps_per_epoch():
    with pytest.raises(UserError, match="softmask_runner"):
        CosineLRScheduler(None, max_epoch=1, min_lr=0.0, init_lr=1.0)
