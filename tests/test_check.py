"""``softmask check``: what it says of a run, what it finds, and that it leaves nothing behind."""

from __future__ import annotations

# isort: split
import itertools
import tempfile
from pathlib import Path

import pytest
import torch

from softmask_plugin import check, cli
from softmask_plugin.runners.meter import LossMeter
from softmask_plugin.runners.runner import SoftmaskRunner

OPTIONS = [
    "run.output_dir=runs",
    "run.batch_size_train=4",
    "run.batch_size_eval=4",
    "run.max_epoch=3",
    "run.num_workers=0",
    "run.valid_splits=[val]",
    "run.test_splits=[]",
    "run.resume_ckpt_path=auto",
    "datasets.scenes_retrieval.num={train: 8, val: 6}",
    "model.queue_size=8",
    "model.load_pretrained=false",
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty current folder, and one for temporary files."""
    monkeypatch.chdir(tmp_path)
    Path("temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def softmask_check(*options, name="scenes/train/retrieval_tiny"):
    code = cli.main(["check", "--cfg-path", name, "--options", *OPTIONS, *options])
    assert [str(path) for path in Path().rglob("*")] == ["temporary"]
    return code


def test_a_sound_run(monkeypatch, capsys):
    """Two steps an epoch, one second each: the clock is read before and after a step."""
    monkeypatch.setattr(check, "now", itertools.count().__next__)
    assert softmask_check() == 0
    model, val, train, step, time, memory, end = capsys.readouterr().out.splitlines()
    assert model.startswith("model   softmask_retrieval, type tiny: ")
    assert val.startswith("data    val: 6 items; a batch: image (4, 3, ")
    assert train.startswith("data    train: 8 items; a batch: image (4, 3, ")
    assert step.startswith("step    1 s: ") and ", loss_itc " in step
    assert time == "time    about 0:00:06 for 6 steps, besides evaluation"
    assert memory.endswith("GiB, besides data-loading processes")
    assert end == "All is well; nothing was written into run.output_dir"


def test_slow_steps_are_few(monkeypatch, capsys):
    monkeypatch.setattr(check, "now", itertools.count(step=30).__next__)
    steps, train_step = [], SoftmaskRunner.train_step
    monkeypatch.setattr(
        SoftmaskRunner, "train_step", lambda *given: steps.append(train_step(*given))
    )
    assert softmask_check("run.max_steps=1000", "run.max_epoch=null") == 0
    assert len(steps) == 1
    assert "time    about 8:20:00 for 1,000 steps" in capsys.readouterr().out


def test_losses_that_start_late_are_timed(capsys):
    """ITM and the mask start with the last of six steps."""
    late = [
        "model.itc_steps=5",
        "model.soft_mask.start_iter=5",
        "datasets.scenes_pretrain.num.train=8",
    ]
    common = [each for each in OPTIONS if "scenes_retrieval" not in each and "val" not in each]
    given = ["--options", *common, "run.valid_splits=[]", "model.load_pretrained=false", *late]
    assert cli.main(["check", "--cfg-path", "scenes/train/pretrain_tiny", *given]) == 0
    (step,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("step "))
    assert ", loss_itm " in step and ", loss_soft " in step


def test_an_evaluation(capsys):
    name = "scenes/eval/retrieval_tiny"
    given = ["run.output_dir=runs", "run.batch_size_eval=4", "model.load_pretrained=false"]
    assert cli.main(["check", "--cfg-path", name, "--options", *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[1:-1]] == ["data    test"]
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("run.max_epoch=many", "run.max_epoch is 'many'"),
        ("run.test_splits=[dev]", "set run.test_splits=[]"),
        ("run.valid_splits=[train]", "cannot name 'train'"),
        ("run.amp=bf15", "run.amp is 'bf15'"),
        ("run.batch_size_train=9", "set run.batch_size_train=8"),
        ("run.output_dir=/proc/version/runs", "/proc/version cannot be written"),
        ("run.runner=runner_base", "run.runner=softmask_runner"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, option, message):
    assert softmask_check(option) == 2
    shown = capsys.readouterr()
    assert "All is well" not in shown.out
    assert shown.err.splitlines()[-1].startswith("softmask: error: ")
    assert message in shown.err.splitlines()[-1]


def test_numbers_that_are_not_finite(monkeypatch, capsys):
    monkeypatch.setattr(LossMeter, "finite", lambda self: torch.tensor(False))
    assert softmask_check() == 2
    assert "6 of 6 steps had numbers that are not finite" in capsys.readouterr().err


def test_too_little_memory(monkeypatch, capsys):
    def train_step(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(SoftmaskRunner, "train_step", train_step)
    assert softmask_check() == 2
    assert "lower run.batch_size_train" in capsys.readouterr().err.splitlines()[-1]
