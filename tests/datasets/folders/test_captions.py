"""The user's own images and captions: parsing, data sets, and bad input."""

from __future__ import annotations

import csv
import io
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lavis.common.registry import registry
from lavis.tasks.retrieval import RetrievalTask
from omegaconf import OmegaConf
from PIL import Image, ImageFile
from torch.utils.data import DataLoader
from toy_folders import build, write

from softmask_plugin.datasets import skip_log
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.datasets.tables.captions import parse_captions
from softmask_plugin.datasets.tables.layouts import TableOptions
from softmask_plugin.datasets.task_datasets import PretrainDataset, number_images
from softmask_plugin.errors import UserError

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six plain images and their captions, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    rows = []
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (20, 16), colour).save(f"photos/{colour}.png")
        captions = [f"A {colour} card.", f"The {colour} one, number {number}"]
        rows.append({"image": f"{colour}.png", "caption": captions})
    Path("captions.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.fixture
def output_dir(tmp_path, monkeypatch):
    """A run's output folder, as LAVIS's runner registers it."""
    monkeypatch.setitem(registry.mapping["paths"], "output_dir", str(tmp_path / "run"))
    return tmp_path / "run"


# ---- parsing

NAMES = st.from_regex(r"[a-zé0-9]{1,3}( [a-z])?(/[a-z]{1,2})?\.(jpg|png)", fullmatch=True)
TEXTS = st.text(st.sampled_from("aZé9,;\t\"' .\n☂-{}[]"), max_size=12).map(lambda t: f"x{t}y")
ROWS = st.dictionaries(NAMES, st.lists(TEXTS, min_size=1, max_size=3), min_size=1, max_size=4)


def as_delimited(rows: dict[str, list[str]], delimiter: str) -> str:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(["image", "", "caption"])
    for image, captions in rows.items():
        writer.writerows([image, 0, caption] for caption in captions)
    return file.getvalue()


def as_karpathy(rows: dict[str, list[str]]) -> str:
    images = [
        {
            "filepath": str(Path(image).parent) if "/" in image else "",
            "filename": Path(image).name,
            "split": "restval",
            "sentences": [{"raw": caption, "tokens": []} for caption in captions],
        }
        for image, captions in rows.items()
    ]
    return json.dumps({"images": images, "dataset": "mine"}, indent=1)


LAYOUTS = {
    "list.json": lambda rows: json.dumps([{"image": i, "caption": c} for i, c in rows.items()]),
    "flat.json": lambda rows: json.dumps(
        [{"image": i, "caption": c} for i, captions in rows.items() for c in captions]
    ),
    "single.json": lambda rows: json.dumps(
        {"images": json.loads(as_karpathy(rows))["images"]}, ensure_ascii=False
    ),
    "a.jsonl": lambda rows: "\n\n".join(
        json.dumps({"image": i, "caption": c}) for i, c in rows.items()
    ),
    "karpathy.json": as_karpathy,
    "a.csv": lambda rows: as_delimited(rows, ","),
    "semicolon.csv": lambda rows: as_delimited(rows, ";"),
    "a.tsv": lambda rows: as_delimited(rows, "\t"),
    "bom.txt": lambda rows: "\ufeff" + as_delimited(rows, ","),
}


@given(ROWS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_all_layouts_give_the_same_captions(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("layouts")
    expected = [{"image": i, "caption": c, "image_id": i} for i, c in rows.items()]
    for name, layout in LAYOUTS.items():
        (folder / name).write_bytes(layout(rows).encode())
        assert parse_captions(folder / name, "train") == expected, name


def test_rows_of_one_image_are_merged(tmp_path):
    rows = [
        {"image": "a/b.jpg", "caption": "one", "image_id": "coco_7"},
        {"image": "c.jpg", "caption": ["two", "three"]},
        {"image": "./a//b.jpg", "caption": ["four"], "image_id": 8},
        {"image": "a\\b.jpg", "caption": 5},
    ]
    assert parse_captions(write(tmp_path / "a.json", rows)) == [
        {"image": "a/b.jpg", "caption": ["one", "four", "5"], "image_id": "coco_7"},
        {"image": "c.jpg", "caption": ["two", "three"], "image_id": "c.jpg"},
    ]


def test_a_karpathy_file_is_split(tmp_path):
    images = [
        {"filename": f"{n}.jpg", "split": split, "sentences": [{"raw": f"number {n}"}]}
        for n, split in enumerate(["train", "restval", "val", "test", "test"])
    ]
    path = write(tmp_path / "dataset.json", {"images": images})
    for split, expected in {"train": "01", "val": "2", "test": "34", None: "01234"}.items():
        assert "".join(item["image"][0] for item in parse_captions(path, split)) == expected
    write(path, {"images": images[:2]})
    with pytest.raises(UserError, match="no image of split 'test'; its splits: {'train': 1, 'res"):
        parse_captions(path, "test")


@pytest.mark.parametrize(
    "row",
    [
        "not an object",
        {"caption": "no image"},
        {"image": "b.jpg"},
        {"image": None, "caption": "x"},
        {"image": 3, "caption": "x"},
        {"image": " ", "caption": "x"},
        {"image": "../b.jpg", "caption": "x"},
        {"image": "b/../../c.jpg", "caption": "x"},
        {"image": "/etc/b.jpg", "caption": "x"},
        {"image": "C:\\b.jpg", "caption": "x"},
        {"image": "b.jpg", "caption": None},
        {"image": "b.jpg", "caption": float("nan")},
        {"image": "b.jpg", "caption": ""},
        {"image": "b.jpg", "caption": " . "},
        {"image": "b.jpg", "caption": []},
        {"image": "b.jpg", "caption": [None, "", True, {}]},
    ],
    ids=str,
)
def test_a_bad_row_is_skipped_and_reported(tmp_path, caplog, row):
    good = {"image": "a.jpg", "caption": "fine"}
    path = write(tmp_path / "a.json", [good, row])
    skipped = SkipLog(tmp_path / "skipped.log")
    options = TableOptions(skipped=skipped)
    assert [item["image"] for item in parse_captions(path, options=options)] == ["a.jpg"]
    assert "Skipped 1 rows or captions of a.json" in caplog.text
    assert f"{path}, entry 2: " in skipped.path.read_text()
    write(path, [row])
    with pytest.raises(UserError, match=r"no usable row: .*a\.json, entry 1: "):
        parse_captions(path)


def test_an_unquoted_delimiter_does_not_cut_a_caption(tmp_path, caplog):
    path = write(tmp_path / "a.csv", 'image,caption\na.jpg,"a cat, asleep"\nb.jpg,a cat, awake\n')
    assert [item["caption"] for item in parse_captions(path)] == [["a cat, asleep"]]
    assert "line 3: more fields than columns" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[{", "is not valid JSON: .*line 1"),
        ("a.json", "", "is not valid JSON"),
        ("a.json", "5", "entry 1: expected 'image' and 'caption', got 5"),
        (
            "a.json",
            '{\n"annotations": []\n}',
            r"entry 1: no 'image' and no 'caption' among \['annotations'\]",
        ),
        ("a.json", [], "holds no rows"),
        (
            "a.json",
            [{"img": "a", "captions": "b"}],
            "no 'image' and no 'caption' among .'img', 'captions'",
        ),
        ("a.jsonl", '{"image": "a.jpg"}\n{"image": ', "line 1: no 'caption'"),
        ("a.csv", "", "a.csv holds no rows, or begins with an empty line"),
        ("a.csv", "file,caption\na,b", "no 'image' among its columns .*'file'"),
        ("a.csv", 'image,caption\na.jpg,"unclosed\n', "after line 1: unexpected end of data"),
        ("a.csv", "image,caption\n", "holds no rows"),
        ("a.csv", b"image,caption\na.jpg,caf\xe9", "not UTF-8"),
        ("a.json", {"images": [{"file_name": "a"}]}, "of split 'train'; no entry names a split"),
        ("none.json", None, "cannot read the caption file .*No such file"),
    ],
)
def test_a_malformed_file_is_refused_by_name(tmp_path, name, content, message):
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as caught:
        parse_captions(tmp_path / name, "train")
    assert name in str(caught.value)


# ---- data sets


def test_train_items(folder):
    train = build("captions_folder", "captions.train=captions.json")["train"]
    assert len(train) == 6
    item = train[2]
    assert item["image"].shape == (3, 8, 8) and item["image"].dtype == torch.float32
    assert (item["image_id"], item["instance_id"]) == (2, "2")
    torch.manual_seed(0)
    drawn = [train[2]["text_input"] for _ in range(20)]
    assert set(drawn) == {"a blue card", "the blue one number 2"}
    torch.manual_seed(0)
    assert drawn == [train[2]["text_input"] for _ in range(20)]
    batch = next(iter(DataLoader(train, 4, collate_fn=train.collater)))
    assert batch["image"].shape == (4, 3, 8, 8) and batch["image_id"].tolist() == [0, 1, 2, 3]


def test_images_of_one_image_id_are_positives_of_each_other(folder):
    rows = json.loads(Path("captions.json").read_text())
    for row, image_id in zip(rows, [9, "a", 9, None, "a", ""], strict=True):
        row["image_id"] = image_id
    write(Path("captions.json"), rows)
    train = build("captions_folder", "captions.train=captions.json")["train"]
    assert [train[i]["image_id"] for i in range(6)] == [0, 1, 0, 2, 1, 3]


def test_evaluation_has_the_layout_of_lavis(folder, output_dir):
    datasets = build("captions_folder", "captions.val=captions.json", "captions.test=captions.json")
    assert list(datasets) == ["val", "test"]
    val = datasets["val"]
    assert val.image == [f"{colour}.png" for colour in COLOURS]
    assert val.text[:3] == ["a red card", "the red one number 0", "a green card"]
    assert val.img2txt[1] == [2, 3] and val.txt2img[3] == 1 and len(val.txt2img) == 12
    assert val[4]["index"] == 4 and val[4]["image"].shape == (3, 8, 8)

    output_dir.mkdir()
    truth = np.repeat(np.eye(6), 2, axis=1)
    perfect = RetrievalTask._report_metrics(truth, truth.T, val.txt2img, val.img2txt)
    assert perfect["txt_r1"] == perfect["img_r1"] == 100
    wrong = RetrievalTask._report_metrics(1 - truth, 1 - truth.T, val.txt2img, val.img2txt)
    assert wrong["txt_r1"] == wrong["img_r1"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["captions.train=captions.json", "images=null"], "images is not set"),
        ([], "captions names no file"),
        (["images=phtos", "captions.train=captions.json"], "there is no folder .*phtos"),
        (["captions.valid=captions.json"], "captions.valid: did you mean 'val'"),
        (["image=x"], "unknown key .*image: did you mean 'images'"),
        (["captions.train=[a.json,b.json]"], "must be the path of one file"),
        (["images=.", "captions.train=captions.json"], "none of the 6 images exists: .*red.png"),
        (
            ["captions.train=captions.json", "vis_processor.train.blur=0"],
            "unknown key softmask_image_train.blur: did you mean 'blur_p'",
        ),
    ],
    ids=str,
)
def test_wrong_options_get_one_clear_line(folder, options, message):
    with pytest.raises(UserError, match=message) as caught:
        build("captions_folder", *options)
    assert "\n" not in str(caught.value)


def test_missing_images_are_counted_and_named(folder, output_dir, caplog):
    for colour in ("red", "blue"):
        Path(f"photos/{colour}.png").unlink()
    train = build("captions_folder", "captions.train=captions.json")["train"]
    assert [item["image"] for item in train.annotation] == [
        f"{colour}.png" for colour in ("green", "yellow", "purple", "orange")
    ]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("Skipped 2 missing images: ")
    assert "blue.png: no such file" in warning and "skipped_images.log" in warning
    named = (output_dir / "skipped_images.log").read_text().splitlines()
    assert named == [f"{folder / 'photos' / c}.png: no such file" for c in ("red", "blue")]


def test_unreadable_training_images_are_replaced_and_named_once(folder, output_dir):
    Path("photos/green.png").write_bytes(b"no image")
    Path("photos/blue.png").write_bytes(Path("photos/blue.png").read_bytes()[:-30])
    train = build("captions_folder", "captions.train=captions.json")["train"]
    assert len(train) == 6 and not output_dir.exists()
    for _ in range(2):  # epochs, each with new workers
        ids = [s["image_id"] for s in DataLoader(train, batch_size=None, num_workers=2)]
        assert ids == [0, 3, 3, 3, 4, 5]
    named = sorted((output_dir / "skipped_images.log").read_text().splitlines())
    assert len(named) == 2 and "blue.png" in named[0] and "green.png" in named[1]


def test_simultaneous_reports_name_each_image_once(tmp_path):
    names = [f"{i:02}.png: unreadable" for i in range(50)]
    log = SkipLog(tmp_path / "run" / "skipped_images.log")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: log.add("images", [name]), sorted(names * 8)))
    assert sorted(log.path.read_text().splitlines()) == names


