"""The data loaders of softmask_runner."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import ChainDataset
from toys import RUN, DrawingData, ToyConfig, ToyData, ToyModel, ToyTask, build, weights

from softmask_plugin.datasets.task_datasets import PretrainDataset
from softmask_plugin.errors import UserError
from softmask_plugin.runners import SoftmaskRunner, loaders
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


def test_the_train_split_is_evaluated_by_itself(tmp_path):
    named = {"evaluate": True, "test_splits": ["train"]}
    found = build(tmp_path, **named).train()["train"]
    assert found == build(tmp_path, train_splits=[], **named).train()["train"]
    for splits in ({"valid_splits": ["train"]}, {"test_splits": ["train"]}):
        runner = build(tmp_path, **splits)
        with pytest.raises(UserError, match="cannot name 'train': evaluate it afterwards"):
            runner.train()
        assert not runner.model.seen


@pytest.mark.parametrize("joined", [False, True])
def test_pairs_to_train_with_are_no_gallery(tmp_path, joined):
    items = [{"image": "a.jpg", "image_id": 0, "caption": ["a"]}] * 4
    pairs = PretrainDataset(None, None, items, None)
    runner = build(tmp_path, splits={"train": pairs}, evaluate=True, test_splits=["train"])
    if joined:
        runner.datasets["more"] = {"train": pairs}
    with pytest.raises(
        UserError, match="lacks what evaluation needs: name its file as that of 'val'"
    ):
        runner.train()


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


# ---- run.train_dataset_ratios


class Numbered(DrawingData):
    """Items numbered from ``first`` on."""

    def __init__(self, size, first):
        super().__init__(size)
        self.first = first

    def __getitem__(self, index):
        item = super().__getitem__(index)
        item["draws"][0] += self.first
        return item


def mixed(output_dir, ratios, **sizes):
    """A run on two data sets, whose items are numbered from 0 and from 100 on."""
    run = {**RUN, "output_dir": str(output_dir), "train_dataset_ratios": ratios}
    sizes = {"small": 12, "large": 52, **sizes}
    datasets = {
        name: {"train": Numbered(size, 100 * place)}
        for place, (name, size) in enumerate(sizes.items())
    }
    return SoftmaskRunner(ToyConfig(**run), ToyTask(), ToyModel(), datasets, "job")


def batches(loader, epoch, taken=0):
    return [batch["draws"] for batch in loader.batches(epoch, taken)]


def test_a_step_is_of_one_data_set_drawn_by_its_ratio(tmp_path):
    loader = mixed(tmp_path, {"large": 1, "small": 3}).train_loader
    small, draws = [], []
    for epoch in range(40):
        found = batches(loader, epoch)
        assert len(found) == len(loader) == 16
        for numbers in (batch[:, 0] for batch in found):
            assert (numbers < 100).all() or (numbers >= 100).all()
            assert len(numbers.unique()) == 4
            small.append(numbers[0].item() < 100)
        draws += torch.cat(found)[:, 1].tolist()
        of_small = torch.cat([batch[:, 0] for batch in found if batch[0, 0] < 100])
        for first in range(0, len(of_small) - 11, 12):  # each item once before any comes again
            assert sorted(of_small[first : first + 12].tolist()) == [*range(12)]
    assert sum(small) / len(small) == pytest.approx(3 / 4, abs=0.06)
    assert len({*draws}) == len(draws)  # also for an item that comes again in its epoch


def test_a_draw_by_ratios_is_resumed_exactly(tmp_path, monkeypatch):
    ratios = {"small": 3, "large": 1}
    whole = batches(mixed(tmp_path, ratios).train_loader, 1)
    resumed = batches(mixed(tmp_path, ratios).train_loader, 1, taken=20)
    assert torch.equal(torch.stack(resumed), torch.stack(whole[5:]))
    # Two processes share each step, also after a run of one
    monkeypatch.setattr(loaders, "get_world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(loaders, "get_rank", lambda rank=rank: rank)
        shares.append(batches(mixed(tmp_path, ratios).train_loader, 1, taken=20))
    assert len(shares[0]) == len(shares[1]) == (64 - 20) // 8
    for both in zip(*shares, strict=True):
        numbers = torch.cat(both)[:, 0]
        assert (numbers < 100).all() or (numbers >= 100).all()
        assert len(numbers.unique()) == 8


def test_a_run_by_ratios_goes_on_from_within_an_epoch(tmp_path):
    def run(folder, **options):
        options |= {"train_dataset_ratios": {"small": 1, "large": 2}, "save_every_steps": 4}
        cfg = ToyConfig(**{**RUN, "output_dir": str(folder), "keep_checkpoints": None, **options})
        datasets = {"small": {"train": ToyData(12)}, "large": {"train": ToyData(52, offset=1.0)}}
        runner = SoftmaskRunner(cfg, ToyTask(), ToyModel(), datasets, "job")
        runner.train()
        return runner

    whole = run(tmp_path / "whole")
    file = whole.output_dir / "checkpoint_1_20.pth"  # the 4th of 16 steps
    resumed = run(tmp_path / "resumed", resume_ckpt_path=str(file))
    assert len(resumed.model.seen) == 12
    assert torch.equal(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ({"small": 1}, "a number to each data set that has a 'train' split: small, large"),
        ({"small": 1, "large": 1, "other": 1}, "each data set that has a 'train' split"),
        ([3, 1], "each data set that has a 'train' split"),
        ({"small": 0, "large": 1}, "run.train_dataset_ratios.small is 0: it must be a number abov"),
        ({"small": "much", "large": 1}, "run.train_dataset_ratios.small is 'much'"),
    ],
)
def test_ratios_that_do_not_fit_the_data_sets(tmp_path, ratios, message):
    with pytest.raises(UserError, match=message):
        mixed(tmp_path, ratios).train()


def test_ratios_need_a_whole_batch_of_each_data_set(tmp_path):
    with pytest.raises(UserError, match="a data set has 3 items, too few .*batch_size_train"):
        mixed(tmp_path, {"small": 1, "large": 1}, large=3).train()


def test_loading_leaves_the_models_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    draw(0, [0])
    assert torch.initial_seed() == 3
    assert torch.equal(torch.rand(5), expected)
