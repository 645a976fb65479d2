"""WebDataset shards: packing, streaming, splitting, resuming, and what becomes of broken ones."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import pickle
import random
import re
import subprocess
import sys
import tarfile
from itertools import islice, product, takewhile
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset as wds
from lavis.common.registry import registry
from lavis.datasets.data_utils import concat_datasets
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import ChainDataset, DataLoader

from softmask_plugin import cli
from softmask_plugin.datasets import pack_shards, shard_stream
from softmask_plugin.datasets.caption_shards import CaptionShardsBuilder
from softmask_plugin.datasets.shard_files import find_shards
from softmask_plugin.datasets.shard_stream import ShardStream
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.errors import UserError

ROOT = Path(__file__).parents[1]
SHARDS, PER_SHARD = 8, 5


def picture(number: int = 0) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (6, 6), (number % 256, 40, 200)).save(data, "PNG")
    return data.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def good(*keys: str) -> dict[str, bytes]:
    members = {}
    for number, key in enumerate(keys):
        members |= {f"{key}.png": picture(number), f"{key}.txt": f"picture {key}".encode()}
    return members


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shards of five samples with two captions each."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        members = {}
        for number in range(PER_SHARD):
            key = f"{shard}_{number}"
            members[f"{key}.png"] = picture(10 * shard + number)
            members[f"{key}.json"] = json.dumps({"caption": [f"a {key}", f"the {key}"]}).encode()
        write_tar(folder / f"{shard:05d}.tar", members)
    return sorted(folder.glob("*.tar"))


def draw(image: Image.Image) -> torch.Tensor:
    """A processor that shows the image and what is drawn: (4,)."""
    drawn = [float(torch.rand(())), np.random.rand(), random.random()]
    return torch.tensor([image.getpixel((0, 0))[0], *drawn], dtype=torch.float64)


def same(text: str) -> str:
    return text


def make(shards, **options) -> ShardStream:
    return ShardStream(shards, len(shards) * PER_SHARD, draw, same, **{"shuffle": 3, **options})


@pytest.fixture
def as_rank(monkeypatch):
    """Let the process pass for one of several: ``as_rank(rank, world)``."""

    def set_rank(rank: int, world: int) -> None:
        monkeypatch.setattr(shard_stream, "get_rank", lambda: rank)
        monkeypatch.setattr(shard_stream, "get_world_size", lambda: world)

    return set_rank


def plain(sample: dict) -> tuple:
    """A sample in a form that can be compared."""
    return tuple(v.tolist() if isinstance(v, torch.Tensor) else v for v in sample.values())


def ids(samples) -> list[str]:
    return [sample["instance_id"] for sample in samples]


def one_pass(stream: ShardStream, number: int = 0, workers: int = 0) -> list[dict]:
    """This process's samples of a pass, with workers those of the first so many samples of each."""
    if not workers:
        samples = iter(stream)
        first = next(s for s in samples if int(s["position"][1]) == number)
        return [first, *takewhile(lambda s: int(s["position"][1]) == number, samples)]
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    taken = islice(loader, 3 * workers * PER_SHARD * -(-SHARDS // workers))
    return [sample for sample in taken if int(sample["position"][1]) == number]


def through_checkpoint(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


# ---- order


def test_a_sample_has_what_pretraining_reads(shards):
    sample = next(iter(make(shards)))
    assert list(sample) == ["image", "text_input", "image_id", "instance_id", "position"]
    shard, key = sample["instance_id"].split("/")
    assert sample["text_input"] in (f"a {key}", f"the {key}") and shard.endswith(".tar")
    assert sample["image"][0] == 10 * int(key[0]) + int(key[2])
    batch = next(iter(DataLoader(make(shards), 4)))
    assert batch["position"].shape == (4, 5) and batch["position"].dtype == torch.int64
    assert batch["image_id"].dtype == torch.int64 and batch["image_id"].unique().numel() == 4
    assert (batch["image_id"] >= 0).all()
    assert batch["position"][-1].tolist() == [0, 0, 0, 4, 1]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (4, 0), (1, 2), (2, 2), (3, 0)])
def test_every_sample_comes_once_per_pass(shards, as_rank, world, workers):
    for number in (0, 1):
        seen = []
        for rank in range(world):
            as_rank(rank, world)
            seen += ids(one_pass(make(shards), number, workers))
        assert len(seen) == len(set(seen)) == SHARDS * PER_SHARD


def test_order_is_of_seed_and_pass(shards):
    first, second = (ids(one_pass(make(shards), number)) for number in (0, 1))
    assert sorted(first) == sorted(second) and first != second
    assert first == ids(one_pass(make(shards)))
    assert first != ids(one_pass(make(shards, seed=1)))
    in_order = ids(one_pass(make(shards, shuffle=0)))
    shard = [i for i in first if i.startswith(in_order[0].split("/")[0])]
    assert in_order[:PER_SHARD] == sorted(shard) != shard  # a shard's samples, and they were mixed
    assert [i.split("/")[0] for i in first] == [i.split("/")[0] for i in in_order]


def test_draws_are_of_seed_pass_and_sample(shards, as_rank):
    """Whoever reads a sample draws the same for it; torch's own generator stays as it was."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    alone = {s["instance_id"]: plain(s)[:3] for s in one_pass(make(shards))}
    assert torch.equal(torch.rand(3), expected)
    processes = []
    for rank in range(2):
        as_rank(rank, 2)
        processes.append([plain(s) for s in one_pass(make(shards))])
    as_rank(0, 1)
    workers = [plain(s) for s in one_pass(make(shards), workers=2)]
    for reader, samples in enumerate(processes):
        assert samples == [s for s in workers if s[4][0] == reader]
    assert {s[3]: s[:3] for s in workers} == alone
    again = {s["instance_id"]: plain(s)[:3] for s in one_pass(make(shards), 1)}
    assert all(again[i][0][1:] != alone[i][0][1:] for i in alone)  # other draws in another pass
    assert len({s[1].split()[0] for s in alone.values()}) == 2  # of two captions, both are drawn
    drawn = {tuple(s[0][1:]) for s in alone.values()}
    assert len(drawn) == SHARDS * PER_SHARD


def test_lavis_takes_the_stream(shards):
    chained = concat_datasets({"train": [make(shards)]})["train"]
    assert isinstance(chained, ChainDataset) and len(chained) == SHARDS * PER_SHARD
    assert isinstance(make(shards), wds.DataPipeline)


def test_workers_that_are_not_forked_know_the_other_processes(shards, as_rank):
    as_rank(1, 2)
    expected = ids(one_pass(make(shards)))
    pickled = pickle.dumps(make(shards))
    as_rank(0, 1)
    copy = pickle.loads(pickled)
    assert ids(one_pass(copy)) == expected
    loader = DataLoader(copy, 4, num_workers=1, multiprocessing_context="fork")
    assert next(iter(loader))["position"][0].tolist() == [1, 0, 0, 1, 2]


# ---- resuming


@pytest.mark.parametrize("readers", [1, 3])
def test_resuming_is_exact_at_every_position(shards, as_rank, readers):
    length = 2 * PER_SHARD * -(-SHARDS // readers) + 3
    whole = []
    for rank in range(readers):
        as_rank(rank, readers)
        whole.append([plain(s) for s in islice(make(shards), length + 2)])
    for taken in range(1, length):
        rows = torch.tensor([samples[taken - 1][4] for samples in whole])
        state = through_checkpoint(make(shards).state(rows))
        for rank in range(readers):
            as_rank(rank, readers)
            stream = make(shards)
            stream.begin(state)
            assert [plain(s) for s in islice(stream, 2)] == whole[rank][taken : taken + 2]


@pytest.mark.parametrize("taken", [1, 4, 7])
def test_a_loaders_batches_go_on_as_they_would_have(shards, taken):
    def batches(stream, count):
        loader = DataLoader(stream, 3, num_workers=2)
        return [plain(batch) for batch in islice(loader, count)]

    whole = batches(make(shards), taken + 4)
    stream = make(shards)
    state = stream.state(torch.tensor([positions[-1] for *_, positions in whole[:taken]]))
    stream.begin(through_checkpoint(state), turn=taken % 2)
    assert batches(stream, 4) == whole[taken:]


def test_readers_without_a_sample_stay_where_they_were(shards, as_rank):
    whole = []
    for rank in range(2):
        as_rank(rank, 2)
        whole.append([plain(s) for s in islice(make(shards), 20)])
    stream = make(shards)
    assert stream.state(torch.empty(0, 4).long())["places"] == []
    stream.begin(stream.state(torch.empty(0, 4).long()))
    stream.begin(stream.state(torch.tensor([whole[0][6][4]])))
    stream.begin(stream.state(torch.empty(0, 5).long()))
    stream.begin(stream.state(torch.tensor([whole[1][2][4], whole[1][7][4], whole[1][4][4]])))
    for rank, taken in enumerate((7, 8)):
        as_rank(rank, 2)
        assert plain(next(iter(stream))) == whole[rank][taken]


def test_what_is_passed_over_is_not_decoded(shards, monkeypatch):
    samples = list(islice(make(shards), 4))
    stream = make(shards)
    stream.begin(stream.state(samples[-1]["position"][None]))
    decoded = []
    read = shard_stream.read_sample
    monkeypatch.setattr(shard_stream, "read_sample", lambda *a: decoded.append(a) or read(*a))
    next(iter(stream))
    assert len(decoded) == 1


def split_anew(shards, as_rank, before: int, after: int, taken: int):
    """Samples of pass 0 that ``before`` readers took, and those that ``after`` take from there."""
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
    """Of three readers one has two shards, the others three: it is in the next pass earlier."""
    _, rest, state = split_anew(shards, as_rank, 3, 2, 12)
    assert state["pass"] == 0 and sorted(place[0] for place in state["places"]) == [0, 0, 1]
    assert len({i.split("/")[0] for i in rest}) == SHARDS - (2 + 2 + 2)


def test_a_split_anew_is_resumed_exactly(shards, as_rank):
    _, _, state = split_anew(shards, as_rank, 2, 3, 10)
    whole = []
    for rank in range(3):
        as_rank(rank, 3)
        stream = make(shards)
        stream.begin(state)
        whole.append([plain(s) for s in islice(stream, 30)])
    for taken in range(1, 28):
        rows = torch.tensor([samples[taken - 1][4] for samples in whole])
        later = through_checkpoint(stream.state(rows))
        for rank in range(3):
            as_rank(rank, 3)
            again = make(shards)
            again.begin(later)
            assert [plain(s) for s in islice(again, 2)] == whole[rank][taken : taken + 2]


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


# ---- broken and hostile shards


BROKEN = {  # members beside the good samples a and c, and the line that names them
    "no image at all": ({"b.txt": b"text"}, r"/b: no image \(\.jpg"),
    "no image": ({"b.png": b"nothing", "b.txt": b"text"}, r"/b\.png: no image of a known format"),
    "truncated image": ({"b.png": picture()[:-20], "b.txt": b"text"}, r"/b\.png: .*truncated"),
    "no caption": ({"b.png": picture()}, "/b: no usable caption, but None"),
    "empty caption": ({"b.png": picture(), "b.txt": b" . "}, "/b: no usable caption, but ' . '"),
    "null caption": ({"b.png": picture(), "b.json": b'{"caption": null}'}, "/b: no usable caption"),
    "no JSON": ({"b.png": picture(), "b.json": b"{"}, r"/b: \.json is not valid JSON"),
    "deep JSON": ({"b.png": picture(), "b.json": b"[" * 200_000}, "/b: .*recursion"),
    "a list": ({"b.png": picture(), "b.json": b"[1]"}, r"/b: \.json holds no object but \[1\]"),
    "no UTF-8": ({"b.png": picture(), "b.txt": b"caf\xe9"}, "/b: 'utf-8' codec can't decode"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_sample_is_skipped_counted_and_named(tmp_path, caplog, kind):
    members, line = BROKEN[kind]
    shard = write_tar(tmp_path / "0.tar", {**good("a"), **members, **good("c")})
    log = SkipLog(tmp_path / "skipped_images.log")
    stream = make([shard], shuffle=0, skipped=log)
    samples = list(islice(stream, 6))
    assert ids(samples) == ["0.tar/a", "0.tar/c"] * 3
    assert [s["position"][3].item() for s in samples] == [1, 0] * 3  # 0: the shard is finished
    (named,) = log.path.read_text().splitlines()
    assert named.startswith(f"{shard}/b") and re.search(line, named)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and warnings[0].startswith("Skipped 1 broken samples of 0.tar: ")


def test_the_rest_of_a_truncated_shard_is_skipped(tmp_path):
    data = write_tar(tmp_path / "whole", good(*"abcdefgh")).read_bytes()
    (tmp_path / "0.tar").write_bytes(data[: 9 * 512 + 40])  # in the image of c
    (tmp_path / "1.tar").write_bytes(b"")
    (tmp_path / "2.tar").write_bytes(b"no archive " * 100)
    write_tar(tmp_path / "3.tar", good("x"))
    log = SkipLog(tmp_path / "skipped.log")
    stream = make([tmp_path / f"{i}.tar" for i in range(4)], shuffle=2, skipped=log)
    assert sorted(ids(one_pass(stream))) == ["0.tar/a", "0.tar/b", "3.tar/x"]
    assert sorted(ids(one_pass(stream, 1))) == ["0.tar/a", "0.tar/b", "3.tar/x"]
    named = sorted(log.path.read_text().splitlines())
    assert len(named) == 3 and all("so the rest of it is skipped" in line for line in named)
    assert named[0] == f"{tmp_path}/0.tar: unexpected end of data, so the rest of it is skipped"
    (tmp_path / "3.tar").unlink()  # what becomes of a disk that goes away
    assert sorted(ids(one_pass(stream, 2))) == ["0.tar/a", "0.tar/b"]
    assert "3.tar: No such file or directory, so the rest" in log.path.read_text()


@pytest.mark.parametrize("cut", [8 * 512, 8 * 512 + 40, 20 * 512])
def test_a_shard_cut_where_a_tar_may_end_is_named(tmp_path, cut):
    """Between members, in a header, and after the last member."""
    data = write_tar(tmp_path / "whole", good(*"abcde")).read_bytes()
    (tmp_path / "0.tar").write_bytes(data[:cut])
    log = SkipLog(tmp_path / "skipped.log")
    assert len(one_pass(make([tmp_path / "0.tar"], skipped=log))) == cut // 2048
    assert "0.tar: its end mark is missing" in log.path.read_text()


def test_of_a_member_that_occurs_twice_the_first_counts(tmp_path):
    shard = write_tar(tmp_path / "0.tar", good("a"))
    with tarfile.open(shard, "a") as tar:
        for name, data in {"a.txt": b"another", **good("b")}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    log = SkipLog(tmp_path / "skipped.log")
    samples = one_pass(make([shard], shuffle=0, skipped=log))
    assert [s["text_input"] for s in samples] == ["picture a", "picture b"]
    (named,) = log.path.read_text().splitlines()
    assert named.startswith(f"{shard}: a.txt: duplicate")


def test_a_compressed_shard_is_read(tmp_path):
    whole = write_tar(tmp_path / "whole", good("a", "b")).read_bytes()
    (tmp_path / "0.tar").write_bytes(gzip.compress(whole))
    log = SkipLog(tmp_path / "skipped.log")
    assert len(one_pass(make([tmp_path / "0.tar"], skipped=log))) == 2 and not log.path.exists()


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


def test_layouts_of_others_are_read(tmp_path):
    """img2dataset writes .jpg, .json and .txt; suffixes may be upper case."""
    members = {
        "000/1.JPG": picture(),
        "000/1.json": json.dumps({"caption": "of json", "url": "x", "image_id": 7}).encode(),
        "000/1.txt": b"of txt",
        "000/2.webp": picture(),
        "000/2.json": json.dumps({"caption": None, "image_id": "7"}).encode(),
        "000/2.txt": b"of txt",
    }
    first, second = one_pass(make([write_tar(tmp_path / "0.tar", members)], shuffle=0))
    assert (first["text_input"], second["text_input"]) == ("of json", "of txt")
    assert first["image_id"] == second["image_id"] and first["instance_id"] == "0.tar/000/1"


def test_nothing_in_a_shard_is_run_or_written(tmp_path, monkeypatch):
    """Members outside the folder, links, devices and pickles."""
    work = tmp_path / "work" / "deeper"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    (tmp_path / "secret.json").write_text('{"caption": "a secret"}')

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "unpickled"),)

    bomb = pickle.dumps(Bomb())
    members = good("../../evil", f"{tmp_path}/evil", "a", "b", "c")
    members |= {"d.pyd": bomb, "d.pickle": bomb, "d.pth": bomb, **good("d")}
    write_tar(work / "0.tar", members)
    with tarfile.open(work / "0.tar", "a") as tar:
        for name, kind, target in [
            ("e.json", tarfile.SYMTYPE, "../../secret.json"),
            ("f.json", tarfile.LNKTYPE, "../../secret.json"),
            ("g.png", tarfile.CHRTYPE, ""),
            ("link", tarfile.SYMTYPE, "../.."),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    log = SkipLog(tmp_path / "skipped.log")
    samples = one_pass(make([work / "0.tar"], skipped=log))
    assert {s["text_input"] for s in samples} == {
        *("picture ../../evil", f"picture {tmp_path}/evil"),
        *(f"picture {key}" for key in "abcd"),
    }
    assert sorted(tmp_path.rglob("*")) == before and not log.path.exists()


@pytest.mark.parametrize("scheme", ["pipe:touch {}", "pipe:touch {}; cat x.tar", "PIPE:touch {}"])
def test_a_command_in_place_of_a_shard_is_not_run(tmp_path, monkeypatch, scheme):
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "marker"
    write_tar(tmp_path / "x.tar", good("a"))
    for given in (scheme, ["x.tar", scheme], f"x.tar::{scheme}"):
        given = json.loads(json.dumps(given).replace("{}", str(marker)))
        with pytest.raises(UserError, match="only local files are read|is no file") as caught:
            build(f"shards={json.dumps(given)}", "items=1")
        assert "\n" not in str(caught.value)
    # nor where it gets past the builder: it is but the name of a file
    stream = make([scheme.replace("{}", str(marker))])
    with pytest.raises(UserError, match="no usable sample.*No such file"):
        next(iter(stream))
    monkeypatch.setenv("GOPEN_REWRITE", f"{tmp_path}/x=pipe:touch {marker};cat {tmp_path}/x")
    assert ids(one_pass(make([tmp_path / "x.tar"]))) == ["x.tar/a"]
    assert not marker.exists()


def test_a_pass_without_a_usable_sample_is_an_error(shards, tmp_path, as_rank):
    bad = [write_tar(tmp_path / f"{i}.tar", {"b.txt": b"text"}) for i in range(2)]
    stream = make(bad, skipped=SkipLog(muted=True))
    with pytest.raises(UserError, match=r"2 of 2 shards hold no usable sample.*/b: no image"):
        next(iter(stream))
    empty = make([write_tar(tmp_path / "3.tar", {})])
    with pytest.raises(UserError, match="1 of 1 shards hold no usable sample.*they are empty"):
        next(iter(empty))


def test_fewer_shards_than_readers_is_an_error(shards, as_rank, monkeypatch):
    as_rank(0, 5)
    # torch waits ten seconds for workers that raised
    monkeypatch.setattr(
        shard_stream, "get_worker_info", lambda: SimpleNamespace(num_workers=2, id=0)
    )
    stream = make(shards)
    with pytest.raises(UserError) as caught:
        stream.require(3, 3)
    assert str(caught.value) == (
        "8 shards cannot be split among 3 processes x 3 workers: lower run.num_workers, or pack "
        "the data into at least 9 shards (softmask shards --per-shard)"
    )
    with pytest.raises(UserError, match="8 shards cannot be split among 5 processes x 2 workers"):
        next(iter(stream))


# ---- builder


def build(*options: str) -> dict:
    config = OmegaConf.load(CaptionShardsBuilder.default_config_path())
    shrink = ["datasets.caption_shards.vis_processor.train.image_size=8"]
    given = [f"datasets.caption_shards.{option}" for option in options]
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(shrink + given))
    builder = registry.get_builder_class("caption_shards")
    return builder(config.datasets.caption_shards).build_datasets()


def test_shards_are_found_by_path_pattern_glob_folder_and_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, number in product(("coco", "sbu"), range(3)):
        Path(folder).mkdir(exist_ok=True)
        write_tar(Path(folder, f"{number:03d}.tar"), good("a"))
    Path("coco/notes.txt").write_text("no shard")

    def names(given):
        return [str(path.relative_to(tmp_path)) for path in find_shards(given, "shards")]

    coco = [f"coco/{i:03d}.tar" for i in range(3)]
    assert names("coco") == names("coco/*.tar") == names("coco/{000..002}.tar") == coco
    assert names("./coco/001.tar") == names(["coco/001.tar", str(tmp_path / "coco/001.tar")])
    assert names(["sbu/000.tar", "coco"]) == ["sbu/000.tar", *coco]
    assert len(names("{coco,sbu}/00[12].tar")) == 4
    with tarfile.open("a:b.tar", "w"):
        assert names("./a:b.tar") == ["a:b.tar"]
    stream = build("shards=[coco,sbu/001.tar]", "items=9")["train"]
    assert list(stream.shards) == [*coco, "sbu/001.tar"] and len(stream) == 9
    assert {i.split("/")[0] for i in ids(one_pass(stream))} == {"coco", "sbu"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["items=1"], "caption_shards.shards is not set"),
        (["shards=[]"], "caption_shards.shards is not set"),
        (["shards=[3]"], "caption_shards.shards is not set"),
        (["shards=none.tar"], "shards: 1 of 1 shards, none.tar is no file"),
        (["shards=data/{0..4}.tar"], "shards: 3 of 5 shards, data/2.tar is no file"),
        (["shards=data/{0..4.tar"], "is no pattern of shards|is no file"),
        (["shards=other/*.tar"], "no shard .* is found at other/"),
        (["shards=."], "no shard .* is found at ."),
        (["shards=s3://bucket/0.tar"], "starts with s3:, but only local files are read"),
        (["shards=https://host/{0..1}.tar"], "starts with https:, but only local"),
        (["shards=data"], "caption_shards.items is not set and there is no .*index.json: set "),
        (["shards=listed"], "listed/index.json does not count 1.tar: set .*items"),
        (["shards=malformed"], "malformed/index.json is not valid JSON"),
        (["shards=data", "items=0"], "items must be a whole number from 1, not 0"),
        (["shards=data", "items=many"], "items must be a whole number from 1, not 'many'"),
        (["shards=data", "items=1", "shuffle=-1"], "shuffle must be a whole number from 0, not -1"),
        (["shards=data", "items=1", "seed=0.5"], "seed must be a whole number from 0, not 0.5"),
        (["shard=data"], "unknown key datasets.caption_shards.shard: did you mean 'shards'"),
        (
            ["shards=data", "items=1", "vis_processor.train.blur=0"],
            "softmask_image_train: unknown key 'blur': did you mean 'blur_p'",
        ),
    ],
    ids=str,
)
def test_wrong_options_get_one_clear_line(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "listed", "malformed"):
        Path(folder).mkdir()
        for number in range(2):
            write_tar(Path(folder, f"{number}.tar"), good("a"))
    entries = [{"url": "0.tar", "nsamples": 1}, {"url": "1.tar"}, 5]
    Path("listed/index.json").write_text(json.dumps({"shardlist": entries}))
    Path("malformed/index.json").write_text("{")
    with pytest.raises(UserError, match=message) as caught:
        build(*options)
    assert "\n" not in str(caught.value)


# ---- packing


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Twelve images of several formats with captions; the process stands in their folder."""
    monkeypatch.chdir(tmp_path)
    Path("photos/more").mkdir(parents=True)
    rows = []
    for number, suffix in enumerate(["png", "JPG", "jpeg", "webp", "gif", "photo"] * 2):
        name = f"more/{number}.{suffix}" if number % 2 else f"{number}.{suffix}"
        image = Image.new("RGB", (9, 7), (number, 20 * number, 255 - 20 * number))
        image.save(f"photos/{name}", "PNG" if suffix == "photo" else None)
        rows.append({"image": name, "caption": [f"number {number}", "a card"]})
    rows[3]["image_id"] = rows[5]["image_id"] = "twin"
    Path("train.json").write_text(json.dumps(rows))
    return rows


def pack(out: str, *options: str) -> int:
    arguments = ["--captions", "train.json", "--images", "photos", "--out", out]
    return cli.main(["shards", *arguments, *options])


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_packed_folder_is_streamed_whole(photos, capsys):
    assert pack("data/shards", "--per-shard", "5") == 0
    printed = capsys.readouterr()
    assert printed.out == "12 images in 3 shards: data/shards\n" and "packing: 100%" in printed.err
    assert sorted(contents("data/shards")) == ["00000.tar", "00001.tar", "00002.tar", "index.json"]
    index = json.loads(Path("data/shards/index.json").read_text())
    assert [s["nsamples"] for s in index["shardlist"]] == [5, 5, 2]
    assert index["__kind__"] == "wids-shard-index-v1" and index["wids_version"] == 1

    packed = {}
    for path in Path("data/shards").glob("*.tar"):
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        for name, data in members.items():
            if name.endswith(".json"):
                about = json.loads(data)
                (image,) = (n for n in members if n != name and n.startswith(name[:8]))
                packed[about["image"]] = (Path(image).suffix, members[image], about)
    assert set(packed) == {row["image"] for row in photos}
    for row in photos:
        suffix, data, about = packed[row["image"]]
        assert data == Path("photos", row["image"]).read_bytes()
        assert suffix == Path(row["image"]).suffix.lower().replace(".photo", ".img")
        assert about["caption"] == row["caption"]

    stream = build("shards=data/shards")["train"]
    assert len(stream) == 12 and stream.shuffle == 1000 and stream.seed == 42
    samples = one_pass(stream)
    assert len(set(ids(samples))) == 12
    assert samples[0]["image"].shape == (3, 8, 8) and samples[0]["image"].dtype == torch.float32
    assert len({s["image_id"] for s in samples}) == 11  # two images are of one image_id
    assert {s["text_input"] for s in samples} <= {"a card", *(f"number {n}" for n in range(12))}


def test_packing_again_gives_the_same_bytes(photos):
    assert pack("one") == pack("two") == pack("other", "--seed", "1") == 0
    assert contents("one") == contents("two") != contents("other")
    assert pack_shards.pack_shards("train.json", "photos", "three") == {"00000.tar": 12}


def test_what_cannot_be_packed_is_counted_and_named(photos, caplog):
    Path("photos/0.png").write_bytes(b"no image")
    Path("photos/2.jpeg").write_bytes(Path("photos/2.jpeg").read_bytes()[:-40])
    Path("photos/more/3.webp").unlink()
    Path("photos/4.gif").unlink()
    os.mkfifo("photos/4.gif")
    Path("train.json").write_text(json.dumps([*photos, {"image": "x.png", "caption": ""}]))
    assert pack("shards") == 0
    assert "Skipped 4 unreadable images" in caplog.text
    assert "Skipped 1 rows or captions of train.json" in caplog.text
    named = Path("shards.skipped.log").read_text()
    assert len(named.splitlines()) == 5 and "photos/more/3.webp: no such file" in named
    assert "photos/0.png: no image of a known format" in named and "entry 13" in named
    stream = build("shards=shards")["train"]
    assert len(stream) == 8 == len(set(ids(one_pass(stream))))


def test_of_karpathys_layout_the_train_split_is_packed(photos):
    images = [
        {"filename": row["image"], "split": split, "sentences": [{"raw": "a card"}]}
        for row, split in zip(photos, ["train", "restval", "val", "test"] * 3, strict=True)
    ]
    Path("train.json").write_text(json.dumps({"images": images}))
    assert pack_shards.pack_shards("train.json", "photos", "shards") == {"00000.tar": 6}


def test_a_killed_pack_leaves_no_shards(photos, monkeypatch):
    opened = []

    def interrupted(*arguments):
        opened.append(arguments)
        if len(opened) == 8:
            raise KeyboardInterrupt
        assert not Path("shards").exists()

    before = sorted(Path().rglob("*"))
    monkeypatch.setattr(pack_shards, "open_rgb", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack_shards.pack_shards("train.json", "photos", "shards", per_shard=2)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "photos"], "photos exists and is no empty folder"),
        (["--out", "train.json"], "train.json exists and is no empty folder"),
        (["--out", "train.json/x"], "cannot write the shards .*: (Not a directory|File exists)"),
        (["--images", "phtos"], "--images: there is no folder phtos"),
        (["--captions", "none.json"], "cannot read the caption file none.json"),
        (["--per-shard", "0"], "--per-shard must be 1 or more, not 0"),
        (["--images", "empty"], "none of the 12 images can be read: .*no such file"),
    ],
    ids=str,
)
def test_a_mistake_in_packing_gets_one_line(photos, capfd, options, message):
    Path("empty").mkdir()
    before = sorted(Path().rglob("*"))
    assert pack("shards", *options) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("softmask")]
    assert re.search(f"softmask: error: .*{message}", line)
    assert sorted(Path().rglob("*")) == before


def test_names_of_folders_are_never_commands(photos):
    """An --out that webdataset would run, or take for a pattern."""
    for out in ("pipe:touch marker", "50%d"):
        assert pack(out) == 0 and sorted(contents(out)) == ["00000.tar", "index.json"]
    assert pack("empty") == 0
    assert not Path("marker").exists()


# ---- memory


def test_memory_stays_flat_over_a_long_stream(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.stream_memory", "--small", "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "growth after the warm-up" in done.stdout
    result = json.loads((tmp_path / "stream_memory.json").read_text())
    assert result["samples"][-1] == 4000 and result["broken"] == 4
    assert result["growth"] < 8  # MiB; the images alone, decoded, are 100
    half = len(result["mib"]) // 2  # medians: a single reading is off by some MiB at times
    assert median(result["mib"][half:]) - median(result["mib"][:half]) < 3
    assert (tmp_path / "stream_memory.png").stat().st_size > 1000
