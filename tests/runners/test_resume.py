"""Best epoch, checkpoints, and going on from them."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path

import pytest
import torch
from forks import forked
from toys import ScriptedTask, ToyData, ToyModel, ToyTask, build, interrupt, read_metrics, weights

from benchmarks import kills
from benchmarks.traces import differences, trace
from softmask_plugin.errors import UserError
from softmask_plugin.files.checkpoint import furthest_first


def test_best_epoch_is_kept_and_tested(tmp_path):
    task = ScriptedTask([-5.0, -1.0, -3.0])
    runner = build(tmp_path, task, max_epoch=3, valid_splits=["val"], test_splits=["test"])
    results = runner.train()
    assert [line["agg_metrics"] for line in read_metrics(runner.output_dir, "val")] == [
        -5.0,
        -1.0,
        -3.0,
    ]
    names = sorted(path.name for path in runner.output_dir.glob("*.pth"))
    assert names == ["checkpoint_1.pth", "checkpoint_2.pth", "checkpoint_best.pth"]
    best = torch.load(runner.output_dir / "checkpoint_best.pth", weights_only=True)
    assert best["epoch"] == 1
    assert set(best) == {"model", "optimizer", "config", "scaler", "epoch", "progress"}
    (line,) = read_metrics(runner.output_dir, "test")
    assert (line["epoch"], line["step"]) == (1, 20)
    assert results == {"test": {"agg_metrics": line["agg_metrics"]}}

    model = ToyModel()
    model.load_state_dict(best["model"], strict=False)
    again = build(tmp_path, model=model, job_id="again", evaluate=True, test_splits=["test"])
    assert again.train() == results


def test_evaluate_only(tmp_path):
    runner = build(tmp_path, evaluate=True, valid_splits=["val"], test_splits=["test"])
    before = weights(runner.model).clone()
    assert set(runner.train()) == {"test"}
    assert torch.equal(weights(runner.model), before)
    assert not any(step["training"] for step in runner.model.seen)
    assert not list(runner.output_dir.glob("*.pth"))
    assert not read_metrics(runner.output_dir)
    (line,) = read_metrics(runner.output_dir, "test")
    assert line["epoch"] is line["step"] is None


def test_task_without_metrics_saves_every_epoch(tmp_path):
    class Silent(ToyTask):
        def evaluation(self, model, data_loader):
            return None

    runner = build(tmp_path, Silent(), valid_splits=["val"], test_splits=["test"])
    assert runner.train() == {"test": None}
    names = sorted(path.name for path in runner.output_dir.glob("*.pth"))
    assert names == ["checkpoint_0.pth", "checkpoint_1.pth"]


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_an_error(tmp_path, score):
    runner = build(tmp_path, ScriptedTask([score]), valid_splits=["val"])
    with pytest.raises(UserError, match="'val' split, epoch 0: 'agg_metrics' is"):
        runner.train()
    assert not list(runner.output_dir.glob("*.pth"))


def test_resume_continues_where_the_checkpoint_ends(tmp_path):
    whole = build(tmp_path, job_id="whole", max_epoch=4, keep_checkpoints=None)
    whole.train()
    saved = torch.load(whole.output_dir / "checkpoint_1.pth", weights_only=True)
    assert "frozen" not in saved["model"]
    assert saved["model"]["slow"] == 20

    path = str(whole.output_dir / "checkpoint_1.pth")
    resumed = build(tmp_path, job_id="resumed", max_epoch=4, resume_ckpt_path=path)
    resumed.train()
    assert {step["epoch"] for step in resumed.model.seen} == {2, 3}
    assert read_metrics(resumed.output_dir)[0]["step"] == 24
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.model.slow == whole.model.slow == 40

    with pytest.raises(UserError, match="run.max_epoch"):
        build(tmp_path, max_epoch=2, resume_ckpt_path=path).train()


OPTIONS = {
    "resume_ckpt_path": "auto",
    "save_every_steps": 3,
    "accum_grad_iters": 2,
    "valid_splits": ["val"],
    "test_splits": ["test"],
    "max_epoch": 3,
}


def interrupted(folder, after, **options):
    return interrupt(build(folder, **{**OPTIONS, **options}), after)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    runner = build(tmp_path_factory.mktemp("whole"), **OPTIONS)
    runner.train()
    return runner


def assert_same(one, other):
    assert not differences(trace(one), other)


def test_interrupted_anywhere_a_run_ends_as_if_it_was_not(tmp_path, whole):
    """At each forward pass of training, validation and test; first, once and then once more."""
    expected = trace(whole.output_dir)
    assert len(expected["metrics.jsonl"]) > 9 and whole.progress.best_epoch is not None
    calls = len(whole.model.seen)
    for after in range(calls):
        folder = tmp_path / str(after)
        first = interrupted(folder, after)
        has_checkpoint = any(first.glob("*.pth"))
        if after % 3 == 0 and has_checkpoint and after + 2 < calls:
            assert interrupted(folder, 1) == first
        again = build(folder, **OPTIONS)
        assert (again.output_dir == first) == has_checkpoint
        again.train()
        assert_same(again.output_dir, expected)


def test_resuming_with_other_saving_times_changes_nothing_that_is_learnt(tmp_path):
    whole = build(tmp_path / "whole")
    whole.train()
    interrupted(tmp_path / "other", 13, save_every_steps=1, accum_grad_iters=1, max_epoch=2)
    again = build(tmp_path / "other", resume_ckpt_path="auto")
    again.train()
    assert torch.equal(weights(again.model), weights(whole.model))


def test_a_finished_run_is_tested_again(tmp_path):
    first = build(tmp_path, **OPTIONS)
    results = first.train()
    expected = trace(first.output_dir)
    again = build(tmp_path, **OPTIONS)
    assert again.output_dir == first.output_dir
    assert again.train() == results
    assert_same(again.output_dir, expected)


def test_the_last_checkpoints_are_kept(tmp_path):
    runner = build(tmp_path, max_epoch=3, save_every_steps=4, keep_checkpoints=3)
    runner.train()
    names = [path.name for path in furthest_first(runner.output_dir)]
    assert names == ["checkpoint_2.pth", "checkpoint_2_28.pth", "checkpoint_2_24.pth"]
    runner = build(tmp_path, job_id="all", max_epoch=2, save_every_steps=4, keep_checkpoints=None)
    runner.train()
    names = [path.name for path in furthest_first(runner.output_dir)]
    assert names == [f"checkpoint_{n}.pth" for n in ("1", "1_16", "1_12", "0", "0_8", "0_4")]


def damage(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "one bit":
        at = content.index(torch.load(path, weights_only=True)["model"]["layer.weight"].numpy())
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif how == "foreign":
        torch.save({"model": {"w": torch.ones(2)}, "optimizer": {}, "epoch": 7}, path)
    elif how == "not finite":
        broken = torch.load(path, weights_only=True)
        broken["model"]["layer.weight"][0, 0] = math.nan
        torch.save(broken, path)
    elif how == "of code":
        torch.save({"model": Path("x"), "optimizer": {}, "epoch": 7}, path)


DAMAGES = ["truncated", "empty", "one bit", "foreign", "not finite", "of code"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_broken_checkpoint_is_refused_by_name_and_the_one_before_used(
    tmp_path, whole, caplog, how
):
    folder = interrupted(tmp_path / "broken", 32)
    newest, before = furthest_first(build(tmp_path / "broken", **OPTIONS).output_dir)
    damage(newest, how)
    again = build(tmp_path / "broken", **OPTIONS)
    with caplog.at_level(logging.INFO):
        again.train()
    refusals = [text for text in caplog.messages if text.startswith("refused")]
    assert len(refusals) == 1 and str(newest) in refusals[0] and "\n" not in refusals[0]
    assert f"resumed from {before}" in caplog.text
    assert_same(folder, trace(whole.output_dir))


def test_no_usable_checkpoint_is_an_error(tmp_path):
    folder = interrupted(tmp_path, 32)
    for path in folder.glob("*.pth"):
        damage(path, "truncated")
    with pytest.raises(UserError, match=r"none of the 2 checkpoints .* start anew"):
        build(tmp_path, **OPTIONS).train()


def test_resuming_by_itself_needs_the_same_model(tmp_path):
    interrupted(tmp_path, 32)
    again = build(tmp_path, **OPTIONS)
    again.resolved_config["model"] = {"itc": {"gamma": 1.0}}
    with pytest.raises(UserError, match=r"had model.itc.gamma = None, this one has 1.0"):
        again.train()


def test_a_refused_resume_leaves_the_folder_as_it_was(tmp_path):
    interrupted(tmp_path, 32)
    names = ("config.yaml", "environment.json")
    folder = next(tmp_path.glob("*/config.yaml")).parent
    before = {name: (folder / name).read_bytes() for name in names}
    again = build(tmp_path, **{**OPTIONS, "seed": 8})
    with pytest.raises(UserError, match="had run.seed = 7, this one has 8"):
        again.train()
    assert {name: (folder / name).read_bytes() for name in names} == before


def test_a_resumed_run_uses_the_options_that_it_records(tmp_path, caplog):
    interrupted(tmp_path, 32)
    again = build(tmp_path, **{**OPTIONS, "weight_decay": 0.5, "beta2": 0.9, "init_lr": 0.2})
    again.train()
    decayed, plain = again.optimizer.param_groups
    assert decayed["weight_decay"] == 0.5 and plain["weight_decay"] == 0
    assert decayed["betas"] == plain["betas"] == (0.9, 0.9)
    changed = [text for text in caplog.messages if text.startswith("run.")]
    assert [text.split()[0] for text in changed] == ["run.beta2", "run.init_lr", "run.weight_decay"]


class Words:
    """A tokenizer, as far as a runner needs one."""

    def __init__(self, *tokens):
        self.tokens = list(tokens)

    def __len__(self):
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids):
        return [self.tokens[i] for i in ids]

    def save_vocabulary(self, folder):
        Path(folder, "vocab.txt").write_text("\n".join(self.tokens))


def test_another_vocabulary_of_the_same_size_is_refused(tmp_path):
    model = ToyModel()
    model.tokenizer = Words("[PAD]", "red", "blue")
    first = build(tmp_path, model=model)
    first.train()
    model = ToyModel()
    model.tokenizer = Words("[PAD]", "red", "green")
    again = build(tmp_path, model=model, resume_ckpt_path="auto", max_epoch=3)
    with pytest.raises(UserError, match="another vocabulary .*token 2 is 'blue', not 'green'"):
        again.train()
    assert (first.output_dir / "vocab.txt").read_text().split() == ["[PAD]", "red", "blue"]


def test_a_new_folder_gets_the_best_checkpoint(tmp_path, caplog):
    scores = [-1.0, -5.0, -4.0]
    options = {"max_epoch": 3, "valid_splits": ["val"], "test_splits": ["test"]}
    first = build(tmp_path, ScriptedTask(scores), keep_checkpoints=None, **options)
    results = first.train()
    path = first.output_dir / "checkpoint_1.pth"
    again = build(tmp_path, ScriptedTask(scores[2:]), resume_ckpt_path=str(path), **options)
    assert again.output_dir != first.output_dir
    assert again.train() == results
    (first.output_dir / "checkpoint_best.pth").unlink()
    again = build(tmp_path, ScriptedTask(scores[2:]), resume_ckpt_path=str(path), **options)
    again.train()
    assert "chosen anew" in caplog.text
    assert again.progress.best_epoch == 2


def test_a_new_folder_does_not_get_a_best_checkpoint_of_later(tmp_path, caplog):
    options = {"valid_splits": ["val"], "test_splits": ["test"], "keep_checkpoints": None}
    first = build(tmp_path, ScriptedTask([-5.0, -1.0]), **options)
    first.train()
    path = str(first.output_dir / "checkpoint_0.pth")
    again = build(tmp_path, ScriptedTask([-6.0]), resume_ckpt_path=path, **options)
    again.train()
    assert "chosen anew" in caplog.text and again.progress.best_epoch == 1
    best = torch.load(again.output_dir / "checkpoint_best.pth", weights_only=True)
    assert best["progress"]["best_score"] == -6.0


def test_with_larger_batches_a_run_goes_on_from_its_last_checkpoint(tmp_path):
    """Its steps are numbered anew, and earlier ones may have higher numbers."""
    splits = {"train": ToyData(160)}
    options = {"save_every_steps": 4, "max_epoch": 1, "resume_ckpt_path": "auto", "splits": splits}
    folder = interrupt(build(tmp_path, **options), 28)
    assert [file.name for file in furthest_first(folder)] == [
        "checkpoint_0_28.pth",
        "checkpoint_0_24.pth",
    ]
    larger = {**options, "batch_size_train": 8}
    interrupt(build(tmp_path, **larger), 4)  # from what is now the 14th step
    assert [file.name for file in furthest_first(folder)] == [
        "checkpoint_0_16.pth",
        "checkpoint_0_14.pth",
    ]
    again = build(tmp_path, **larger)
    again.train()
    assert len(again.model.seen) == 4 and again.step == 20


def test_checkpoints_that_do_not_fit(tmp_path):
    def resume(content):
        torch.save(content, tmp_path / "x.pth")
        build(tmp_path, resume_ckpt_path=str(tmp_path / "x.pth")).train()

    with pytest.raises(UserError, match="no checkpoint at"):
        build(tmp_path, resume_ckpt_path="nowhere.pth").train()
    (tmp_path / "broken.pth").write_bytes(b"half a file")
    with pytest.raises(UserError, match="is no readable checkpoint"):
        build(tmp_path, resume_ckpt_path=str(tmp_path / "broken.pth")).train()
    with pytest.raises(UserError, match="is no readable checkpoint"):
        resume({"model": Path("anything"), "optimizer": {}, "epoch": 0})
    with pytest.raises(UserError, match="no training checkpoint"):
        resume(ToyModel().state_dict())
    state = ToyModel().state_dict()
    with pytest.raises(UserError, match="unknown 1 .*'extra'"):
        resume({"model": {**state, "extra": torch.ones(1)}, "optimizer": {}, "epoch": 0})
    with pytest.raises(UserError, match="layer.weight"):
        resume({"model": {**state, "layer.weight": torch.ones(3)}, "optimizer": {}, "epoch": 0})
    with pytest.raises(UserError, match="lacks 1 .*'temp'"):
        del state["temp"], state["frozen"]
        resume({"model": state, "optimizer": {}, "epoch": 0})


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    runner = build(tmp_path)
    runner.train()
    path = runner.output_dir / "checkpoint_1.pth"
    before = path.read_bytes()

    def die(content, target):
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with runner.log.progress(0, 1), pytest.raises(KeyboardInterrupt):
        runner._save_checkpoint(1)
        runner.files.finish()
    assert path.read_bytes() == before


# For a run of half the time: four steps in each of its three epochs, in place of six
SHORTER = {
    "datasets.scenes_retrieval.num.train": 48,
    "model.vit.depth": 1,
    "model.vit.patch_size": 20,
}


def test_killed_at_random_moments_a_real_run_ends_as_if_it_was_not(monkeypatch):
    """SIGKILL, 20 times at least: in steps, evaluations and the writing of checkpoints."""
    monkeypatch.setattr(kills, "OPTIONS", {**kills.OPTIONS, **SHORTER})
    done = forked(kills.main, ["--kills", "20", "--workers", "0"])
    assert done.returncode == 0, done.stdout + done.stderr
    killed, ended, differing = map(
        int,
        re.match(r"(\d+) times SIGKILL .*?; (\d+) runs ended, (\d+) diff", done.stdout).groups(),
    )
    assert killed >= 20 and ended >= 1 and differing == 0
    assert all(phase in done.stdout for phase in ("step", "evaluation", "checkpoint"))
