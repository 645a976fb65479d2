"""softmask_runner on a toy model."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch import nn
from toy_models import SMALL
from toys import ToyModel, ToyTask, build, read_metrics, weights

from softmask_plugin.errors import UserError
from softmask_plugin.runners import CosineLRScheduler, portable
from softmask_plugin.runners.meter import LossMeter


def test_logs_every_term_and_the_true_rate(tmp_path):
    runner = build(tmp_path)
    rates = []
    runner.optimizer.register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
    runner.train()

    seen, lines = runner.model.seen, read_metrics(runner.output_dir)
    assert [line["step"] for line in lines] == [4, 8, 10, 12, 16, 20]
    assert [line["epoch"] for line in lines] == [0, 0, 0, 1, 1, 1]
    first = 0
    for line in lines:
        window = seen[first : line["step"]]
        for term in ("loss", "loss_itc", "loss_itm"):
            mean = sum(step[term] for step in window) / len(window)
            assert line[term] == pytest.approx(mean, rel=1e-6)
        assert "loss_soft" not in line
        assert line["lr"] == rates[line["step"] - 1]
        first = line["step"]
    assert lines[-1]["temp"] == runner.model.temp.item()
    assert rates == [runner.lr_scheduler.lr_at(step) for step in range(20)]
    assert rates[0] == 0.001
    assert max(rates) == rates[3] == 0.1
    assert all(line["pairs_per_s"] > 0 for line in lines)
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_tells_the_model_where_it_is(tmp_path):
    runner = build(tmp_path)
    runner.train()
    where = [(s["epoch"], s["iters"], s["num_iters_per_epoch"]) for s in runner.model.seen]
    assert where == [(epoch, i, 10) for epoch in range(2) for i in range(10)]


def test_log_txt_keeps_the_hosts_form(tmp_path):
    runner = build(tmp_path, valid_splits=["val"], test_splits=["test"])
    runner.train()
    config, lines = (runner.output_dir / "log.txt").read_text().split("\n}\n")
    assert json.loads(config + "}") == runner.config.to_dict()
    lines = list(map(json.loads, lines.splitlines()))
    assert [set(line) for line in lines[:2]] == [
        {"train_lr", "train_grad_norm", "train_loss", "train_loss_itc", "train_loss_itm"},
        {"val_agg_metrics", "val_best_epoch"},
    ]
    assert set(lines[-1]) == {"test_agg_metrics"}
    epoch = [step["loss"] for step in runner.model.seen if step["training"]][:10]
    assert lines[0]["train_loss"] == pytest.approx(sum(epoch) / 10, rel=1e-6)
    assert OmegaConf.load(runner.output_dir / "config.yaml") == runner.config.get_config()


def test_plain_progress_where_there_is_no_terminal(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        build(tmp_path).train()
    line = next(text for text in caplog.messages if "step 4/20" in text)
    assert all(word in line for word in ("loss ", "loss_itc ", "lr ", "pairs/s", "left"))


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_weights_are_those_of_a_plain_loop(tmp_path, accumulate):
    """A step is AdamW on the mean loss of its batches, the epoch's left-over ones included."""
    runner = build(tmp_path, accum_grad_iters=accumulate, clip_grad_norm=0.5, max_epoch=2)
    runner.train()

    twin = ToyModel()
    plain, decayed = [twin.layer.bias, twin.temp], [twin.layer.weight]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer, step = torch.optim.AdamW(groups), 0
    schedule = CosineLRScheduler(
        optimizer, 2, 0.01, 0.1, math.ceil(10 / accumulate), warmup_steps=3, warmup_start_lr=0.001
    )
    for epoch in range(2):
        batches = list(runner.train_loader.batches(epoch, 0))
        for first in range(0, 10, accumulate):
            group = batches[first : first + accumulate]
            big = {key: torch.cat([batch[key] for batch in group]) for key in ("image", "target")}
            optimizer.zero_grad()
            twin(big)["loss"].backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            optimizer.param_groups[0]["lr"] = schedule.lr_at(step)
            optimizer.param_groups[1]["lr"] = schedule.lr_at(step)
            optimizer.step()
            step += 1
    assert runner.step == step
    torch.testing.assert_close(weights(runner.model), weights(twin), rtol=1e-12, atol=1e-12)


def test_two_runs_in_one_process(tmp_path):
    first, second = build(tmp_path, job_id="a"), build(tmp_path, job_id="b")
    first.train()
    second.train()
    assert registry.get_path("output_dir") == str(tmp_path / "b") == str(second.output_dir)
    assert torch.equal(weights(first.model), weights(second.model))


def test_hosts_schedule(tmp_path):
    runner = build(tmp_path, lr_sched="linear_warmup_cosine_lr")
    runner.train()
    assert read_metrics(runner.output_dir)[0]["lr"] == pytest.approx(0.1)
    assert read_metrics(runner.output_dir)[-1]["lr"] == pytest.approx((0.1 + 0.01) / 2)


@pytest.mark.parametrize("amp", [True, "bf16"])
def test_mixed_precision(tmp_path, amp):
    runner = build(tmp_path, model=ToyModel().float(), amp=amp, valid_splits=["val"])
    runner.datasets["toy"]["train"].images = runner.datasets["toy"]["train"].images.float()
    runner.datasets["toy"]["val"].images = runner.datasets["toy"]["val"].images.float()
    runner.train()
    assert {step["dtype"] for step in runner.model.seen} == {torch.bfloat16}
    assert (
        read_metrics(runner.output_dir)[-1]["loss"] < read_metrics(runner.output_dir)[0]["loss"] / 2
    )


