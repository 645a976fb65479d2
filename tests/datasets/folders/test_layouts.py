"""Files as they are published, columns of other names, and absolute image names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from lavis.common.registry import registry
from lavis.common.vqa_tools.vqa import VQA
from omegaconf import OmegaConf
from PIL import Image
from toy_folders import LABELS, build, write

from softmask_plugin.datasets.shards.pack import pack_shards
from softmask_plugin.datasets.tables.captions import parse_captions
from softmask_plugin.datasets.tables.layouts import TableOptions
from softmask_plugin.errors import UserError
from softmask_plugin.vocabulary import build_tokenizer

FLICKR = {"1.jpg": ["A dog runs .", 'Two "young" guys , one hat .'], "2.jpg": ["A cat sleeps ."]}
LINES = [(name, n, text) for name, texts in FLICKR.items() for n, text in enumerate(texts)]
CAPTIONS = {
    "results.csv": "image_name| comment_number| comment\n"
    + "".join(f"{name}| {n}| {text}\n" for name, n, text in LINES),
    "Flickr8k.token.txt": "".join(f"{name}#{n}\t{text}\n" for name, n, text in LINES),
    "results_20130124.token": "".join(f"{name}#{n}\t{text}\r\n" for name, n, text in LINES),
    "dataset_flickr30k.json": json.dumps(
        {
            "images": [
                {"filename": name, "split": "train", "sentences": [{"raw": t} for t in texts]}
                for name, texts in FLICKR.items()
            ],
            "dataset": "flickr30k",
        }
    ),
    "by_name.json": json.dumps(FLICKR),
    "by_name_indented.json": json.dumps(FLICKR, indent=1),
}


@pytest.fixture
def images(colour_photos):
    """Makes small images below photos/, in the current folder."""

    def make(*names: str) -> None:
        for name in names:
            path = Path("photos", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)

    return make


def rows_of(dataset, *keys):
    return [tuple(item[key] for key in keys) for item in dataset.annotation]


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_of_flickr(images, name):
    images(*FLICKR)
    write(name, CAPTIONS[name])
    train = build("captions_folder", f"captions.train={name}")["train"]
    assert {item["image"]: item["caption"] for item in train.annotation} == FLICKR


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_captions_of_open_clip(images, suffix):
    images("a.jpg", "b.jpg")
    rows = [{"filepath": "a.jpg", "title": "a cat, asleep"}, {"filepath": "b.jpg", "title": "b 2"}]
    train = build("captions_folder", f"captions.train={write(f'train.{suffix}', rows)}")["train"]
    assert rows_of(train, "image", "caption") == [("a.jpg", ["a cat, asleep"]), ("b.jpg", ["b 2"])]


@pytest.mark.parametrize("folder", ["", "val2017/"])
def test_captions_of_coco(images, caplog, folder):
    """With the images folder set to that of the split, or to the one that holds all splits."""
    images(f"{folder}000000000139.jpg", f"{folder}000000000285.jpg")
    url = "http://images.cocodataset.org/val2017"
    content = {
        "info": {"description": "COCO 2017 Dataset"},
        "licenses": [],
        "images": [
            {"id": 139, "file_name": "000000000139.jpg", "coco_url": f"{url}/000000000139.jpg"},
            {"id": 285, "file_name": "000000000285.jpg", "coco_url": f"{url}/000000000285.jpg"},
        ],
        "annotations": [
            {"image_id": 285, "id": 1, "caption": "A bear."},
            {"image_id": 139, "id": 2, "caption": "A room."},
            {"image_id": 285, "id": 3, "caption": "A big bear."},
            {"image_id": 7, "id": 4, "caption": "of no image"},
            3,
        ],
    }
    Path("captions_val2017.json").write_text(json.dumps(content))
    val = build("captions_folder", "captions.val=captions_val2017.json")["val"]
    assert rows_of(val, "image", "caption", "image_id") == [
        (f"{folder}000000000285.jpg", ["A bear.", "A big bear."], "285"),
        (f"{folder}000000000139.jpg", ["A room."], "139"),
    ]
    assert "annotation 4: expected an image name" in caplog.text
    assert "annotation 5: expected 'image' and 'caption', got 3" in caplog.text


SNLI_VE = {
    "annotator_labels": ["entailment"],
    "captionID": "4705552913.jpg#2",
    "pairID": "4705552913.jpg#2r1e",
    "sentence1": "A caption that nobody needs .",
    "sentence2": "Two women are holding packages.",
    "gold_label": "entailment",
}
E_SNLI_VE = {
    "Flickr30kID": "4705552913.jpg",
    "pairID": "4705552913.jpg#2r1e",
    "hypothesis": "Two women are holding packages.",
    "gold_label": "entailment",
    "explanation": "They hold packages, so",
}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("snli_ve_dev.jsonl", {**SNLI_VE, "Flickr30K_ID": "4705552913"}),
        ("snli_ve_dev.jsonl", {**SNLI_VE, "Flikr30kID": "4705552913"}),
        ("esnlive_dev.csv", E_SNLI_VE),
    ],
)
def test_statements_of_snli_ve(images, name, row):
    images("4705552913.jpg")
    rows = [row, {**row, "gold_label": "-"}, {**row, "gold_label": "neutral"}]
    val = build("entailment_folder", f"sentences.val={write(name, rows)}")["val"]
    assert rows_of(val, "image", "sentence", "label") == [
        ("4705552913.jpg", "Two women are holding packages.", label)
        for label in ("entailment", "neutral")
    ]


@pytest.mark.parametrize("folder", ["", "dev/"])
def test_statements_of_nlvr2(images, folder):
    images(*(f"{folder}dev-850-0-img{i}.png" for i in (0, 1)))
    row = {"validation": {"1": "True"}, "synset": "wall", "left_url": "http", "label": "False"}
    rows = [row | {"identifier": f"dev-850-0-{i}", "sentence": f"number {i}"} for i in (0, 1)]
    Path("dev.json").write_text("\n".join(map(json.dumps, rows)))  # as published: JSON lines
    val = build("nlvr_folder", "sentences.val=dev.json")["val"]
    pair = [f"{folder}dev-850-0-img0.png", f"{folder}dev-850-0-img1.png"]
    assert rows_of(val, "images", "sentence", "label") == [
        (pair, "number 0", "False"),
        (pair, "number 1", "False"),
    ]


@pytest.mark.parametrize("folder", ["", "train/12/", "12/"])
def test_training_images_of_nlvr2_lie_in_numbered_folders(images, folder):
    images(*(f"{folder}train-100-2-img{i}.png" for i in (0, 1)))
    row = {"identifier": "train-100-2-1", "directory": 12, "sentence": "two", "label": "True"}
    train = build("nlvr_folder", f"sentences.train={write('train.json', [row])}")["train"]
    (item,) = train.annotation
    assert item["images"] == [f"{folder}train-100-2-img{i}.png" for i in (0, 1)]


def test_statements_of_lavis_nlvr(images):
    images("dev/a.png", "dev/b.png")
    row = {"sentence": "both", "label": "True", "images": ["dev/a.png", "dev/b.png"]}
    rows = [row, {**row, "images": ["dev/a.png"]}]
    val = build("nlvr_folder", f"sentences.val={write('nlvr_dev.json', rows)}")["val"]
    assert rows_of(val, "images", "label") == [(["dev/a.png", "dev/b.png"], "True")]


def vqa(images, folder=""):
    """VQA's two files, and one image."""
    images(f"{folder}COCO_val2014_000000262148.jpg")
    about = {"data_type": "mscoco", "data_subtype": "val2014", "license": {}, "info": {}}
    asked = [
        {"image_id": 262148, "question": f"What is {i}?", "question_id": 262148000 + i}
        for i in range(3)
    ]
    answered = [
        {
            "question_id": row["question_id"],
            "image_id": 262148,
            "question_type": "what",
            "answer_type": "other",
            "multiple_choice_answer": "down",
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": i}
                for i, answer in enumerate(["down"] * 7 + ["at table"] * 3, 1)
            ],
        }
        for row in asked[::-1]
    ]
    write("questions.json", {**about, "task_type": "Open-Ended", "questions": asked})
    write("annotations.json", {**about, "annotations": answered})


