"""softmask_runner on a toy model; run as a script under torchrun, it is the two-process test."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import softmask_plugin  # noqa: F401  (first: it makes `import lavis` work)

# isort: split
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from lavis.common.config import Config
from lavis.common.registry import registry
from lavis.datasets.datasets.base_dataset import BaseDataset
from lavis.models import BaseModel
from lavis.tasks.base_task import BaseTask
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import ChainDataset

from softmask_plugin.errors import UserError
from softmask_plugin.launch import leave_distributed
from softmask_plugin.runners import CosineLRScheduler, SoftmaskRunner
from softmask_plugin.runners.loaders import train_loader
from softmask_plugin.runners.logs import LossMeter


class ToyConfig(Config):
    """LAVIS's configuration of a run, without the files."""

    def __init__(self, **run):
        self.config = OmegaConf.create({"run": run, "model": {}, "datasets": {}})


class ToyModel(BaseModel):
    """Regression with two loss terms, a temperature, a frozen parameter and a buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1).double()
        nn.init.constant_(self.layer.weight, 0.1)
        nn.init.zeros_(self.layer.bias)
        self.temp = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.tensor(1.0), requires_grad=False)
        self.register_buffer("slow", torch.zeros(()))
        self.seen: list[dict] = []

    def forward(self, samples):
        guess = self.layer(samples["image"]).squeeze(1)
        itc = (guess - samples["target"]).square().mean()
        itm = self.temp.square()
        self.seen.append(
            {
                "training": self.training,
                "dtype": guess.dtype,
                "loss": (itc + itm).item(),
                "loss_itc": itc.item(),
                "loss_itm": itm.item(),
                **{key: samples.get(key) for key in ("epoch", "iters", "num_iters_per_epoch")},
            }
        )
        if self.training:
            self.slow += 1
        return {"loss": itc + itm, "loss_itc": itc, "loss_itm": itm, "loss_soft": None}


class ToyData(BaseDataset):
    def __init__(self, size, offset=0.0):
        super().__init__()
        self.annotation = [{} for _ in range(size)]
        generator = torch.Generator().manual_seed(size)
        self.images = torch.randn(size, 4, generator=generator, dtype=torch.float64)
        self.offset = offset

    def __getitem__(self, index):
        image = self.images[index]
        return {"image": image, "target": image.sum() + self.offset, "image_id": index}


class DrawingData(ToyData):
    """Items that draw from every generator a processor may use."""

    def __getitem__(self, index):
        draws = [torch.rand(()).item(), np.random.rand(), random.random()]
        return {"draws": torch.tensor([index, *draws], dtype=torch.float64)}


class ToyTask(BaseTask):
    """Evaluates to minus the mean loss: never above 0, where LAVIS's own runner starts."""

    def valid_step(self, model, samples):
        return [model(samples)["loss"].item()]

    def after_evaluation(self, val_result, **kwargs):
        return {"agg_metrics": -sum(val_result) / len(val_result)}


class ScriptedTask(ToyTask):
    """Validation scores given beforehand."""

    def __init__(self, scores):
        super().__init__()
        self.scores = list(scores)

    def after_evaluation(self, val_result, split_name, **kwargs):
        if split_name == "val":
            return {"agg_metrics": self.scores.pop(0)}
        return super().after_evaluation(val_result)


RUN = {
    "device": "cpu",
    "seed": 7,
    "max_epoch": 2,
    "init_lr": 0.1,
    "min_lr": 0.01,
    "warmup_lr": 0.001,
    "warmup_steps": 3,
    "weight_decay": 0.05,
    "lr_sched": "softmask_cosine_lr",
    "batch_size_train": 4,
    "batch_size_eval": 4,
    "num_workers": 0,
    "log_freq": 4,
    "train_splits": ["train"],
}


def build(output_dir, task=None, model=None, job_id="job", splits=None, **run):
    splits = splits or {"train": ToyData(42), "val": ToyData(10), "test": ToyData(9)}
    return SoftmaskRunner(
        cfg=ToyConfig(**{**RUN, "output_dir": str(output_dir), **run}),
        task=task or ToyTask(),
        model=model or ToyModel(),
        datasets={"toy": splits},
        job_id=job_id,
    )


def read_metrics(output_dir, split="train"):
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["split"] == split]


def weights(model):
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


# ---- schedule


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


# ---- training


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
        {"train_lr", "train_loss", "train_loss_itc", "train_loss_itm"},
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
        runner.train_loader.sampler.set_epoch(epoch)
        batches = list(runner.train_loader)
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


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("amp", "fp16", "bf16"),
        ("amp", "half", "run.amp"),
        ("accum_grad_iters", 0, "run.accum_grad_iters"),
        ("log_freq", 0, "run.log_freq"),
        ("compile", "inductr", r"run.compile is 'inductr'.*'inductor'"),
    ],
)
def test_options_that_cannot_work(tmp_path, option, value, message):
    with pytest.raises(UserError, match=message):
        build(tmp_path, **{option: value})


def test_compiled_image_encoder(tmp_path, make_model, make_batch):
    """``run.compile`` changes neither the names of weights nor the gradients."""
    plain, compiled = make_model(), make_model()
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


def test_diverged_training_stops_before_it_is_saved(tmp_path):
    data = ToyData(42)
    data.images[17] = math.inf
    runner = build(tmp_path, splits={"train": data})
    with pytest.raises(UserError, match=r"epoch 0, by step .*'loss' is .*run.init_lr"):
        runner.train()
    assert not list(runner.output_dir.glob("*.pth"))


# ---- data


