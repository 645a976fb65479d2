"""LAVIS's own ``runner_base``, unmodified: it saves all that our models need, and resumes there."""

from __future__ import annotations

import copy

import pytest
import torch
from lavis.common.registry import registry
from lavis.runners.runner_base import RunnerBase
from lavis.tasks.base_task import BaseTask
from toy_models import BLIP, EVERY_MODEL
from toys import RUN, ToyConfig

from softmask_plugin.models import SoftMaskClassification, SoftMaskPretrain, SoftMaskRetrieval
from softmask_plugin.runners import SoftmaskRunner

EPOCHS, STEPS = 3, 3


def batches(make_batch):
    for step in range(STEPS):
        batch = make_batch(4 + step % 2)
        for key in ("epoch", "iters", "num_iters_per_epoch"):
            del batch[key]
        ids = torch.arange(len(batch["text_input"]))
        yield {**batch, "image_id": ids, "label": ids % 2}


def host(folder, model, data, resume=None):
    """The host's runner over batches."""
    for name in ("output_dir", "result_dir"):
        registry.mapping["paths"].pop(name, None)
    run = {
        **{"device": "cpu", "distributed": False, "evaluate": False, "max_epoch": EPOCHS},
        **{"init_lr": 1e-2, "min_lr": 1e-3, "weight_decay": 0.02, "amp": False},
        **{"lr_sched": "linear_warmup_cosine_lr", "output_dir": str(folder)},
        "resume_ckpt_path": resume,
    }
    runner = RunnerBase(ToyConfig(**run), BaseTask(), model, {}, "job")
    runner._dataloaders = {"train": data}  # its own loaders want a CUDA stream
    runner._device = torch.device("cpu:0")  # a model that is on the device already it leaves unset
    assert runner.model is model
    runner._device = torch.device("cpu")
    return runner


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SoftMaskPretrain, {}),
        (SoftMaskPretrain, {"learn_temp": False}),
        (SoftMaskRetrieval, {}),
        (SoftMaskClassification, {"num_classes": 2}),
    ],
    ids=["pretrain", "fixed temperature", "retrieval", "classification"],
)
def test_a_run_of_the_hosts_goes_on_from_its_checkpoint(
    make_other, make_batch, tmp_path, cls, options
):
    def model():
        return make_other(cls, momentum=0.9, **options)

    data = list(batches(make_batch))
    torch.manual_seed(0)
    whole = host(tmp_path / "whole", model(), copy.deepcopy(data))
    whole.train()
    torch.manual_seed(0)
    first = host(tmp_path / "first", model(), copy.deepcopy(data))
    for epoch in range(2):
        first.train_epoch(epoch)
        first._save_checkpoint(epoch)
    path = tmp_path / "first" / "job" / "checkpoint_1.pth"
    saved = torch.load(path, weights_only=True)
    assert saved["model"].keys() == model().state_dict().keys()

    other = make_other(cls, seed=1, momentum=0.9, **options)
    again = host(tmp_path / "again", other, copy.deepcopy(data), str(path))
    torch.manual_seed(0)
    again.train()
    assert again.start_epoch == 2
    expected = whole._model.state_dict()
    for name, tensor in again._model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("cls", [*EVERY_MODEL, *BLIP])
def test_the_hosts_checkpoint_holds_every_model_whole(make_other, tmp_path, cls):
    model, other = make_other(cls), make_other(cls, seed=1)
    host(tmp_path, model, [])._save_checkpoint(0)
    host(tmp_path, other, [])._load_checkpoint(str(tmp_path / "job" / "checkpoint_0.pth"))
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


def test_our_runner_takes_the_hosts_checkpoint(make_other, make_batch, tmp_path):
    theirs = host(tmp_path, make_other(SoftMaskPretrain), list(batches(make_batch)))
    theirs.train_epoch(0)
    theirs._save_checkpoint(0)
    path = str(tmp_path / "job" / "checkpoint_0.pth")
    model = make_other(SoftMaskPretrain, seed=1)
    run = {**RUN, "output_dir": str(tmp_path / "ours"), "resume_ckpt_path": path}
    ours = SoftmaskRunner(ToyConfig(**run), BaseTask(), model, {"x": {"train": _Items()}}, "job")
    ours._resume()
    assert ours.progress.epoch == 1 and ours.step == ours.steps_per_epoch
    expected = theirs._model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


class _Items(torch.utils.data.Dataset):
    def __len__(self):
        return 8
