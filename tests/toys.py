"""A toy model, data set and task for softmask_runner; ``build`` makes a run of them."""

from __future__ import annotations

import itertools
import json
import random

import softmask_plugin  # noqa: F401  (first: it makes `import lavis` work)

# isort: split
import numpy as np
import pytest
import torch
from lavis.common.config import Config
from lavis.datasets.datasets.base_dataset import BaseDataset
from lavis.models import BaseModel
from lavis.tasks.base_task import BaseTask
from omegaconf import OmegaConf
from torch import nn

from softmask_plugin.runners import SoftmaskRunner


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


def interrupt(runner, after):
    """Train until the model was called so often, in evaluations too; return the run's folder."""
    calls = itertools.count()

    def stop(*_):
        if next(calls) == after:
            raise KeyboardInterrupt

    runner.model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    return runner.output_dir


def read_metrics(output_dir, split="train"):
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["split"] == split]


def weights(model):
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])
