"""Pretraining samples streamed from WebDataset shards: shuffled, split, resumable, endless."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import chain, count, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import webdataset as wds
from lavis.common.dist_utils import get_rank, get_world_size
from torch import Tensor
from torch.utils.data import get_worker_info

from softmask_plugin.datasets.shards import files
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.errors import UserError
from softmask_plugin.nn.fixed_draws import fixed_draws

END: files.RawSample = {}  # stands after the last sample of a shard


class Place(NamedTuple):
    """A reader's position: it took ``samples`` of the ``shard``-th shard in its list for a pass."""

    pass_: int
    shard: int
    samples: int


class Start(NamedTuple):
    """Where an iteration starts."""

    pass_: int = 0  # the lowest unfinished pass
    done: frozenset[str] = frozenset()  # names of the shards to leave out of that pass
    places: tuple[Place, ...] = ()  # of the readers


class ShardStream(wds.DataPipeline):
    """Samples of WebDataset shards, in endless passes.

    A *reader* is one of the ``readers`` = processes x workers that read at the same time. Each pass
    shuffles the list of shards, and reader i takes ``[i::readers]`` of it, so that each sample
    comes once per pass. Within a shard, undecoded samples go through a shuffle buffer. Order and
    random draws (of the caption, and in the image processor) depend only on the seed, the pass, the
    shard and the sample: they are the same for any number of readers, and after a restart.

    A sample has ``image`` (as processed), ``text_input``, ``image_id`` (int; a hash of the sample's
    own ``image_id``, or of its name), ``instance_id`` ("shard/key") and ``position``, (5,) int64:
    reader, pass, index of the shard in this reader's list, samples taken of it (broken ones
    included), number of readers. After the last sample of a shard, it is the beginning of the next.

    Broken samples are skipped and named in ``skipped``: an image that is missing or cannot be
    decoded, no usable caption, the rest of a truncated shard.

    The base class is webdataset's because LAVIS accepts no other streams.

    Args:
        shards: Paths of shards on this machine.
        items: Samples per epoch, over all processes.
        vis_processor, text_processor: Applied to each PIL image and caption.
        shuffle: Samples in the shuffle buffer; 0 or 1 keeps the shard's order.
        seed: Random seed for order and draws, >= 0.
        skipped: Where broken samples are reported; None: a warning names the first.
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
        self.shards = files.shards_by_name([Path(shard).absolute() for shard in shards])
        self.items, self.shuffle, self.seed = items, shuffle, seed
        self.vis_processor, self.text_processor = vis_processor, text_processor
        self.skipped = skipped or SkipLog()
        self.start, self.turn = Start(), 0
        self.process: tuple[int, int] | None = None  # rank and number of processes; None: ask torch

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is not forked gets a copy and does not know the other processes
        return {**self.__dict__, "process": self.process or (get_rank(), get_world_size())}

    def __len__(self) -> int:
        return self.items

    def require(self, processes: int, workers: int) -> None:
        """Raise UserError if there are fewer shards than processes x workers."""
        readers = processes * workers
        if len(self.shards) < readers:
            raise UserError(
                f"{len(self.shards)} shards cannot be split among {processes} processes x "
                f"{workers} workers: lower run.num_workers, or pack the data into at least "
                f"{readers} shards (softmask shards --per-shard)"
            )

    def begin(self, state: dict[str, Any] | None, turn: int = 0) -> None:
        """Set where the next iteration starts; call it before a loader starts its workers.

        With the same number of readers as in ``state``, each continues with its very next sample.
        With another number, the rest of the lowest unfinished pass is split anew: shards that were
        finished in it are left out, but samples of a shard that was read in part, or of later
        passes, come again.

        Args:
            state: What ``state`` returned; None: the very beginning. UserError if it belongs to
                other shards, another seed or another shuffle buffer.
            turn: The worker that gives the next batch: the number of batches that this process took
                since its workers started, modulo their number. A loader always starts with its
                first worker, so that one then reads as worker ``turn``.
        """
        start = Start()
        if state is not None:
            for what, value in self._identity().items():
                if state["stream"][what] != value:
                    here = f" ({len(self.shards)} files are here now)" if what == "shards" else ""
                    raise UserError(
                        f"cannot resume: caption_shards.{what} is not what it was when the "
                        f"checkpoint was saved{here}; set it back, or start a new run from the "
                        "checkpoint's weights (model.pretrained)"
                    )
            places = tuple(Place(*place) for place in state["places"])
            start = Start(state["pass"], frozenset(state["done"]), places)
        self.start, self.turn = start, turn

    def state(self, positions: Tensor) -> dict[str, Any]:
        """Return what ``begin`` needs to continue after the samples taken: plain values only.

        Args:
            positions: The ``position`` of the last sample (or of several) of each reader of all
                processes, (n, 5). A reader without one is still where the iteration started.
        """
        rows = sorted(positions.tolist())
        readers = rows[0][-1] if rows else len(self.start.places)
        start = self._split(readers)
        places = list(start.places)
        for reader, *place, _ in rows:  # sorted: a reader's last position comes last
            places[reader] = Place(*place)
        orders = {pass_: self._order(pass_, start) for pass_ in {place.pass_ for place in places}}
        for reader, (pass_, shard, _) in enumerate(places):
            if shard >= len(orders[pass_][reader::readers]):  # the pass is finished
                places[reader] = Place(pass_ + 1, 0, 0)
        lowest = min((place.pass_ for place in places), default=start.pass_)
        return {
            "stream": self._identity(),
            "pass": lowest,
            "done": sorted(start.done) if lowest == start.pass_ else [],
            "places": [list(place) for place in places],
        }

    def _identity(self) -> dict[str, Any]:
        """What a position depends on."""
        names = _hash("\n".join(sorted(self.shards)))
        return {"shards": names, "seed": self.seed, "shuffle": self.shuffle}

    def _split(self, readers: int) -> Start:
        """Where the readers start; if their number changed, the unfinished pass is split anew."""
        pass_, done, places = self.start
        if len(places) == readers:
            return self.start
        order, finished = self._order(pass_, self.start), set(done)
        for reader, place in enumerate(places):
            share = order[reader :: len(places)]
            finished.update(share if place.pass_ > pass_ else share[: place.shard])
        return Start(pass_, frozenset(finished), (Place(pass_, 0, 0),) * readers)

    def _order(self, pass_: int, start: Start) -> list[str]:
        """Names of the shards to read in a pass, in order; reader i has ``[i::readers]``."""
        names = sorted(self.shards)
        random.Random(f"{self.seed} {pass_}").shuffle(names)
        return [name for name in names if pass_ != start.pass_ or name not in start.done]

    def _samples(self) -> Iterator[dict[str, Any]]:
        """Yield this reader's samples; UserError after a whole pass without a usable one."""
        rank, world = self.process or (get_rank(), get_world_size())
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id + self.turn) if worker else (1, 0)
        self.require(world, workers)
        reader, readers = rank * workers + number % workers, world * workers
        start = self._split(readers)
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
                    f"{len(names)} of {len(self.shards)} shards have no usable sample, all those "
                    f"of reader {reader + 1} of {readers}: {reason}"
                )
            place = Place(pass_ + 1, 0, 0)

    def _read(
        self, pass_: int, name: str, taken: int, defects: list[str]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield a shard's usable samples, each with the number taken by then (0 after the last).

        Samples ``taken`` before are not decoded; ``defects`` gets a line for each broken one.
        """
        path = self.shards[name]
        raw: Iterator[files.RawSample] = files.read_shard(path, defects)
        if self.shuffle > 1:
            rng = random.Random(f"{self.seed} {pass_} {name}")
            raw = wds.shuffle(self.shuffle, initial=self.shuffle, rng=rng)(raw)
        min_side = getattr(self.vis_processor, "min_side", None)
        ahead = pairwise(chain(islice(raw, taken, None), [END]))
        for number, (sample, following) in enumerate(ahead, taken + 1):
            key = sample["__key__"]
            try:
                image, captions, image_id = files.read_sample(sample, f"{path}/{key}", min_side)
            except UserError as error:
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
            yield 0 if following is END else number, processed


def _hash(text: str) -> int:
    """Hash a text to a signed int64 >= 0, equal on every machine."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