@pytest.mark.parametrize("folder", ["", "val2014/"])
def test_questions_of_vqa(images, folder):
    """The answers are those that LAVIS's reader of VQA's files finds."""
    vqa(images, folder)
    options = ["questions.val=questions.json", "annotations.val=annotations.json"]
    val = build("vqa_folder", *options)["val"]
    reference = VQA("annotations.json", "questions.json")
    assert len(val.annotation) == len(reference.qa) == 3
    for item in val.annotation:
        number = item["question_id"]
        given = [answer["answer"] for answer in reference.qa[number]["answers"]]
        assert item["question"] == reference.qqa[number]["question"]
        assert item["answer"] == {text: given.count(text) / 10 for text in given}
        assert item["image"] == f"{folder}COCO_val2014_000000262148.jpg"


def test_questions_of_vqa_without_their_annotations(images):
    vqa(images)
    with pytest.raises(
        UserError, match="VQA's file of annotations in datasets.vqa_folder.annotations.<split>"
    ):
        build("vqa_folder", "questions.val=questions.json")
    test = build("vqa_folder", "questions.test=questions.json")["test"]
    assert [item["answer"] for item in test.annotation] == [{}] * 3
    options = ["questions.val=questions.json", "annotations.val=questions.json"]
    with pytest.raises(UserError, match="questions.json is no file of VQA's annotations"):
        build("vqa_folder", *options)


