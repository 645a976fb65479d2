"""Packing images and captions into shards."""

from __future__ import annotations

import json
import os
import re
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from toy_shards import build, ids, one_pass

from softmask_plugin import cli
from softmask_plugin.datasets.shards import pack as pack_shards


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
    assert len(named.splitlines()) == 5 and "photos/more/3.webp: No such file" in named
    assert "photos/0.png: no image of a known format" in named and "entry 13" in named
    stream = build("shards=shards")["train"]
    assert len(stream) == 8 == len(set(ids(one_pass(stream))))


def test_a_karpathy_files_train_split_is_packed(photos):
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
        (["--out", "photos"], "photos is not an empty folder"),
        (["--out", "train.json"], "train.json is not an empty folder"),
        (["--out", "train.json/x"], "cannot write the shards .*: (Not a directory|File exists)"),
        (["--images", "phtos"], "--images: there is no folder phtos"),
        (["--captions", "none.json"], "cannot read the caption file none.json"),
        (["--per-shard", "0"], "--per-shard must be 1 or more, not 0"),
        (["--images", "empty"], "none of the 12 images can be read: .*No such file"),
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


def test_folder_names_are_never_run(photos):
    """An --out that webdataset would run, or take for a pattern."""
    for out in ("pipe:touch marker", "50%d"):
        assert pack(out) == 0 and sorted(contents(out)) == ["00000.tar", "index.json"]
    assert pack("empty") == 0
    assert not Path("marker").exists()
