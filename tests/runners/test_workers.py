"""Several processes; run as a script under torchrun, it is what each of them does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from toys import build, read_metrics, weights

from benchmarks.traces import differences, trace
from softmask_plugin.launch import join_group, leave_distributed

TWO_PROCESSES = {
    "resume_ckpt_path": "auto",
    "save_every_steps": 2,
    "accum_grad_iters": 2,
    "valid_splits": ["val"],
    "test_splits": ["test"],
}


def main(output_dir, fragile=False):
    """What each process of the tests below runs."""
    join_group("gloo", 60)
    everyone = [None, None]
    dist.all_gather_object(everyone, train(Path(output_dir), fragile))
    assert torch.equal(*everyone), "the ranks' weights differ"
    if dist.get_rank() == 0:
        torch.save(everyone[0], Path(output_dir) / "weights.pth")
    leave_distributed()


def train(output_dir, fragile):
    runner = build(output_dir, batch_size_train=4, distributed=True, **TWO_PROCESSES)
    if fragile:
        runner.model.register_forward_pre_hook(lambda *_: die_once(runner, output_dir))
    runner.train()
    return weights(runner.model.module)


def die_once(runner, folder):
    """The second process is killed in its fourth step, the first time."""
    if dist.get_rank() == 1 and runner.step == 4 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def torchrun(folder, *arguments, restarts=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, f"--max-restarts={restarts}", __file__, str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_two_processes_train_like_one(tmp_path):
    """torchrun with gloo: same weights on both ranks, and those of one process with big batches.

    Also after one of them was killed, where torchrun starts both again.
    """
    done = torchrun(tmp_path)
    assert done.returncode == 0, done.stderr

    options = {**TWO_PROCESSES, "resume_ckpt_path": None}
    alone = build(tmp_path, job_id="alone", batch_size_train=8, **options)
    alone.train()
    together = torch.load(tmp_path / "weights.pth", weights_only=True)
    torch.testing.assert_close(together, weights(alone.model), rtol=1e-12, atol=1e-12)

    lines, expected = read_metrics(tmp_path / "job"), read_metrics(alone.output_dir)
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == [3, 4, 6]
    for term in ("loss", "loss_itc", "loss_itm", "lr"):
        assert [line[term] for line in lines] == pytest.approx([line[term] for line in expected])

    again = torchrun(tmp_path / "again", "fragile", restarts=1)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again" / "died").exists()
    assert torch.equal(torch.load(tmp_path / "again" / "weights.pth"), together)
    assert not differences(trace(tmp_path / "again" / "job"), trace(tmp_path / "job"))


def test_two_and_four_processes_agree_with_each_other_and_with_one(tmp_path):
    """All that ``python -m benchmarks.workers`` compares; it names what is not as it should be."""
    command = [sys.executable, "-m", "benchmarks.workers", "--steps", "4"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "findings.json")],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    findings = json.loads((tmp_path / "findings.json").read_text())
    assert len(findings) >= 16 and all(finding["good"] for finding in findings)
    assert {finding["processes"] for finding in findings} >= {2, 4}


if __name__ == "__main__":
    main(sys.argv[1], fragile="fragile" in sys.argv)
