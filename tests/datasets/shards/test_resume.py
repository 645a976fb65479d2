"""Resuming a stream of shards with the same and with another number of readers."""

from __future__ import annotations

from itertools import islice, takewhile

import pytest
import torch
from torch.utils.data import DataLoader
from toy_shards import (
    PER_SHARD,
    SHARDS,
    ids,
    make,
    one_pass,
    picture,
    plain,
    through_checkpoint,
    write_tar,
)

from softmask_plugin.datasets.shards import files
from softmask_plugin.errors import UserError


def first_samples(shards, as_rank, readers, length, state=None):
    """The first samples of each of several readers, which go on from a state."""
    found = []
    for rank in range(readers):
        as_rank(rank, readers)
        stream = make(shards)
        stream.begin(state)
        found.append([plain(s) for s in islice(stream, length)])
    return found


@pytest.mark.parametrize("readers", [1, 3])
def test_resuming_is_exact_at_every_position(shards, as_rank, readers):
    length = 2 * PER_SHARD * -(-SHARDS // readers) + 3
    whole = first_samples(shards, as_rank, readers, length + 2)
    for taken in range(1, length):
        rows = torch.tensor([samples[taken - 1][4] for samples in whole])
        state = through_checkpoint(make(shards).state(rows))
        expected = [samples[taken : taken + 2] for samples in whole]
        assert first_samples(shards, as_rank, readers, 2, state) == expected


@pytest.mark.parametrize("taken", [1, 4, 7])
def test_a_loaders_batches_continue_exactly(shards, taken):
    def batches(stream, count):
        loader = DataLoader(stream, 3, num_workers=2)
        return [plain(batch) for batch in islice(loader, count)]

    whole = batches(make(shards), taken + 4)
    stream = make(shards)
    state = stream.state(torch.tensor([positions[-1] for *_, positions in whole[:taken]]))
    stream.begin(through_checkpoint(state), turn=taken % 2)
    assert batches(stream, 4) == whole[taken:]


def test_readers_without_a_sample_stay_where_they_were(shards, as_rank):
    whole = first_samples(shards, as_rank, 2, 20)
    stream = make(shards)
    assert stream.state(torch.empty(0, 4).long())["places"] == []
    stream.begin(stream.state(torch.empty(0, 4).long()))
    stream.begin(stream.state(torch.tensor([whole[0][6][4]])))
    stream.begin(stream.state(torch.empty(0, 5).long()))
    stream.begin(stream.state(torch.tensor([whole[1][2][4], whole[1][7][4], whole[1][4][4]])))
    for rank, taken in enumerate((7, 8)):
        as_rank(rank, 2)
        assert plain(next(iter(stream))) == whole[rank][taken]


def test_samples_taken_before_are_not_decoded(shards, monkeypatch):
    samples = list(islice(make(shards), 4))
    stream = make(shards)
    stream.begin(stream.state(samples[-1]["position"][None]))
    decoded = []
    read = files.read_sample
    monkeypatch.setattr(files, "read_sample", lambda *a: decoded.append(a) or read(*a))
    next(iter(stream))
    assert len(decoded) == 1


def split_anew(shards, as_rank, before: int, after: int, taken: int):
    """Samples of pass 0 taken by ``before`` readers, and the rest taken by ``after`` readers."""
    first, rows = [], []
    for rank in range(before):
        as_rank(rank, before)
        mine = list(islice(make(shards), taken))
        first.append([s for s in mine if int(s["position"][1]) == 0])
        rows.append(mine[-1]["position"])
    state = through_checkpoint(make(shards).state(torch.stack(rows)))
    rest = []
    for rank in range(after):
        as_rank(rank, after)
        stream = make(shards)
        stream.begin(state)
        samples = islice(stream, 2 * SHARDS * PER_SHARD)
        rest += ids(takewhile(lambda s: int(s["position"][1]) == state["pass"], samples))
    return first, rest, state


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 4), (3, 2), (1, 8)])
def test_another_number_of_readers_reads_no_finished_shard_again(shards, as_rank, before, after):
    everything = set(ids(one_pass(make(shards))))
    for taken in (1, 4, 5, 7, 10, 13):
        first, rest, state = split_anew(shards, as_rank, before, after, taken)
        assert state["pass"] == 0 and len(rest) == len(set(rest))
        assert {*rest, *(i for mine in first for i in ids(mine))} == everything
        finished = {i.split("/")[0] for mine in first for i in ids(mine)[: taken // 5 * 5]}
        assert not finished & {i.split("/")[0] for i in rest}
        assert len(rest) == PER_SHARD * (SHARDS - len(finished))


def test_a_reader_ahead_does_not_end_the_pass_of_the_others(shards, as_rank):
    """One of three readers has two shards, the others three, so it reaches the next pass first."""
    _, rest, state = split_anew(shards, as_rank, 3, 2, 12)
    assert state["pass"] == 0 and sorted(place[0] for place in state["places"]) == [0, 0, 1]
    assert len({i.split("/")[0] for i in rest}) == SHARDS - (2 + 2 + 2)


def test_a_new_split_is_resumed_exactly(shards, as_rank):
    _, _, state = split_anew(shards, as_rank, 2, 3, 10)
    whole = first_samples(shards, as_rank, 3, 30, state)
    stream = make(shards)
    stream.begin(state)
    for taken in range(1, 28):
        rows = torch.tensor([samples[taken - 1][4] for samples in whole])
        later = through_checkpoint(stream.state(rows))
        expected = [samples[taken : taken + 2] for samples in whole]
        assert first_samples(shards, as_rank, 3, 2, later) == expected


@pytest.mark.parametrize(
    ("options", "fewer", "what"),
    [({"seed": 7}, 0, "seed"), ({"shuffle": 9}, 0, "shuffle"), ({}, 1, "shards")],
)
def test_a_state_of_another_stream_is_refused(shards, options, fewer, what):
    stream = make(shards)
    state = stream.state(next(iter(stream))["position"][None])
    with pytest.raises(UserError, match=f"caption_shards.{what} is not what it was") as caught:
        make(shards[fewer:], **options).begin(state)
    assert "\n" not in str(caught.value)


def test_resuming_counts_broken_samples(tmp_path):
    members = {}
    for number, key in enumerate("abcdefgh"):
        members |= {f"{key}.png": picture() if number % 3 else b"", f"{key}.txt": b"text"}
    stream = make([write_tar(tmp_path / "0.tar", members)])
    whole = [plain(s) for s in islice(stream, 14)]
    for taken in range(1, 12):
        again = make(list(stream.shards.values()))
        again.begin(stream.state(torch.tensor([whole[taken - 1][4]])))
        assert [plain(s) for s in islice(again, 2)] == whole[taken : taken + 2]