def test_too_little_data(tmp_path):
    with pytest.raises(
        UserError, match="'train' split has 3 items.* batch of 4 .*batch_size_train"
    ):
        build(tmp_path, splits={"train": ToyData(3)}).train()
    with pytest.raises(UserError, match="'test' split has 0 items"):
        build(tmp_path, splits={"test": ToyData(0)}, test_splits=["test"]).evaluate("best", True)
    with pytest.raises(UserError, match="no data set has a 'dev' split"):
        build(tmp_path, test_splits=["dev"]).evaluate("best", True)


def test_data_sets_are_concatenated(tmp_path):
    runner = build(tmp_path)
    runner.datasets["more"] = {"train": ToyData(18)}
    assert len(runner.train_loader) == 60 // 4


def test_streams_are_refused():
    with pytest.raises(UserError, match="runner_iter"):
        train_loader(ChainDataset([]), 4, 0, None, False, seed=0)


def draw(num_workers, epochs, seed=0):
    loader = train_loader(DrawingData(24), 4, num_workers, None, False, seed)
    found = []
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        found.append(torch.cat([batch["draws"] for batch in loader]))
    return found


def test_order_and_draws_depend_on_seed_and_epoch_alone():
    first, second, third = draw(0, [0, 1, 2])
    for indices, *_ in (first.T, second.T):
        assert sorted(indices.tolist()) == list(range(24))
    by_index = [epoch[epoch[:, 0].argsort()] for epoch in (first, second)]
    assert not (first[:, 0] == second[:, 0]).all()
    assert (by_index[0][:, 1:] != by_index[1][:, 1:]).all()
    assert (draw(0, [0], seed=1)[0][:, 1:] != first[:, 1:]).all()
    assert torch.equal(draw(0, [2])[0], third)  # a restart
    workers = draw(2, [1, 2])
    assert torch.equal(workers[0], second)
    assert torch.equal(workers[1], third)


def test_loading_leaves_the_models_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    draw(0, [0])
    assert torch.initial_seed() == 3
    assert torch.equal(torch.rand(5), expected)


# ---- evaluation and checkpoints


def test_best_epoch_is_kept_and_tested(tmp_path):
    task = ScriptedTask([-5.0, -1.0, -3.0])
    runner = build(tmp_path, task, max_epoch=3, valid_splits=["val"], test_splits=["test"])
    results = runner.train()
    assert [line["agg_metrics"] for line in read_metrics(runner.output_dir, "val")] == [
        -5.0,
        -1.0,
        -3.0,
    ]
    assert [path.name for path in runner.output_dir.glob("*.pth")] == ["checkpoint_best.pth"]
    best = torch.load(runner.output_dir / "checkpoint_best.pth", weights_only=True)
    assert best["epoch"] == 1
    assert set(best) == {"model", "optimizer", "config", "scaler", "epoch"}
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


def test_resume_goes_on_where_the_checkpoint_ends(tmp_path):
    whole = build(tmp_path, job_id="whole", max_epoch=4)
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


def test_checkpoints_that_do_not_fit(tmp_path):
    def resume(content):
        torch.save(content, tmp_path / "x.pth")
        build(tmp_path, resume_ckpt_path=str(tmp_path / "x.pth")).train()

    with pytest.raises(UserError, match="no checkpoint at"):
        build(tmp_path, resume_ckpt_path="nowhere.pth").train()
    (tmp_path / "broken.pth").write_bytes(b"half a file")
    with pytest.raises(UserError, match="cannot be read"):
        build(tmp_path, resume_ckpt_path=str(tmp_path / "broken.pth")).train()
    with pytest.raises(UserError, match="cannot be read"):
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
    with pytest.raises(KeyboardInterrupt):
        runner._save_checkpoint(1)
    assert path.read_bytes() == before


def test_means_of_the_meter():
    meter = LossMeter()
    for value in (1.0, 2.0, 6.0):
        meter.add("loss", torch.tensor(value))
    meter.add("loss_soft", torch.tensor(4.0))
    assert meter.drain() == {"loss": 3.0, "loss_soft": 4.0}
    assert meter.drain() == {}
    meter.add("loss", torch.tensor(5.0))
    assert meter.drain() == {"loss": 5.0}
    assert meter.means() == {"loss": 3.5, "loss_soft": 4.0}


# ---- two processes

TWO_PROCESSES = {"accum_grad_iters": 2, "valid_splits": ["val"], "test_splits": ["test"]}


def main(output_dir):
    """What each process of the test below runs."""
    dist.init_process_group("gloo")
    runner = build(output_dir, batch_size_train=4, distributed=True, **TWO_PROCESSES)
    runner.train()
    everyone = [None, None]
    model = runner.model.module
    dist.all_gather_object(everyone, weights(model))
    assert torch.equal(*everyone), "the ranks' weights differ"
    if dist.get_rank() == 0:
        torch.save(everyone[0], Path(output_dir) / "weights.pth")
    del runner, model
    leave_distributed()


def test_two_processes_train_like_one(tmp_path):
    """torchrun with gloo: same weights on both ranks, and those of one process with big batches."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr

    alone = build(tmp_path, job_id="alone", batch_size_train=8, **TWO_PROCESSES)
    alone.train()
    together = torch.load(tmp_path / "weights.pth", weights_only=True)
    torch.testing.assert_close(together, weights(alone.model), rtol=1e-12, atol=1e-12)

    lines, expected = read_metrics(tmp_path / "job"), read_metrics(alone.output_dir)
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == [3, 4, 6]
    for term in ("loss", "loss_itc", "loss_itm", "lr"):
        assert [line[term] for line in lines] == pytest.approx([line[term] for line in expected])


if __name__ == "__main__":
    main(sys.argv[1])
