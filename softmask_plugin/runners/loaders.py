"""Data loaders whose order and random draws depend only on the seed and the place in the data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size
from torch import Tensor
from torch.utils.data import (
    ChainDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
)

from softmask_plugin.datasets.shards.stream import ShardStream
from softmask_plugin.errors import UserError
from softmask_plugin.nn.fixed_draws import fixed_draws


class SeededItems(Dataset[Any]):
    """A map-style data set whose items are requested by (epoch, index), or more numbers.

    An item's draws from torch's, numpy's and Python's generators are a function of ``seed`` and
    these: the same for any number of workers or processes, and after a restart. The state of
    torch's generator, which the model uses too, is restored.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, ...]) -> Any:
        with fixed_draws(self.seed, *key):
            return self.dataset[key[1]]


class EpochSampler(Sampler[Any]):
    """This process's share of the rest of a shuffled epoch, as (epoch, index).

    The order is a function of seed and epoch, and processes take turns in it. So the first
    ``taken`` items belong to the first steps for any number of processes, and another number can
    share the rest.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.begin(0, 0)

    def begin(self, epoch: int, taken: int) -> None:
        """Start the next iteration after ``taken`` items, counted over all processes."""
        self.epoch, self.taken = epoch, taken

    def __len__(self) -> int:
        return (self.size - self.taken) // get_world_size()

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        left = self.left(generator).tolist()
        share = left[get_rank() :: get_world_size()][: len(self)]
        return ((self.epoch, index) for index in share)

    def left(self, generator: torch.Generator) -> Tensor:
        """Indices of the rest of the epoch, in order."""
        return torch.randperm(self.size, generator=generator)[self.taken :]


class RatioSampler(EpochSampler):
    """Steps of one data set each, drawn by ratio, as with LAVIS's MultiIterLoader.

    An epoch has as many steps as for all data sets together. Each of them is shuffled, and again
    after its last full step. Keys are (epoch, index, place): an item that comes again gets new
    random draws.
    """

    def __init__(self, sizes: list[int], ratios: list[float], seed: int, step_items: int) -> None:
        super().__init__(sum(sizes), seed)
        self.sizes, self.ratios, self.step_items = sizes, ratios, step_items

    def __iter__(self) -> Iterator[Any]:
        first = self.taken // get_world_size()
        return ((*key, first + place) for place, key in enumerate(super().__iter__()))

    def left(self, generator: torch.Generator) -> Tensor:
        """Indices of the rest of the epoch, in order."""
        block, steps = self.step_items, self.size // self.step_items
        weights = torch.tensor(self.ratios)
        source = weights.multinomial(steps, replacement=True, generator=generator)
        order, start = torch.empty(steps, block, dtype=torch.long), 0
        for number, size in enumerate(self.sizes):
            wanted, full = int((source == number).sum()), size // block
            rounds = [
                torch.randperm(size, generator=generator)[: full * block].view(full, block)
                for _ in range(math.ceil(wanted / full))
            ]
            if rounds:
                order[source == number] = start + torch.cat(rounds)[:wanted]
            start += size
        # Whole steps, also after a run with another number of processes
        return order[steps - (self.size - self.taken) // block :].flatten()


class TrainLoader:
    """Full batches of a data set, epoch by epoch, from any place in an epoch.

    Args:
        dataset: A map-style data set; with ratios a concatenation.
        batch_size: Items per batch and process.
        ratios: Sampling weight of each concatenated data set; None: each item once per epoch.
        options: For torch's DataLoader.
    """

    def __init__(
        self,
        dataset: Any,
        seed: int,
        batch_size: int,
        ratios: list[float] | None = None,
        **options: Any,
    ) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        self.sampler = EpochSampler(len(dataset), seed)
        if ratios is not None:
            sizes = [len(each) for each in dataset.datasets]
            if min(sizes) < self.step_items:
                raise UserError(
                    f"run.train_dataset_ratios: a data set has {min(sizes)} items, too few for one "
                    f"batch of {batch_size} in each of {get_world_size()} process(es): lower "
                    "run.batch_size_train"
                )
            self.sampler = RatioSampler(sizes, ratios, seed, self.step_items)
        self.loader: DataLoader[Any] = DataLoader(
            SeededItems(dataset, seed),
            batch_size=batch_size,
            sampler=self.sampler,
            drop_last=True,
            persistent_workers=options["num_workers"] > 0,
            generator=torch.Generator(),
            **options,
        )

    @property
    def step_items(self) -> int:
        """Items per batch, over all processes."""
        return self.batch_size * get_world_size()

    def __len__(self) -> int:
        """Batches per epoch and process."""
        return len(self.dataset) // self.step_items

    def left(self, taken: int) -> int:
        """Batches left in an epoch after ``taken`` items."""
        return (len(self.dataset) - taken) // self.step_items

    def batches(self, epoch: int, taken: int) -> Iterator[Any]:
        """Iterate over the rest of an epoch, see ``left``."""
        self.sampler.begin(epoch, taken)
        return iter(self.loader)

    def state(self) -> dict[str, Any] | None:
        """Position beyond epoch and items taken; all processes must call this."""
        return None

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue from the result of ``state``."""