def test_questions_of_daquar(images):
    images("image3.png")
    row = {"question": "what is on the desk", "answer": "book, lamp", "image_id": "image3"}
    val = build("vqa_folder", f"questions.val={write('data.csv', [row])}")["val"]
    assert rows_of(val, "image", "answer") == [("image3.png", {"book, lamp": 1})]
    with Path("data.csv").open("a") as file:
        file.write("what else,no\n")  # a line cut short names no image
    val = build("vqa_folder", "questions.val=data.csv")["val"]
    assert len(val) == 1 and "None.png" not in Path("run/skipped_images.log").read_text()


# ---- columns of other names


def test_columns_can_be_named(images):
    images("a.jpg")
    Path("a.txt").write_text("file|text|group\na.jpg|one, two|9\n")
    Path("b.json").write_text(json.dumps([{"file": "a.jpg", "text": "b 1", "image": "other"}]))
    names = ["image_key=file", "caption_key=text", "image_id_key=group"]
    files = ["captions.val=a.txt", "captions.test=b.json"]
    built = build("captions_folder", *files, *names)
    keys = "image", "caption", "image_id"
    assert rows_of(built["val"], *keys) == [("a.jpg", ["one, two"], "9")]
    assert rows_of(built["test"], *keys) == [("a.jpg", ["b 1"], "a.jpg")]


@pytest.mark.parametrize(
    ("data", "file", "header", "names", "keys", "expected"),
    [
        (
            "vqa_folder",
            "questions",
            "pic;ask;reply;nr\na.jpg;Who?;me;7",
            {"image": "pic", "question": "ask", "answer": "reply", "question_id": "nr"},
            ("image", "question", "answer", "question_id"),
            ("a.jpg", "Who?", {"me": 1}, 7),
        ),
        (
            "entailment_folder",
            "sentences",
            "pic\ttext\tclass\na.jpg\tA cat\t2",
            {"image": "pic", "sentence": "text", "label": "class"},
            ("image", "sentence", "label"),
            ("a.jpg", "A cat", LABELS[2]),
        ),
        (
            "nlvr_folder",
            "sentences",
            "left,right,text,class\na.jpg,b.jpg,both,1",
            {"image0": "left", "image1": "right", "sentence": "text", "label": "class"},
            ("images", "sentence", "label"),
            (["a.jpg", "b.jpg"], "both", "True"),
        ),
    ],
)
def test_columns_of_each_task_can_be_named(images, data, file, header, names, keys, expected):
    images("a.jpg", "b.jpg")
    options = [f"{column}_key={name}" for column, name in names.items()]
    val = build(data, f"{file}.val={write('a.csv', header)}", *options)["val"]
    assert rows_of(val, *keys) == [expected]
    with pytest.raises(UserError) as caught:  # all that is missing, and what mends it
        build(data, f"{file}.val=a.csv")
    for column in names.keys() - {"question_id"}:
        assert f"no '{column}'" in str(caught.value)
        assert f"datasets.{data}.{column}_key=COLUMN" in str(caught.value)