@pytest.mark.parametrize("fast", [True, False])
def test_precision_that_the_device_is_made_for(tmp_path, monkeypatch, caplog, fast):
    monkeypatch.setattr(portable, "has_bf16", lambda device: fast)
    assert build(tmp_path, amp="auto").amp_dtype == (torch.bfloat16 if fast else None)
    assert not caplog.messages
    assert build(tmp_path, amp="bf16").amp_dtype == torch.bfloat16
    assert ["emulates bf16" in message for message in caplog.messages] == [True] * (not fast)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("amp", "fp16", "bf16"),
        ("amp", "half", "run.amp"),
        ("compile", "inductr", r"run.compile is 'inductr'.*'inductor'"),
    ],
)
def test_options_that_cannot_work(tmp_path, option, value, message):
    with pytest.raises(UserError, match=message):
        build(tmp_path, **{option: value})


@pytest.mark.parametrize("patch_dropout", [0.0, 0.5])
def test_compiled_image_encoder(tmp_path, make_model, make_batch, patch_dropout):
    """``run.compile`` changes neither the names of weights nor the gradients."""
    vit = {**SMALL["vit"], "patch_dropout": patch_dropout}
    plain, compiled = make_model(vit=vit), make_model(vit=vit)
    runner = build(tmp_path, model=compiled, compile="aot_eager")
    for model in (plain, runner.model):
        torch.manual_seed(0)
        model.train()(make_batch())["loss"].backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"
    grads = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in compiled.named_parameters():
        torch.testing.assert_close(parameter.grad, grads.pop(name), rtol=1e-4, atol=1e-6)
    assert not grads


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_wanted_where_there_is_none(tmp_path):
    with pytest.raises(UserError, match="run.device=cpu"):
        build(tmp_path, device="cuda")


def test_means_of_the_meter():
    meter = LossMeter()
    for value in (1.0, 2.0, 6.0):
        meter.add("loss", torch.tensor(value))
        meter.keep()
    meter.add("loss_soft", torch.tensor(4.0))
    meter.keep()
    assert meter.drain() == {"loss": 3.0, "loss_soft": 4.0}
    assert meter.drain() == {}
    meter.add("loss", torch.tensor(5.0))
    meter.keep()
    assert meter.drain() == {"loss": 5.0}
    assert meter.means() == {"loss": 3.5, "loss_soft": 4.0}


# ---- run.max_steps


def test_max_steps_ends_the_run_and_its_schedule(tmp_path):
    given = {"valid_splits": ["val"], "test_splits": ["test"]}
    runner = build(tmp_path, **given, max_steps=13, max_epoch=2)
    runner.train()
    trained = [step for step in runner.model.seen if step["training"]]
    assert [(step["epoch"], step["iters"]) for step in trained] == [
        *((0, i) for i in range(10)),
        *((1, i) for i in range(3)),
    ]
    assert [line["step"] for line in read_metrics(runner.output_dir)] == [4, 8, 10, 12, 13]
    assert [line["step"] for line in read_metrics(runner.output_dir, "val")] == [10, 13]
    (line,) = read_metrics(runner.output_dir, "test")
    assert (line["epoch"], line["step"]) == (1, 13)
    schedule = runner.lr_scheduler
    assert schedule.total_steps == 13 and schedule.lr_at(13) == pytest.approx(0.01)

    without = build(tmp_path / "without", **given, max_steps=13, max_epoch=None)
    without.train()
    assert torch.equal(weights(without.model), weights(runner.model))
    longer = build(tmp_path / "longer", max_steps=21, max_epoch=2)
    assert longer.total_steps == 20


def test_max_steps_and_resume(tmp_path):
    """It resumes exactly; done, it is only tested again; raised, the cut epoch goes on."""
    given = {"max_epoch": None, "valid_splits": ["val"], "test_splits": ["test"]}
    given |= {"accum_grad_iters": 2, "lr_sched": "linear_warmup_cosine_lr", "lr_decay_rate": None}

    def train(name, **options):
        runner = build(tmp_path / name, **{**given, **options})
        runner.train()
        steps = [step["loss"] for step in runner.model.seen if step["training"]]
        return weights(runner.model), (runner.output_dir / "log.txt").read_text(), steps

    whole, text, steps = train("whole", max_steps=8)
    stopped = build(tmp_path / "killed", **given, max_steps=8, save_every_steps=3)
    stopped._validate = lambda epoch: 1 / (1 - epoch)  # fails after step 8, before its checkpoint
    with pytest.raises(ZeroDivisionError):
        stopped.train()
    resumed, _, taken = train("killed", max_steps=8, resume_ckpt_path="auto")
    assert taken == steps[12:]  # two batches a step
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)

    again, after, taken = train("whole", max_steps=8, resume_ckpt_path="auto")
    assert (torch.equal(again, whole), after, taken) == (True, text, [])

    longer, _, steps = train("longer", max_steps=10)
    raised, _, taken = train("whole", max_steps=10, resume_ckpt_path="auto")
    assert len(taken) == 4 and torch.equal(raised, longer)

    checkpoint = str(tmp_path / "longer" / "job" / "checkpoint_1.pth")
    with pytest.raises(UserError, match="all 10 steps done: raise .*run.max_steps"):
        train("file", max_steps=10, resume_ckpt_path=checkpoint)


def test_a_task_may_return_the_terms_beside_the_loss(tmp_path):
    """As LAVIS's tasks do after 1.0.2."""

    class Task(ToyTask):
        def train_step(self, model, samples):
            output = model(samples)
            return output["loss"], {"loss_itc": output["loss_itc"]}

    runner, twin = (build(tmp_path / name, task) for name, task in (("a", Task()), ("b", None)))
    runner.train()
    twin.train()
    assert torch.equal(weights(runner.model), weights(twin.model))
