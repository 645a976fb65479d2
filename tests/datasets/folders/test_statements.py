"""The user's own statements about images and pairs of images, as LAVIS's tasks read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lavis.datasets.datasets.nlvr_datasets import NLVREvalDataset
from lavis.datasets.datasets.snli_ve_datasets import SNLIVisualEntialmentDataset
from PIL import Image
from toy_folders import COLOURS, LABELS, PAIRS, STATEMENTS, build, evaluate, task, write

from softmask_plugin.datasets.tables.statements import parse_statements
from softmask_plugin.errors import UserError


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv"])
def test_statements_in_every_layout(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", STATEMENTS)
    statements = parse_statements(path, ["image"], LABELS)
    assert statements[0] == {"image": "red.png", "sentence": "It is red.", "label": "entailment"}
    assert [LABELS.index(item["label"]) for item in statements] == [2, 1, 0, 2]
    path = write(tmp_path / f"b.{suffix}", PAIRS)
    pairs = parse_statements(path, ["image0", "image1"], ["False", "True"])
    assert [item["label"] for item in pairs] == ["True", "False", "True", "False"]
    assert pairs[0]["images"] == ["red.png", "blue.png"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "entailed"}, "unknown label 'entailed': did you mean 'entailment'?"),
        ({"label": "xyz"}, "unknown label 'xyz': choose from 'contradiction', 'entailment', 'neu"),
        ({"label": 3}, "unknown label 3"),
        ({"label": -1}, "unknown label -1"),
        ({"label": True}, "unknown label True"),
        ({"label": None}, "unknown label None"),
        ({"sentence": ""}, "no usable sentence: ''"),
        ({"image": "a/../../b.jpg"}, "image 'a/../../b.jpg' is outside the images folder"),
    ],
    ids=str,
)
def test_a_bad_statement_is_skipped_and_reported(tmp_path, caplog, change, message):
    path = write(tmp_path / "a.json", [STATEMENTS[0], {**STATEMENTS[1], **change}])
    assert len(parse_statements(path, ["image"], LABELS)) == 1
    assert f"Skipped 1 rows of a.json: {path}, entry 2: {message}" in caplog.text


def test_names_that_are_numbers_are_not_counted_from_0(tmp_path, caplog):
    rows = [{**STATEMENTS[0], "label": label} for label in (1, "2", 0)]
    statements = parse_statements(write(tmp_path / "a.json", rows), ["image"], ["1", "2", "3"])
    assert [item["label"] for item in statements] == ["1", "2"]
    assert "entry 3: unknown label 0: choose from '1', '2', '3'" in caplog.text


def test_a_missing_column_is_named(tmp_path):
    path = write(tmp_path / "a.csv", PAIRS)
    with pytest.raises(UserError, match="a.csv has no 'image' among its columns .'image0', 'im"):
        parse_statements(path, ["image"], LABELS)
    with pytest.raises(UserError, match="cannot read the statement file"):
        parse_statements(tmp_path / "none.csv", ["image"], LABELS)


class Classes:
    """A model with given logits."""

    def __init__(self, logits) -> None:
        self.logits = logits

    def predict(self, samples):
        return {"predictions": self.logits(samples["label"]), "targets": samples["label"]}


@pytest.mark.parametrize(
    ("name", "rows", "share_of_class_0"),
    [("entailment_folder", STATEMENTS, 0.25), ("nlvr_folder", PAIRS, 0.5)],
)
def test_lavis_computes_the_accuracy(colour_photos, name, rows, share_of_class_0):
    options = [f"sentences.{split}={write('a.csv', rows)}" for split in ("train", "val")]
    classification, datasets = task("multimodal_classification", name, *options)

    def oracle(labels):
        return torch.nn.functional.one_hot(labels, 3)

    for split in ("train", "val"):
        assert evaluate(classification, datasets[split], Classes(oracle), split)["acc"] == 1
    constant = Classes(lambda labels: oracle(torch.zeros_like(labels)))
    metrics = evaluate(classification, datasets["val"], constant, "val")
    assert metrics == {"agg_metrics": share_of_class_0, "acc": share_of_class_0}


def test_entailment_samples_equal_those_of_lavis(colour_photos):
    """SNLIVisualEntialmentDataset reads images with the suffix .jpg, and labels by name."""
    for colour in COLOURS:
        Image.open(f"photos/{colour}.png").save(f"photos/{colour}.jpg")
    rows = parse_statements(write("a.json", STATEMENTS), ["image"], LABELS)
    rows = [{**row, "image": row["image"].replace("png", "jpg")} for row in rows]
    ours = build("entailment_folder", f"sentences.val={write('b.json', rows)}")["val"]
    stems = [{**row, "image": Path(row["image"]).stem} for row in rows]
    theirs = SNLIVisualEntialmentDataset(
        ours.vis_processor, ours.text_processor, "photos", [write("c.json", stems)]
    )
    assert len(ours) == len(theirs) == 4 and ours.class_labels == theirs.class_labels
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our.pop("image"), their.pop("image"))
        assert our == {**their, "image_id": f"{their['image_id']}.jpg"}


def test_pairs_equal_those_of_lavis(colour_photos):
    ours = build("nlvr_folder", f"sentences.val={write('a.json', PAIRS)}")["val"]
    pairs = parse_statements("a.json", ["image0", "image1"], ["False", "True"])
    theirs = NLVREvalDataset(
        ours.vis_processor, ours.text_processor, "photos", [write("b.json", pairs)]
    )
    assert len(ours) == len(theirs) == 4
    for our, their in zip(ours, theirs, strict=True):
        for image in ("image0", "image1"):
            assert torch.equal(our.pop(image), their.pop(image))
        assert our == their
    assert ours.displ_item(0)["file_R"] == "blue.png"


def test_swapped_pairs_stay_true(colour_photos):
    """Whichever image is left, the sentence is true; other words keep their letters."""
    rows = [
        {**PAIRS[0], "sentence": "The left one is bright red, the rightmost blue", "label": True}
    ]
    plain = [f"vis_processor.train.{key}" for key in ("min_scale=null", "randaugment_ops=0")]
    train = build("nlvr_folder", f"sentences.train={write('a.json', rows)}", *plain)["train"]
    texts = {
        0: "the left one is bright red the rightmost blue",
        2: "the right one is bright red the leftmost blue",
    }
    torch.manual_seed(0)
    first = []
    for _ in range(200):
        sample = train[0]
        channel = int(sample["image0"].mean(dim=(1, 2)).argmax())  # of the first: red or blue
        assert sample["text_input"] == texts[channel] and sample["label"] == 1
        first.append(channel)
    assert 60 < np.count_nonzero(first) < 140
    still = build("nlvr_folder", "sentences.train=a.json", "swap=false", *plain)["train"]
    assert {still[0]["text_input"] for _ in range(20)} == {texts[0]}


def test_custom_classes(colour_photos):
    rows = [{**STATEMENTS[0], "label": label} for label in ("No", 5, "1", "yes")]
    options = f"sentences.val={write('a.json', rows)}", "labels=['yes', 'no', 5]"
    val = build("entailment_folder", *options)["val"]
    assert [item["label"] for item in val] == [1, 2, 1, 0]
