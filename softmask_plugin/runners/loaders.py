"""Data loaders whose order and random draws depend on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lavis.common.dist_utils import get_rank, get_world_size
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from softmask_plugin.errors import UserError
from softmask_plugin.fixed_draws import fixed_draws

Collate = Callable[[list[Any]], Any]


class SeededItems(Dataset[Any]):
    """A map-style data set whose items are asked for by (epoch, index).

    What an item draws from torch's, numpy's and Python's generators is a function of ``seed``,
    epoch and index: the same for any number of workers or processes, and after a restart. Torch's
    generator, which the model draws from too, is left as it was.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        with fixed_draws(self.seed, *key):
            return self.dataset[key[1]]


class EpochSampler(DistributedSampler[Any]):
    """This process's share of a shuffled epoch, as (epoch, index); all of it on a single one."""

    def __iter__(self) -> Iterator[Any]:
        return ((self.epoch, index) for index in super().__iter__())


def train_loader(
    dataset: Any,
    batch_size: int,
    num_workers: int,
    collate_fn: Collate | None,
    pin_memory: bool,
    seed: int,
) -> DataLoader[Any]:
    """A shuffling loader of full batches; call ``loader.sampler.set_epoch`` before each epoch.

    Raises:
        UserError: the data set is a stream, which has no length to build epochs from.
    """
    if isinstance(dataset, (tuple, IterableDataset)):  # LAVIS pairs map-style and streamed sets
        raise UserError(
            "softmask_runner cannot train on streamed (webdataset) data sets: set run.runner to "
            "'runner_iter', or use map-style data sets only"
        )
    sampler = EpochSampler(dataset, get_world_size(), get_rank(), seed=seed, drop_last=True)
    return DataLoader(
        SeededItems(dataset, seed),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=pin_memory,
        drop_last=True,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),
    )


def eval_loader(
    dataset: Any,
    batch_size: int,
    num_workers: int,
    collate_fn: Collate | None,
    pin_memory: bool,
    shard: bool,
) -> DataLoader[Any]:
    """A loader in order; with ``shard``, of this process's share (padded to equal shares)."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=DistributedSampler(dataset, shuffle=False) if shard else None,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # evaluation must not move the training's random numbers
    )
