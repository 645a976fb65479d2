"""Numbers that are not finite: where they may not get, and what the user is told."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from toys import ToyData, ToyModel, build, read_metrics, weights

from softmask_plugin import launch
from softmask_plugin.cli import main
from softmask_plugin.errors import UserError
from softmask_plugin.files.checkpoint import ASSETS
from softmask_plugin.models.pretrain import SoftMaskPretrain
from softmask_plugin.models.vqa import SoftMaskVqa


def spoiled(*indices, value=math.nan):
    data = ToyData(42)
    data.images[list(indices)] = value
    return data


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_sample_costs_one_step_and_is_named(tmp_path, caplog, value):
    runner = build(tmp_path, splits={"train": spoiled(17, value=value)})
    runner.train()
    assert weights(runner.model).isfinite().all()
    lines = read_metrics(runner.output_dir)
    assert lines[-1]["skipped_steps"] == runner.bad_steps.total >= 1
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    told = [text for text in caplog.messages if text.startswith("skipped step")]
    assert len(told) == runner.bad_steps.total
    assert re.match(
        r"skipped step \d+: loss_itc is (nan|inf), loss is (nan|inf); samples ", told[0]
    )
    assert "17" in told[0].partition("samples")[2].replace(",", " ").split()


def test_a_skipped_step_leaves_no_trace(tmp_path):
    """The optimizer takes the steps that it would take without the bad ones."""
    runner = build(tmp_path, splits={"train": spoiled(17)}, max_epoch=1)
    runner.train()
    state = runner.optimizer.state_dict()["state"]
    assert {int(each["step"]) for each in state.values()} == {9}
    losses = [s["loss"] for s in runner.model.seen if math.isfinite(s["loss"])]
    assert len(losses) == 9
    log = (runner.output_dir / "log.txt").read_text().splitlines()
    assert json.loads(log[-1])["train_loss"] == pytest.approx(sum(losses) / 9)


class BadGradient(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, grad):
        return grad * math.inf


class BadTemperature(ToyModel):
    """The gradient of one parameter is not finite."""

    def forward(self, samples):
        output = super().forward(samples)
        if self.training and len(self.seen) == 3:
            output["loss"] = output["loss"] + 0 * BadGradient.apply(self.temp).sum()
        return output


@pytest.mark.parametrize("limit", [None, 1.0])
def test_only_bad_parameters_are_named(tmp_path, caplog, limit):
    build(tmp_path, model=BadTemperature(), max_epoch=1, clip_grad_norm=limit).train()
    assert "the gradient of 1 parameters is not finite, first temp" in caplog.text


class FlakyModel(ToyModel):
    """A gradient that is not finite while the loss is."""

    def forward(self, samples):
        output = super().forward(samples)
        if self.training and len(self.seen) in (3, 4):
            output["loss"] = BadGradient.apply(output["loss"])
        return output


def test_a_bad_gradient_is_a_bad_step(tmp_path, caplog):
    runner = build(tmp_path, model=FlakyModel())
    runner.train()
    assert runner.bad_steps.total == 2 and weights(runner.model).isfinite().all()
    assert "the gradient of 3 parameters is not finite, first temp" in caplog.text


def scaled(runner):
    """Scale losses as fp16 does on CUDA."""
    runner._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return runner


def test_fp16_counts_and_names_a_bad_loss(tmp_path, caplog):
    runner = scaled(build(tmp_path, splits={"train": spoiled(17)}))
    runner.train()
    assert weights(runner.model).isfinite().all() and runner.bad_steps.total >= 1
    named = [text for text in caplog.messages if text.startswith("skipped step")]
    assert len(named) == runner.bad_steps.total
    assert "17" in named[0].partition("samples")[2].replace(",", " ").split()


def test_fp16_looks_for_its_scale_without_counting(tmp_path):
    runner = scaled(build(tmp_path, model=FlakyModel()))
    runner.train()
    assert runner.bad_steps.total == 0 and weights(runner.model).isfinite().all()
    assert runner.scaler.get_scale() == 2.0**8  # halved twice


def test_an_accumulated_group_is_skipped_whole(tmp_path):
    runner = build(tmp_path, splits={"train": spoiled(17)}, accum_grad_iters=5, max_epoch=1)
    runner.train()
    assert runner.bad_steps.total == 1
    state = runner.optimizer.state_dict()["state"]
    assert {int(each["step"]) for each in state.values()} == {1}


def test_too_many_in_a_row_end_the_run(tmp_path):
    runner = build(tmp_path, splits={"train": spoiled(*range(42))}, max_bad_steps=3)
    with pytest.raises(UserError) as error:
        runner.train()
    message = str(error.value)
    assert re.match(
        r"stopped: 3 steps in a row .*, last step 3: loss_itc is nan, loss is nan; "
        r"samples \d+, \d+, \d+, \d+; lower run.init_lr.*'softmask replay .*bad_step_3_rank0.pth'",
        message,
    )
    assert "\n" not in message
    assert not list(runner.output_dir.glob("checkpoint_*"))


def test_bad_steps_are_counted_across_a_restart(tmp_path):
    options = {"splits": {"train": spoiled(*range(42))}, "save_every_steps": 1, "max_bad_steps": 5}
    first = build(tmp_path, **options)
    first.bad_steps.limit = 2
    with pytest.raises(UserError, match="2 steps in a row"):
        first.train()
    again = build(tmp_path, resume_ckpt_path="auto", **options)
    with pytest.raises(UserError, match="5 steps in a row.*last step 5"):
        again.train()


@pytest.mark.parametrize(
    "option", ["max_bad_steps", "keep_checkpoints", "save_every_steps", "accum_grad_iters"]
)
@pytest.mark.parametrize("value", [0, -1, "many", 1.5, True])
def test_counts_are_checked(tmp_path, option, value):
    with pytest.raises(UserError, match=f"run.{option} is {value!r}: it must be a whole number"):
        build(tmp_path, **{option: value})


def test_numbers_given_as_text_are_numbers(tmp_path):
    texts = {"keep_checkpoints": "2", "save_every_steps": "3", "beta2": "0.98", "max_epoch": "1"}
    runner = build(tmp_path, max_bad_steps="4", clip_grad_norm="0.5", **texts)
    runner.train()
    assert runner.bad_steps.limit == 4 and runner.optimizer.param_groups[0]["betas"][1] == 0.98


# ---- pretraining


def poisoned(batch):
    batch = copy.deepcopy(batch)
    batch["image"][1, 0, 3, 3] = math.nan
    return batch


def step(runner, batch, i):
    runner.train_step(iter([batch]), group=range(i, i + 1))


@pytest.fixture
def pretraining(tmp_path, make_model):
    def make(**options):
        model = make_model(momentum=0.9, alpha=0.4)
        runner = build(tmp_path, model=model, job_id="run", **options)
        runner.model.train()
        return runner

    return make


def test_a_bad_image_reaches_neither_queues_nor_momentum_nor_optimizer(pretraining, make_batch):
    good, bad = make_batch(4), poisoned(make_batch(4))
    runner, twin = pretraining(), pretraining()
    for each, batches in ((runner, [good, bad, bad, good]), (twin, [good, None, None, good])):
        for i, batch in enumerate(batches):
            if batch is not None:
                step(each, copy.deepcopy(batch), i)
    state, expected = runner._model.state_dict(), twin._model.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    assert runner.bad_steps.total == 2 and int(state["queue_ptr"]) == 8
    for one, other in zip(
        runner.optimizer.state_dict()["state"].values(),
        twin.optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_accumulated_batches_move_queue_and_momentum_once(pretraining, make_batch):
    runner = pretraining(accum_grad_iters=3)
    before = copy.deepcopy(runner._model.state_dict())
    batches = [make_batch(size) for size in (2, 3, 4)]
    runner.train_step(iter(copy.deepcopy(batches)))
    after = copy.deepcopy(runner._model.state_dict())
    assert int(after["queue_ptr"]) == 9
    name = "text_encoder.bert.encoder.layer.4.output.dense.weight"
    slow = name.replace("text_encoder", "text_encoder_m")
    assert not torch.equal(after[name], before[name])
    torch.testing.assert_close(after[slow], before[slow].lerp(after[name], 1 - 0.9))

    queue = after["image_queue"]  # features by the momentum model as it was before the step
    with torch.no_grad():
        model = runner._model
        model.load_state_dict(before)
        for batch, columns in zip(batches, (slice(0, 2), slice(2, 5), slice(5, 9)), strict=True):
            states = model.visual_encoder_m(batch["image"])
            feats = torch.nn.functional.normalize(model.vision_proj_m(states[:, 0]), dim=-1)
            torch.testing.assert_close(queue[:, columns], feats.T)


def explode(patch, cls):
    """Let a block of the image encoder of new models give values of 1e30 and more."""
    original = cls.from_config

    def exploding(_, config):
        model = original(config)
        with torch.no_grad():
            model.visual_encoder.blocks[0].mlp.fc1.weight.fill_(1e30)
        return model

    patch.setattr(cls, "from_config", classmethod(exploding))


def test_replay_finds_where_it_began(tmp_path, capsys, monkeypatch):
    options = ["datasets.scenes_pretrain.num.train=8", "run.batch_size_train=4"]
    options += [f"run.output_dir={tmp_path}", "run.max_bad_steps=2", "run.max_epoch=1"]
    words = shutil.copy(ASSETS / "scenes_vocab.txt", tmp_path / "words.txt")
    options.append(f"model.tokenizer={words}")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="2 steps in a row"):
        explode(patch, SoftMaskPretrain)
        launch.run("scenes/train/pretrain_tiny", options)
    (file,) = tmp_path.glob("*/bad_step_2_rank0.pth")
    Path(words).unlink()  # the run's folder has them
    assert main(["replay", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("losses: ") and "loss_itc nan" in line for line in lines)
    assert (
        "first output that is not finite: visual_encoder.blocks.1.norm1" in lines
    )  # its variance overflows
    (grads,) = [line for line in lines if line.startswith("gradients that are not finite")]
    assert not grads.startswith("gradients that are not finite: 0 ")


def test_a_bad_step_of_questions_is_replayed(tmp_path, capsys, monkeypatch):
    """Its batch has weights, one a question, and its YAML loads a checkpoint."""
    options = ["datasets.scenes_vqa.num.train=8", "run.batch_size_train=4", "run.max_epoch=1"]
    options += [f"run.output_dir={tmp_path}", "run.max_bad_steps=1", "model.load_finetuned=false"]
    with monkeypatch.context() as patch, pytest.raises(UserError, match="1 steps in a row"):
        explode(patch, SoftMaskVqa)
        launch.run("scenes/train/vqa_tiny", options)
    (file,) = tmp_path.glob("*/bad_step_1_rank0.pth")
    assert main(["replay", str(file)]) == 0
    assert "first output that is not finite: visual_encoder." in capsys.readouterr().out


def test_replay_builds_no_model_that_is_far_larger_than_its_file(tmp_path, capsys):
    bert = {"layers": 4, "fusion_layer": 2, "width": 96, "heads": 4, "vocab_size": 10**6}
    model = {"arch": "softmask_pretrain", "tokenizer": "scenes", "queue_size": 0, "bert": bert}
    content = {"config": {"model": model, "run": {"seed": 0}}, "batches": [], "step": 1, "rank": 0}
    torch.save({"model": {}, **content}, tmp_path / "x.pth")
    assert main(["replay", str(tmp_path / "x.pth")]) == 2
    assert "the model, which would be far larger" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_replay_of_another_file_is_one_line(tmp_path, capsys, content):
    file = tmp_path / "x.pth"
    if content is None:
        torch.save({"model": {}}, file)
    else:
        file.write_bytes(content)
    assert main(["replay", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("softmask: error: ") and "bad_step_<step>" in error
    assert error.count("\n") == 1