@pytest.mark.parametrize("error", [OSError(95, "not supported"), NotImplementedError()])
def test_the_log_works_without_file_locks(tmp_path, monkeypatch, error):
    monkeypatch.setattr(skip_log, "FileLock", Mock(side_effect=error))
    log = SkipLog(tmp_path / "skipped_images.log")
    log.add("images", ["a.png", "b.png", "a.png"])
    log.add("images", ["b.png", "c.png"])
    assert log.path.read_text() == "a.png\nb.png\nc.png\n"


def test_the_log_works_while_another_process_holds_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(skip_log, "PATIENCE", 0.1)
    log = SkipLog(tmp_path / "skipped_images.log")
    with FileLock(f"{log.path}.lock"):
        log.add("images", ["a.png"])
    assert log.path.read_text() == "a.png\n"


def test_the_gallery_leaves_out_unreadable_images(folder, output_dir, caplog):
    Path("photos/green.png").write_bytes(b"no image")
    val = build("captions_folder", "captions.val=captions.json")["val"]
    assert len(val) == 5 and "green.png" not in val.image
    assert len(val.text) == 10 and val.img2txt[1] == [2, 3] and "blue" in val.text[2]
    assert val[1]["image"][2].mean() > val[1]["image"][0].mean()  # it is the blue one
    assert "Skipped 1 unreadable images" in caplog.text
    assert "green.png" in (output_dir / "skipped_images.log").read_text()


