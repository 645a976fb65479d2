"""The data loaders of softmask_runner."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import ChainDataset
from toys import DrawingData, ToyData, build

from softmask_plugin.errors import UserError
from softmask_plugin.runners.loaders import train_loader


def test_too_little_data(tmp_path):
    with pytest.raises(
        UserError, match="'train' split has 3 items.* batch of 4 .*set run.batch_size_train=3, or"
    ):
        build(tmp_path, splits={"train": ToyData(3)}).train()
    with pytest.raises(UserError, match="'test' split has 0 items"):
        build(tmp_path, splits={"test": ToyData(0)}, test_splits=["test"]).evaluate("best", True)
    with pytest.raises(UserError, match="no data set has a 'dev' split"):
        build(tmp_path, test_splits=["dev"]).evaluate("best", True)


@pytest.mark.parametrize("splits", [{"test_splits": ["tset"]}, {"valid_splits": ["vla"]}])
def test_a_split_that_is_not_there_is_told_before_training(tmp_path, splits):
    runner = build(tmp_path, **splits)
    with pytest.raises(UserError, match="no data set has a '(tset|vla)' split"):
        runner.train()
    assert not runner.model.seen


def test_data_without_other_splits_names_the_options_that_mend_it(tmp_path):
    splits = {"train": ToyData(8), "dev": ToyData(8)}
    runner = build(tmp_path, splits=splits, valid_splits=["val", "dev"], test_splits=["test"])
    message = r"no data set has a 'val' split, only \['dev', 'train'\]: name its file in datasets"
    remedy = r", or set run.valid_splits=\[dev\] run.test_splits=\[\]$"
    with pytest.raises(UserError, match=message + remedy):
        runner.train()
    build(tmp_path, splits=splits, valid_splits=["dev"], test_splits=[]).train()


def test_data_sets_are_concatenated(tmp_path):
    runner = build(tmp_path)
    runner.datasets["more"] = {"train": ToyData(18)}
    assert len(runner.train_loader) == 60 // 4


def test_streams_are_refused():
    with pytest.raises(UserError, match="runner_iter"):
        train_loader(ChainDataset([]), seed=0, batch_size=4, num_workers=0)


def draw(num_workers, epochs, seed=0):
    loader = train_loader(DrawingData(24), seed, batch_size=4, num_workers=num_workers)
    found = []
    for epoch in epochs:
        found.append(torch.cat([batch["draws"] for batch in loader.batches(epoch, 0)]))
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