def test_a_column_that_is_named_wrongly_is_an_error(images):
    images("a.jpg")
    Path("a.csv").write_text("image,caption\na.jpg,one\n")
    with pytest.raises(UserError, match="no 'file' among its columns .'image', 'caption'.: set"):
        build("captions_folder", "captions.val=a.csv", "image_key=file")


@pytest.mark.parametrize(("separator", "byte"), [("^", "^"), ("\\t", "\t")])
def test_a_separator_can_be_named(images, separator, byte):
    images("a.jpg")
    Path("a.csv").write_text("image@caption\na.jpg@x, y\n".replace("@", byte))
    val = build("captions_folder", "captions.val=a.csv", {"separator": separator})["val"]
    assert rows_of(val, "image", "caption") == [("a.jpg", ["x, y"])]
    with pytest.raises(UserError, match="captions_folder.separator is '::': it must be one char"):
        build("captions_folder", "captions.val=a.csv", "separator='::'")


@pytest.fixture
def run_on(monkeypatch):
    """Makes a data set that of the run."""

    def configure(name: str, **section) -> None:
        run = SimpleNamespace(datasets_cfg=OmegaConf.create({name: section}))
        monkeypatch.setitem(registry.mapping["state"], "configuration", run)

    return configure


def test_the_vocabulary_is_made_with_the_same_names(images, run_on):
    """A tiny model's tokenizer is made from the file that the data set trains on."""
    images("a.jpg")
    Path("a.txt").write_text("file|text\n" + f"{Path('photos/a.jpg').absolute()}|a quokka\n" * 3)
    with pytest.raises(UserError, match="no usable vocabulary"):
        build_tokenizer("a.txt", 100)
    keys = {"images": "photos", "image_key": "file", "caption_key": "text"}
    run_on("captions_folder", captions={"train": "a.txt"}, **keys)
    assert "quokka" in build_tokenizer("a.txt", 100).get_vocab()


def test_the_vocabulary_of_vqa_has_the_answers(images, run_on):
    vqa(images)
    files = {"questions": "questions.json", "annotations": "annotations.json"}
    run_on("vqa_folder", **{key: {"train": file} for key, file in files.items()})
    assert {"what", "table"} <= build_tokenizer("questions.json", 100).get_vocab().keys()


# ---- absolute names


def test_absolute_names_inside_the_images_folder(images, tmp_path):
    images("a.jpg", "sub/b.jpg")
    os.symlink("photos", "linked")
    write("a.json", {f"{tmp_path}/photos/a.jpg": "one", f"{tmp_path}/photos/sub/b.jpg": "two"})
    for folder in ("photos", "linked"):
        train = build("captions_folder", "captions.train=a.json", f"images={folder}")["train"]
        assert rows_of(train, "image") == [("a.jpg",), ("sub/b.jpg",)]
    assert pack_shards("a.json", "photos", "shards") == {"00000.tar": 2}


@pytest.mark.parametrize(
    "name", ["/etc/passwd.jpg", "{}/photos/../b.jpg", "{}/photos_2/b.jpg", "{}/b.jpg", "{}/photos"]
)
def test_absolute_names_outside_the_images_folder_are_refused(images, tmp_path, name):
    images("a.jpg")
    options = TableOptions(root=Path("photos").absolute())
    write("a.json", [{"image": name.format(tmp_path), "caption": "outside"}])
    with pytest.raises(UserError, match="is outside the images folder|expected an image name"):
        parse_captions("a.json", options=options)