def test_nothing_readable_is_an_error(folder):
    for path in Path("photos").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 6 val images can be read: .*red.png"):
        build("captions_folder", "captions.val=captions.json")
    train = build("captions_folder", "captions.train=captions.json")["train"]
    with pytest.raises(UserError, match="images in a row cannot be read"):
        train[0]


def test_pillows_setting_for_truncated_files_is_restored(folder):
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    build("captions_folder", "captions.val=captions.json")
    assert before == ImageFile.LOAD_TRUNCATED_IMAGES


def test_the_log_is_above_the_run_folder_until_that_exists(tmp_path, monkeypatch):
    monkeypatch.delitem(registry.mapping["paths"], "output_dir", raising=False)
    monkeypatch.delitem(registry.mapping["state"], "configuration", raising=False)
    assert SkipLog.of_run().path is None
    run = OmegaConf.create({"run_cfg": {"output_dir": str(tmp_path)}})
    monkeypatch.setitem(registry.mapping["state"], "configuration", run)
    assert SkipLog.of_run().path == tmp_path / "skipped_images.log"
    monkeypatch.setitem(registry.mapping["paths"], "output_dir", str(tmp_path / "job"))
    assert SkipLog.of_run().path == tmp_path / "job" / "skipped_images.log"


def test_images_of_data_sets_that_train_together_differ():
    def dataset(names):
        items = [{"image_id": name, "image": name, "caption": ["a"]} for name in names]
        return PretrainDataset(None, str, items, lambda *_: [])

    datasets = [dataset("aab"), object(), dataset("ab")]
    number_images(datasets)
    ids = [[item["image_id"] for item in each.annotation] for each in (datasets[0], datasets[2])]
    assert ids == [[0, 0, 1], [2, 3]]
