"""SIGTERM and SIGUSR1: a run ends after its step, saved, and goes on as if it had not ended."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import time

import pytest
from forks import forked
from toys import ToyModel, build

from benchmarks import kills
from benchmarks.ranks import on_ranks
from benchmarks.traces import differences, trace
from softmask_plugin.errors import StartAgain
from softmask_plugin.runners import stop_signals
from softmask_plugin.runners.stop_signals import SIGNALS

OPTIONS = {
    "resume_ckpt_path": "auto",
    "keep_checkpoints": 1,  # so that what a signal saved is gone in the end
    "accum_grad_iters": 2,
    "log_freq": 3,
    "valid_splits": ["val"],
    "test_splits": ["test"],
    "max_epoch": 2,
}


def at_call(model, number, act):
    """Call ``act`` before a forward pass of the model, in training or not."""
    calls = itertools.count()
    model.register_forward_pre_hook(lambda *_: act() if next(calls) == number else None)


@pytest.mark.parametrize("lengths", [{}, {"accum_grad_iters": 3, "max_steps": 6}])
def test_a_signal_at_any_moment_loses_and_repeats_nothing(tmp_path, lengths):
    """In every other forward pass of training and validation; a test ends by itself. An epoch has
    10 batches, so its last step may have fewer than others."""
    options = OPTIONS | lengths
    whole = build(tmp_path / "whole", **options)
    whole.train()
    expected, calls = trace(whole.output_dir), len(whole.model.seen)
    handlers = [signal.getsignal(each) for each in SIGNALS]
    tested = calls - 3
    for after in range(0, calls, 2):
        first, number = build(tmp_path / str(after), **options), SIGNALS[after // 2 % len(SIGNALS)]
        at_call(first.model, after, lambda number=number: signal.raise_signal(number))
        if after >= tested:
            first.train()
            assert not differences(trace(first.output_dir), expected)
            continue
        with pytest.raises(StartAgain) as stop:
            first.train()
        assert stop.value.code == 75
        seen = first.model.seen
        assert all(each["training"] == seen[after]["training"] for each in seen[after:])
        assert len(seen) - after <= 3  # the rest of a step or of a validation
        again = build(tmp_path / str(after), **options)
        assert again.output_dir == first.output_dir
        again.train()
        assert len(seen) + len(again.model.seen) == calls
        assert not differences(trace(again.output_dir), expected), after
    assert [signal.getsignal(each) for each in SIGNALS] == handlers


def end_in_a_signal(folder, act, **options):
    runner = build(folder, **{**OPTIONS, **options})
    at_call(runner.model, 5, act)
    runner.train()


def test_a_second_signal_ends_at_once(tmp_path, monkeypatch):
    def twice(apart):
        signal.raise_signal(signal.SIGUSR1)
        time.sleep(apart)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(stop_signals, "ONCE", 0.2)
    done = forked(end_in_a_signal, tmp_path / "event", lambda: twice(0))
    assert done.returncode == 75 and list(tmp_path.glob("event/*/*.pth"))
    done = forked(end_in_a_signal, tmp_path / "two", lambda: twice(0.3))
    assert done.returncode == -signal.SIGTERM and not list(tmp_path.glob("two/*/*.pth"))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_data_loading_workers_as_well(tmp_path, number):
    def signal_all():
        subprocess.run(["kill", f"-{number}", "--", f"-{os.getpgrp()}"])

    def train():
        os.setpgrp()
        end_in_a_signal(tmp_path, signal_all, num_workers=2)

    done = forked(train, timeout=60)
    assert done.returncode == 75, done.stderr
    assert [path.name for path in tmp_path.glob("*/*.pth")] == ["checkpoint_0_3.pth"]


@pytest.mark.parametrize("after", [4, 9, 12], ids=["in a step", "in the last one", "validation"])
def test_a_signal_to_one_process_of_two(tmp_path, after):
    """Both end after the same step, and go on as if they had not."""

    def train(folder, rank, number=None):
        model = ToyModel()
        if number is not None and rank == 1:
            at_call(model, number, lambda: signal.raise_signal(signal.SIGTERM))
        options = {**OPTIONS, "batch_size_train": 2, "batch_size_eval": 2, "distributed": True}
        runner = build(folder, model=model, **options)
        try:
            runner.train()
        except StartAgain:
            return runner.step
        return None

    ended = [
        on_ranks(2, lambda rank, run=run: train(tmp_path / run[0], rank, run[1]), patience=60)
        for run in (("whole", None), ("signalled", after), ("signalled", None))
    ]
    assert not any(rank.error for ranks in ended for rank in ranks)
    whole, signalled, resumed = ([rank.result for rank in ranks] for ranks in ended)
    assert whole == resumed == [None, None]
    # In the midst of an epoch they agree on the step after the next exchange of gradients
    assert signalled == {4: [4, 4], 9: [5, 5], 12: [5, 5]}[after]
    folders = [next((tmp_path / name).iterdir()) for name in ("whole", "signalled")]
    assert not differences(*map(trace, folders))


def test_signals_at_random_moments_of_real_runs():
    """Four times at least: nothing is lost, and no step is taken twice."""
    done = forked(kills.main, ["--kills", "4", "--workers", "0", "--by", "TERM", "USR1"])
    assert done.returncode == 0, done.stdout + done.stderr
    ended = re.match(
        r"[45] times SIGTERM or SIGUSR1 .*; \d+ runs ended, 0 differences", done.stdout
    )
    assert ended and "step" in done.stdout
