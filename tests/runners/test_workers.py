"""Several processes train like one, also after torchrun has had to start them again.

Run as a script under torchrun, this is what each of its processes does.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import forked
from omegaconf import OmegaConf
from toys import build, read_metrics, weights

from benchmarks import workers
from benchmarks.ranks import on_ranks
from benchmarks.traces import differences, trace
from softmask_plugin import launch
from softmask_plugin.models.pretrain import SoftMaskPretrain


def test_two_processes_train_like_one(tmp_path):
    """The same weights on both ranks, and those of one process with batches of twice the size."""
    options = {"accum_grad_iters": 2, "valid_splits": ["val"], "test_splits": ["test"]}

    def train(_):
        runner = build(tmp_path, batch_size_train=4, distributed=True, **options)
        runner.train()
        return weights(runner.model.module)

    first, second = on_ranks(2, train, patience=60)
    assert not first.error and not second.error
    assert torch.equal(first.result, second.result)

    alone = build(tmp_path, job_id="alone", batch_size_train=8, **options)
    alone.train()
    torch.testing.assert_close(first.result, weights(alone.model), rtol=1e-12, atol=1e-12)

    lines, expected = read_metrics(tmp_path / "job"), read_metrics(alone.output_dir)
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == [3, 4, 6]
    for term in ("loss", "loss_itc", "loss_itm", "lr"):
        assert [line[term] for line in lines] == pytest.approx([line[term] for line in expected])


PROJECT = "lavis_configs/projects/scenes/train/retrieval_tiny.yaml"
OPTIONS = [
    "model.arch=softmask_pretrain",
    "model.queue_size=8",
    *("datasets.scenes_retrieval.num.train=48", "datasets.scenes_retrieval.num.val=4"),
    "datasets.scenes_retrieval.num.test=6",
    *("run.batch_size_train=4", "run.accum_grad_iters=2", "run.max_epoch=2", "run.k_test=4"),
    *("run.num_workers=0", "run.save_every_steps=2", "run.log_freq=1", "run.resume_ckpt_path=auto"),
]


def test_killed_under_torchrun_a_run_ends_as_if_it_was_not(tmp_path):
    """torchrun starts both processes again when one was killed, and they resume the run exactly."""

    def train(_):
        launch.run(PROJECT, [*OPTIONS, f"run.output_dir={tmp_path / 'whole'}"])

    assert [rank.error for rank in on_ranks(2, train)] == ["", ""]
    done = torchrun(tmp_path / "died", f"run.output_dir={tmp_path / 'killed'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died").exists()

    (whole,), (killed,) = ((tmp_path / name).iterdir() for name in ("whole", "killed"))
    assert not differences(trace(killed), trace(whole))
    splits = [(line["split"], line["step"]) for line in trace(killed)["metrics.jsonl"]]
    steps = [("train", step) for step in range(1, 7)]  # of 48 scenes: twice 4 on each of 2 ranks
    assert splits == [*steps[:3], ("val", 3), *steps[3:], ("val", 6), ("test", splits[-1][1])]
    assert OmegaConf.load(killed / "config.yaml").run.world_size == 2


def torchrun(died, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, "--max-restarts=1", __file__, str(died), *OPTIONS, *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def main(died, *options):
    """``softmask train``, whose second process is killed in its fifth step, the first time."""
    forward, calls = SoftMaskPretrain.forward, []

    def die_once(model, samples):
        calls.append(samples)
        if os.environ["RANK"] == "1" and len(calls) == 10 and not Path(died).exists():
            Path(died).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(model, samples)

    SoftMaskPretrain.forward = die_once
    sys.argv = ["softmask train", "--cfg-path", PROJECT, "--options", *options]
    runpy.run_module("softmask_plugin.train", run_name="__main__")


def test_two_and_four_processes_agree_with_each_other_and_with_one():
    """All that ``python -m benchmarks.workers`` compares; it prints whatever is wrong."""
    done = forked(workers.main, ["--steps", "4"])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    good = [line for line in done.stdout.splitlines() if line.startswith("ok ")]
    assert len(good) >= 16
    assert {line.split()[1] for line in good} >= {"2", "4"}


if __name__ == "__main__":
    main(*sys.argv[1:])