class StreamLoader(TrainLoader):
    """Batches of an endless stream of shards; an epoch is a fixed number of items."""

    def __init__(self, dataset: ShardStream, batch_size: int, **options: Any) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        self.positions: dict[int, Tensor] = {}  # after the last sample taken from each reader
        self.turn = 0  # worker of the next batch
        self.loader = DataLoader(
            dataset, batch_size=batch_size, generator=torch.Generator(), **options
        )
        dataset.require(get_world_size(), max(options["num_workers"], 1))

    def batches(self, epoch: int, taken: int) -> Iterator[Any]:
        """Iterate over the rest of an epoch, from the stream's present position."""
        self.restore(self.state())
        for batch in islice(self.loader, self.left(taken)):
            position = batch.pop("position")[-1]
            self.positions[int(position[0])] = position
            self.turn = (self.turn + 1) % max(self.loader.num_workers, 1)
            yield batch

    def state(self) -> dict[str, Any] | None:
        """Positions of all processes' readers, and the worker whose turn it is (same on each)."""
        mine = list(self.positions.values())
        everyone = [mine] * get_world_size()
        if len(everyone) > 1:
            dist.all_gather_object(everyone, mine)
        rows = [row for rows in everyone for row in rows]
        read = self.dataset.state(torch.stack(rows) if rows else torch.empty(0, 5).long())
        return {"read": read, "turn": self.turn}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue where all readers were."""
        read, turn = (state["read"], state["turn"]) if state else (None, 0)
        self.turn = turn % max(self.loader.num_workers, 1)
        self.dataset.begin(read, self.turn)
        self.positions = {}


def train_loader(
    dataset: Any, seed: int, ratios: list[float] | None = None, **options: Any
) -> TrainLoader:
    """Make the loader of a data set or of a stream of shards (which LAVIS chains).

    Raises:
        UserError: Another kind of stream, several streams, a stream beside data sets, or a data
            set without a whole batch to draw.
    """
    if isinstance(dataset, ChainDataset):
        streams = list(dataset.datasets)
        if len(streams) == 1 and isinstance(streams[0], ShardStream):
            return StreamLoader(streams[0], **options)
    if isinstance(dataset, (tuple, IterableDataset)):  # LAVIS pairs map-style and streamed sets
        raise UserError(
            "softmask_runner trains on map-style data sets or on one 'caption_shards' (which takes "
            "many shards), not on both nor on other streams: set run.runner to 'runner_iter', or "
            "change datasets"
        )
    return TrainLoader(dataset, seed, ratios=ratios, **options)


def eval_loader(dataset: Any, shard: bool, **options: Any) -> DataLoader[Any]:
    """Make a loader that keeps the order; ``shard``: only this process's share, padded."""
    return DataLoader(
        dataset,
        sampler=DistributedSampler(dataset, shuffle=False) if shard else None,
        **options,
        generator=torch.Generator(),  # evaluation must not change the training's random numbers
    )
