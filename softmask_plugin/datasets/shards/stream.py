"""Pretraining samples streamed out of WebDataset shards: shuffled, split, resumable, endless."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import webdataset as wds
from lavis.common.dist_utils import get_rank, get_world_size
from torch import Tensor
from torch.utils.data import get_worker_info

from softmask_plugin.datasets.shards.files import (
    BrokenSampleError,
    RawSample,
    read_sample,
    read_shard,
    shards_by_name,
)
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.errors import UserError
from softmask_plugin.fixed_draws import fixed_draws


class Place(NamedTuple):
    """How far a reader is: of shard ``shard`` in its list for a pass it took ``samples``."""

    pass_: int
    shard: int
    samples: int


@dataclass(frozen=True)
class Start:
    """Where an iteration starts.

    Attributes:
        pass_: the lowest pass in which something is left.
        done: names of shards that are not read in that pass.
        places: of each reader.
    """

    pass_: int
    done: frozenset[str]
    places: list[Place]


class ShardStream(wds.DataPipeline):
    """Samples of WebDataset shards, pass after pass without end.

    A *reader* is one of the ``readers`` = processes x workers that read at the same time. A pass
    shuffles the list of shards, and reader i takes ``[i::readers]`` of it, so that each sample is
    met once per pass. Within a shard samples go, undecoded, through a shuffle buffer. Order and
    random draws (which caption, what the image processor draws) are functions of the seed, the
    pass, the shard and the sample: the same for any number of readers, and after a restart.

    Broken samples are skipped and named in ``skipped``: an image that is missing or cannot be
    decoded, no usable caption, the rest of a shard that is cut short.

    webdataset's class is its base because LAVIS takes no other streams.

    Args:
        shards: paths of shards on this machine.
        items: samples per epoch, over all processes.
        vis_processor, text_processor: applied to each PIL image and caption.
        shuffle: samples in the shuffle buffer; 0 or 1: the order of the shard.
        seed: of order and draws, not negative.
        skipped: where broken samples are reported; by default a warning names the first.
    """

    def __init__(
        self,
        shards: Sequence[str | Path],
        items: int,
        vis_processor: Any,
        text_processor: Any,
        shuffle: int = 1000,
        seed: int = 42,
        skipped: SkipLog | None = None,
    ) -> None:
        super().__init__(self._samples)
        self.shards = shards_by_name([Path(shard).absolute() for shard in shards])
        self.items = items
        self.vis_processor = vis_processor
        self.text_processor = text_processor
        self.shuffle = shuffle
        self.seed = seed
        self.skipped = skipped or SkipLog()
        self.begun: dict[str, Any] | None = None
        self.turn = 0
        self.process: tuple[int, int] | None = None  # rank and number; None: ask torch

    def __getstate__(self) -> dict[str, Any]:
        # workers that are not forked get a copy, and know nothing of the other processes
        return {**self.__dict__, "process": self.process or (get_rank(), get_world_size())}

    def __len__(self) -> int:
        """Samples per epoch, over all processes."""
        return self.items

    def require(self, processes: int, workers: int) -> None:
        """Raise UserError if there are too few shards for so many processes and workers of each."""
        readers = processes * workers
        if len(self.shards) < readers:
            raise UserError(
                f"{len(self.shards)} shards cannot be split among {processes} processes x "
                f"{workers} workers: lower run.num_workers, or pack the data into at least "
                f"{readers} shards (softmask shards --per-shard)"
            )

    def begin(self, state: dict[str, Any] | None, turn: int = 0) -> None:
        """Set where the next iteration starts; call it before a loader starts its workers.

        With as many readers as ``state`` was taken from, the stream goes on with the very next
        sample of each. With another number, shards that were finished in the lowest unfinished
        pass are not read again in that pass, and the rest of it is split anew: of a shard that was
        read in part, and of what was read in later passes, samples come once more.

        Args:
            state: what ``state`` returned; None: the very start.
            turn: which of a process's workers gives the next batch: a loader always starts with its
                first worker, so that one then reads as worker ``turn`` would have done. So many
                batches of this process as were taken since its workers started, modulo their
                number, make the batches come in the order in which they would have come.

        Raises:
            UserError: the state is of other shards, another seed or another shuffle buffer.
        """
        if state is not None:
            for what, value in self._identity().items():
                if state["stream"][what] != value:
                    raise UserError(
                        f"the checkpoint's place in the shards means nothing here, since "
                        f"caption_shards.{what} is not what it was: set it back, or start a new "
                        "run from the checkpoint's weights (model.pretrained)"
                    )
        self.begun, self.turn = state, turn

    def state(self, positions: Tensor) -> dict[str, Any]:
        """What ``begin`` needs to go on after the samples that were taken: plain values only.

        Args:
            positions: the ``position`` of each reader's last sample (or of more of its samples), of
                all processes, (n, 5). Readers without any are where the iteration started.
        """
        rows = sorted(positions.tolist())
        if not rows and self.begun is not None:
            return self.begun
        readers = rows[0][-1] if rows else 0
        start = self._start(readers)
        places = list(start.places)
        for reader, *place, _ in rows:  # sorted: the furthest comes last
            places[reader] = Place(*place)
        orders = {pass_: self._order(pass_, start) for pass_ in {place.pass_ for place in places}}
        for reader, (pass_, shard, _) in enumerate(places):
            if shard >= len(orders[pass_][reader::readers]):  # nothing of this pass is left
                places[reader] = Place(pass_ + 1, 0, 0)
        lowest = min((place.pass_ for place in places), default=start.pass_)
        return {
            "stream": self._identity(),
            "pass": lowest,
            "done": sorted(start.done) if lowest == start.pass_ else [],
            "places": [list(place) for place in places],
        }

    def _identity(self) -> dict[str, Any]:
        """What a place depends on."""
        names = _hash("\n".join(sorted(self.shards)))
        return {"shards": names, "seed": self.seed, "shuffle": self.shuffle}

    def _start(self, readers: int) -> Start:
        """Where so many readers start, given the state that was begun with."""
        if self.begun is None:
            return Start(0, frozenset(), [Place(0, 0, 0)] * readers)
        pass_, places = self.begun["pass"], [Place(*place) for place in self.begun["places"]]
        start = Start(pass_, frozenset(self.begun["done"]), places)
        if len(places) == readers:
            return start
        done, order = set(start.done), self._order(pass_, start)
        for reader, place in enumerate(places):
            share = order[reader :: len(places)]
            done.update(share if place.pass_ > pass_ else share[: place.shard])
        return Start(pass_, frozenset(done), [Place(pass_, 0, 0)] * readers)

    def _order(self, pass_: int, start: Start) -> list[str]:
        """Names of the shards that are read in a pass, in order; reader i has ``[i::readers]``."""
        names = sorted(self.shards)
        random.Random(f"{self.seed} {pass_}").shuffle(names)
        return [name for name in names if pass_ != start.pass_ or name not in start.done]

    def _samples(self) -> Iterator[dict[str, Any]]:
        """The stream's only stage: this reader's samples.

        Yields:
            ``image`` (as processed), ``text_input``, ``image_id`` (int; a hash of the sample's own
            ``image_id``, or of its name), ``instance_id`` ("shard/key") and ``position``, (5,)
            int64: reader, pass, index of the shard in this reader's list, samples of it that were
            taken (broken ones included), number of readers. After the last sample of a shard it is
            the beginning of the next.

        Raises:
            UserError: fewer shards than readers, or a whole pass without a usable sample.
        """
        rank, world = self.process or (get_rank(), get_world_size())
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id + self.turn) if worker else (1, 0)
        self.require(world, workers)
        reader, readers = rank * workers + number % workers, world * workers
        start = self._start(readers)
        place = start.places[reader]
        for pass_ in count(place.pass_):
            names = self._order(pass_, start)[reader::readers]
            whole = place[1:] == (0, 0) and not (start.done and pass_ == start.pass_)
            usable, reason = False, "they are empty"
            for shard in range(place.shard, len(names)):
                before = place.samples if shard == place.shard else 0
                defects: list[str] = []
                try:
                    for taken, sample in self._read(pass_, names[shard], before, defects):
                        usable = True
                        at = (pass_, shard, taken) if taken else (pass_, shard + 1, 0)
                        yield {**sample, "position": torch.tensor([reader, *at, readers])}
                finally:
                    self.skipped.add(f"broken samples of {names[shard]}", defects)
                reason = defects[0] if defects else reason
            if whole and not usable:
                raise UserError(
                    f"{len(names)} of {len(self.shards)} shards hold no usable sample, all that "
                    f"reader {reader + 1} of {readers} has in a pass: {reason}"
                )
            place = Place(pass_ + 1, 0, 0)

    def _read(
        self, pass_: int, name: str, taken: int, defects: list[str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Usable samples of a shard, each with how many were taken by then; 0 after the last one.

        Args:
            pass_: number of the pass.
            name: of the shard.
            taken: how many samples were taken before; they are not decoded.
            defects: is given a line for each broken sample.
        """
        path = self.shards[name]
        raw: Iterator[RawSample] = read_shard(path, defects)
        if self.shuffle > 1:
            rng = random.Random(f"{self.seed} {pass_} {name}")
            raw = wds.shuffle(self.shuffle, initial=self.shuffle, rng=rng)(raw)
        for number, (sample, last) in enumerate(_mark_last(islice(raw, taken, None)), taken + 1):
            key = sample["__key__"]
            min_side = getattr(self.vis_processor, "min_side", None)
            try:
                image, captions, image_id = read_sample(sample, f"{path}/{key}", min_side)
            except BrokenSampleError as error:
                defects.append(str(error))
                continue
            with fixed_draws(self.seed, pass_, _hash(name), _hash(key)):
                caption = captions[int(torch.randint(len(captions), ()))]
                processed = {
                    "image": self.vis_processor(image),
                    "text_input": self.text_processor(caption),
                    "image_id": _hash(f"{name}/{key}" if image_id is None else image_id),
                    "instance_id": f"{name}/{key}",
                }
            yield 0 if last else number, processed


def _hash(text: str) -> int:
    """A number that stands for a text, the same everywhere, that fits into a signed int64."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _mark_last(samples: Iterable[RawSample]) -> Iterator[tuple[RawSample, bool]]:
    """Each sample, and whether it is the last one."""
    previous: RawSample | None = None
    for sample in samples:
        if previous is not None:
            yield previous, False
        previous = sample
    if previous is not None:
        yield previous, True
