"""Broken and hostile shards: defects are skipped, counted and named, and nothing is run."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import tarfile
from itertools import islice

import pytest
from toy_shards import build, good, ids, make, one_pass, picture, write_tar

from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.errors import UserError

BROKEN = {  # members beside the good samples a and c, and the line that names them
    "no image at all": ({"b.txt": b"text"}, r"/b: no image \(\.jpg"),
    "no image": ({"b.png": b"nothing", "b.txt": b"text"}, r"/b\.png: no image of a known format"),
    "truncated image": ({"b.png": picture()[:-20], "b.txt": b"text"}, r"/b\.png: .*truncated"),
    "no caption": ({"b.png": picture()}, "/b: no usable caption: None"),
    "empty caption": ({"b.png": picture(), "b.txt": b" . "}, "/b: no usable caption: ' . '"),
    "null caption": ({"b.png": picture(), "b.json": b'{"caption": null}'}, "/b: no usable caption"),
    "no JSON": ({"b.png": picture(), "b.json": b"{"}, r"/b: \.json is not valid JSON"),
    "deep JSON": ({"b.png": picture(), "b.json": b"[" * 200_000}, "/b: .*recursion"),
    "a list": ({"b.png": picture(), "b.json": b"[1]"}, r"/b: \.json is not an object but \[1\]"),
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


def test_the_first_of_duplicate_members_counts(tmp_path):
    shard = write_tar(tmp_path / "0.tar", good("a"))
    write_tar(shard, {"a.txt": b"another", **good("b")}, mode="a")
    log = SkipLog(tmp_path / "skipped.log")
    samples = one_pass(make([shard], shuffle=0, skipped=log))
    assert [s["text_input"] for s in samples] == ["picture a", "picture b"]
    (named,) = log.path.read_text().splitlines()
    assert named.startswith(f"{shard}: a.txt: duplicate")


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
        with pytest.raises(UserError, match="only local files are read|is not a file") as caught:
            build(f"shards={json.dumps(given)}", "items=1")
        assert "\n" not in str(caught.value)
    # Not even past the builder, where it is just a file name
    stream = make([scheme.replace("{}", str(marker))])
    with pytest.raises(UserError, match="no usable sample.*No such file"):
        next(iter(stream))
    monkeypatch.setenv("GOPEN_REWRITE", f"{tmp_path}/x=pipe:touch {marker};cat {tmp_path}/x")
    assert ids(one_pass(make([tmp_path / "x.tar"]))) == ["x.tar/a"]
    assert not marker.exists()


def test_a_pass_without_a_usable_sample_is_an_error(shards, tmp_path, as_rank):
    bad = [write_tar(tmp_path / f"{i}.tar", {"b.txt": b"text"}) for i in range(2)]
    stream = make(bad, skipped=SkipLog(muted=True))
    with pytest.raises(UserError, match=r"2 of 2 shards have no usable sample.*/b: no image"):
        next(iter(stream))
    empty = make([write_tar(tmp_path / "3.tar", {})])
    with pytest.raises(UserError, match="1 of 1 shards have no usable sample.*they are empty"):
        next(iter(empty))
