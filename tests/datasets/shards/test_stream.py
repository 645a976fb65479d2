"""Streaming shards: which there are, who reads what in which order, at what memory."""

from __future__ import annotations

import gzip
import json
import pickle
import subprocess
import sys
import tarfile
from itertools import product
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import torch
import webdataset as wds
from lavis.datasets.data_utils import concat_datasets
from torch.utils.data import ChainDataset, DataLoader
from toy_shards import (
    PER_SHARD,
    SHARDS,
    build,
    good,
    ids,
    make,
    one_pass,
    picture,
    plain,
    write_tar,
)

from softmask_plugin.datasets.shards import stream as shard_stream
from softmask_plugin.datasets.shards.files import find_shards
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.errors import UserError

ROOT = Path(__file__).parents[3]


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


def test_the_order_depends_only_on_seed_and_pass(shards):
    first, second = (ids(one_pass(make(shards), number)) for number in (0, 1))
    assert sorted(first) == sorted(second) and first != second
    assert first == ids(one_pass(make(shards)))
    assert first != ids(one_pass(make(shards, seed=1)))
    in_order = ids(one_pass(make(shards, shuffle=0)))
    shard = [i for i in first if i.startswith(in_order[0].split("/")[0])]
    assert in_order[:PER_SHARD] == sorted(shard) != shard  # a shard's samples, and they were mixed
    assert [i.split("/")[0] for i in first] == [i.split("/")[0] for i in in_order]


def test_draws_depend_only_on_seed_pass_and_sample(shards, as_rank):
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


def test_lavis_accepts_the_stream(shards):
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


def test_a_compressed_shard_is_read(tmp_path):
    whole = write_tar(tmp_path / "whole", good("a", "b")).read_bytes()
    (tmp_path / "0.tar").write_bytes(gzip.compress(whole))
    log = SkipLog(tmp_path / "skipped.log")
    assert len(one_pass(make([tmp_path / "0.tar"], skipped=log))) == 2 and not log.path.exists()


def test_shards_of_other_tools_are_read(tmp_path):
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
        (["shards=none.tar"], "shards: none.tar is not a file \\(1 of 1\\)"),
        (["shards=data/{0..4}.tar"], "shards: data/2.tar is not a file \\(3 of 5\\)"),
        (["shards=data/{0..4.tar"], "is not a valid pattern|is not a file"),
        (["shards=other/*.tar"], "no shard .* is found at other/"),
        (["shards=."], "no shard .* is found at ."),
        (["shards=s3://bucket/0.tar"], "starts with s3:, but only local files are read"),
        (["shards=https://host/{0..1}.tar"], "starts with https:, but only local"),
        (["shards=data"], "caption_shards.items is not set and there is no .*index.json: set "),
        (["shards=listed"], "listed/index.json does not count 1.tar: set .*items"),
        (["shards=malformed"], "malformed/index.json is not valid JSON"),
        (["shards=data", "items=0"], "items is 0: it must be a whole number >= 1"),
        (["shards=data", "items=many"], "items is 'many': it must be a whole number >= 1"),
        (["shards=data", "items=1", "shuffle=-1"], "shuffle is -1: it must be a whole number >= 0"),
        (["shards=data", "items=1", "seed=0.5"], "seed is 0.5: it must be a whole number >= 0"),
        (["shard=data"], "unknown key datasets.caption_shards.shard: did you mean 'shards'"),
        (
            ["shards=data", "items=1", "vis_processor.train.blur=0"],
            "unknown key softmask_image_train.blur: did you mean 'blur_p'",
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
