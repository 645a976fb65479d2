"""The user's own phrases and boxes: their files, and where phrases stand in captions."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import toy_builders
from PIL import Image
from toy_folders import write

from softmask_plugin.datasets.tables.layouts import TableOptions
from softmask_plugin.datasets.tables.phrases import Mention, annotate, occurrences, parse_phrases
from softmask_plugin.errors import UserError
from softmask_plugin.processors.text import CaptionProcessor

LEFT, RIGHT, TOP = [0, 0, 0.5, 1], [0.5, 0, 1, 1], [0, 0, 1, 0.5]
ROWS = [
    {"image": "a.png", "phrase": "A dog", "box": LEFT, "caption": "A dog , a cat", "category": "x"},
    {"image": "a.png", "phrase": "a cat", "box": RIGHT, "caption": "A dog , a cat", "category": ""},
    {"image": "b.png", "phrase": "two cups", "box": TOP, "caption": "", "category": ""},
]
NESTED = [
    {
        "image": "a.png",
        "caption": ["A dog and a dog .", "Two pets"],
        "size": [500, 375],
        "phrases": [
            {"phrase": "A dog", "box": LEFT},
            {"phrase": "a dog", "boxes": [RIGHT, LEFT], "category": ["animals", "other"]},
            {"phrase": "the sky", "box": TOP},
        ],
    }
]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv"])
def test_rows_in_every_layout(tmp_path, suffix):
    dog, cat, cups = parse_phrases(write(tmp_path / f"a.{suffix}", ROWS))
    assert dog == Mention("a.png", "A dog", [LEFT], ["x"], ["A dog , a cat"])
    assert cat == Mention("a.png", "a cat", [RIGHT], [], ["A dog , a cat"])
    assert cups == Mention("b.png", "two cups", [TOP], [], [])


@pytest.mark.parametrize("text", ["0 0 0.5 1 .5 0 1 1", "[[0, 0, 0.5, 1], [0.5, 0, 1, 1]]"])
def test_a_csv_may_give_several_boxes(tmp_path, text):
    path = write(tmp_path / "a.csv", [{"image": "a.png", "phrase": "dogs", "boxes": text}])
    assert parse_phrases(path)[0].boxes == [LEFT, RIGHT]


def test_rows_of_one_phrase_are_merged(tmp_path):
    both, sky = parse_phrases(write(tmp_path / "a.json", NESTED))
    captions = NESTED[0]["caption"]
    assert both == Mention("a.png", "A dog", [LEFT, RIGHT], ["animals", "other"], captions)
    assert sky == Mention("a.png", "the sky", [TOP], [], captions)
    rows = [
        {**ROWS[0], "box": RIGHT},
        ROWS[0],
        {**ROWS[0], "caption": "A dog ."},  # may be another dog
        {**ROWS[0], "image": "b.png"},
    ]
    found = parse_phrases(write(tmp_path / "b.json", rows))
    assert [each.boxes for each in found] == [[RIGHT, LEFT], [LEFT], [LEFT]]


@pytest.mark.parametrize("nested", [False, True])
def test_other_names_of_columns(tmp_path, nested):
    phrase = {"expression": "a dog", "where": LEFT}
    row = {"file": "a.png", "said": "a dog", **({"phrases": [phrase]} if nested else phrase)}
    keys = {"image": "file", "caption": "said", "phrase": "expression", "box": "where"}
    path = write(tmp_path / "a.json", [row])
    options = TableOptions(keys=keys)
    assert parse_phrases(path, options=options) == [
        Mention("a.png", "a dog", [LEFT], [], ["a dog"])
    ]


NO_BOX = "is not [x0, y0, x1, y1] in [0, 1]: "
PIXELS = f"{NO_BOX}divide pixels by the image's width and height"
SIDES = f"{NO_BOX}x1 and y1 are the right and the bottom side, not width and height"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box": [10, 5, 20, 10]}, f"box [10, 5, 20, 10] {PIXELS}"),
        ({"box": [0.5, 0, 0.5, 1]}, SIDES),
        ({"box": [0, 0.5, 1, 0.4]}, SIDES),
        ({"box": [-0.1, 0, 1, 1]}, SIDES),
        ({"box": [float("nan"), 0, 1, 1]}, SIDES),
        ({"box": [0, 0, 1]}, "expected a box of four numbers, got [0, 0, 1]"),
        ({"box": "left"}, "expected a box of four numbers, got ['left']"),
        ({"box": {"x": 1}}, "expected a box of four numbers"),
        ({"box": None}, "expected a box of four numbers, got None"),
        ({"box": [0, 0, 10**400]}, "expected a box of four numbers, got [0, 0, 1000"),
        ({"box": [], "boxes": []}, "box [] is not"),
        ({"phrase": "..."}, "no usable phrase: '...'"),
        ({"caption": "?"}, "no usable caption: '?'"),
        ({"image": "../a.png"}, "image '../a.png' is outside the images folder"),
    ],
    ids=str,
)
def test_a_bad_row_is_skipped_and_reported(tmp_path, caplog, change, message):
    path = write(tmp_path / "a.json", [ROWS[1], {**ROWS[0], **change}])
    assert len(parse_phrases(path)) == 1
    assert f"Skipped 1 rows or phrases of a.json: {path}, entry 2: " in caplog.text
    assert message in caplog.text


def test_a_bad_phrase_of_an_image_is_skipped_alone(tmp_path, caplog):
    phrases = [NESTED[0]["phrases"][0], "a dog", {"phrase": "a cat"}, {"box": LEFT}]
    path = write(tmp_path / "a.json", [{**NESTED[0], "phrases": phrases}])
    assert [each.phrase for each in parse_phrases(path)] == ["A dog"]
    assert "Skipped 3 rows or phrases" in caplog.text
    assert "entry 1: expected a phrase and its box, got 'a dog'" in caplog.text
    assert "no 'phrase' among ['box']: set phrase_key=COLUMN" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"image": "a.png", "phrases": []}], "no usable row: .*no usable phrase of image 'a.png'"),
        ([{"image": "a.png", "box": LEFT}], "no 'phrase' among .*: set phrase_key=COLUMN"),
        ([], "holds no rows"),
        ("[", "not valid JSON"),
    ],
)
def test_a_file_without_a_usable_row_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        parse_phrases(write(tmp_path / "a.json", content))
    with pytest.raises(UserError, match="cannot read the phrase file"):
        parse_phrases(tmp_path / "none.json")


# ---- phrases in captions


@pytest.mark.parametrize(
    ("phrase", "text", "words"),
    [
        ("a dog", "a dog and a dog", [0, 1, 3, 4]),
        ("dog", "a dogs life", []),  # whole words alone
        ("a dog", "dog a", []),
        ("ha ha", "ha ha ha", [0, 1, 2]),  # two places that overlap
        ("a dog", "a", []),
        ("", "a dog", []),
    ],
)
def test_a_phrase_is_found_word_for_word(phrase, text, words):
    assert occurrences(phrase.split(), text.split()) == words


def test_a_place_that_is_given_must_hold_the_phrase():
    words = "a man and a man".split()
    assert occurrences(["a", "man"], words, 3) == [3, 4]
    assert occurrences(["a", "man"], words, 1) == occurrences(["a", "man"], words, 4) == []


def mention(phrase, *captions, boxes=(LEFT,), image="a.png", first=None):
    return Mention(image, phrase, [*boxes], ["x"], [*captions], first)


def words_of(entries):
    return [(entry["text"], [each["words"] for each in entry["phrases"]]) for entry in entries]


def test_punctuation_and_dashes_count_as_the_text_processor_cleans_them():
    caption = "A T-shirt , a man 's T-shirt , and A MAN ."
    mentions = [
        mention("a man", caption),  # a t shirt a man s t shirt and a man
        mention("T-shirt", caption),
        mention("A man", caption, first=9),
        mention("T-shirt", caption, first=1),
    ]
    ((text, words),) = words_of(annotate(mentions, "caption", CaptionProcessor()))
    assert text == caption
    assert words == [[3, 4, 9, 10], [1, 2, 6, 7], [9, 10], [1, 2]]


def test_what_the_processor_cuts_off_does_not_occur():
    mentions = [mention("a dog", "we saw a dog"), mention("we", "we saw a dog")]
    mentions.append(mention("a dog", "we saw a dog", first=2))
    clean = CaptionProcessor(max_words=3)
    assert words_of(annotate(mentions, "caption", clean)) == [("we saw a dog", [[0]])]


def test_captions_that_are_one_count_a_phrase_once():
    mentions = [mention("a dog", "a dog runs", "A dog runs.")]
    entries = annotate(mentions, "caption", CaptionProcessor())
    assert words_of(entries) == [("a dog runs", [[0, 1]])]


def test_phrases_share_a_pass_over_their_caption():
    """Captions that differ in case or punctuation alone are one; phrases in none are left out."""
    mentions = [
        mention("A dog", "A dog runs .", "It runs"),
        mention("Runs", "A dog runs .", "It runs"),
        mention("a dog", "a dog runs", boxes=[TOP]),
        mention("a dog", "a dog runs", image="b.png", boxes=[RIGHT]),
        mention("the sky", "A dog runs ."),
        mention("nothing said"),
    ]
    entries = annotate(mentions, "caption", CaptionProcessor())
    assert words_of(entries) == [
        ("A dog runs .", [[0, 1], [2], [0, 1]]),
        ("It runs", [[1]]),
        ("a dog runs", [[0, 1]]),
    ]
    assert [entry["image"] for entry in entries] == ["a.png", "a.png", "b.png"]
    assert [entry["boxes"] for entry in entries] == [[LEFT, TOP], [LEFT, TOP], [RIGHT]]
    assert [each["box"] for each in entries[0]["phrases"]] == [[LEFT], [LEFT], [TOP]]
    alone = annotate(mentions, "phrase", CaptionProcessor())
    assert words_of(alone) == [
        ("A dog", [[0, 1], [0, 1]]),
        ("Runs", [[0]]),
        ("a dog", [[0, 1]]),
        ("the sky", [[0, 1]]),
        ("nothing said", [[0, 1]]),
    ]


# ---- the data set


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (12, 12)).save(f"photos/{name}")
    write("rows.json", ROWS)
    write("nested.json", NESTED)


def folder(file, *options):
    small = ("images=photos", "vis_processor.eval.image_size=8")
    return toy_builders.build("phrases_folder", *small, f"phrases.test={file}", *options)["test"]


def test_a_phrase_alone_or_within_its_caption(photos, caplog):
    caplog.set_level(logging.INFO)
    alone = folder("rows.json")
    texts = [alone[i]["text_input"] for i in range(len(alone))]
    assert texts == ["a dog", "a cat", "two cups"]
    within = folder("rows.json", "text=caption")
    assert len(within) == 1
    sample = within[0]
    assert sample["text_input"] == "a dog a cat" and sample["index"] == 0
    assert sample["image"].shape == (3, 8, 8) and sample["instance_id"] == "0"
    entry = within.annotation[0]
    assert [each["words"] for each in entry["phrases"]] == [[0, 1], [2, 3]]
    assert "phrases_folder test: 2 phrases to find with 1 texts" in caplog.text
    assert words_of(folder("nested.json", "text=caption").annotation) == [
        ("A dog and a dog .", [[0, 1, 3, 4]])
    ]


def test_a_missing_image_is_left_out(photos):
    write("more.json", [*ROWS, {**ROWS[0], "image": "none.png"}])
    assert {entry["image"] for entry in folder("more.json").annotation} == {"a.png", "b.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["text=captions"], "phrases_folder.text is 'captions': did you mean 'caption'"),
        (["text=null"], "phrases_folder.text is None: choose from 'caption', 'phrase'"),
        (["phrases.train=rows.json"], "unknown key datasets.phrases_folder.phrases.train: "),
        (["phrases.test=null"], "phrases names no file: set its val or test"),
        (["boxs_key=where"], "phrases_folder.boxs_key: did you mean 'box.*_key'"),
    ],
)
def test_wrong_keys_are_refused(photos, options, message):
    with pytest.raises(UserError, match=message):
        folder("rows.json", *options)


def test_phrases_without_captions_can_only_be_measured_alone(photos):
    write("cups.json", ROWS[2:])
    with pytest.raises(
        UserError, match="none of the 1 phrases occurs .*phrases_folder.text=phrase"
    ):
        folder("cups.json", "text=caption")
    assert len(folder("cups.json")) == 1


def test_the_documented_files_are_read(tmp_path):
    """Rows and boxes by image, as docs/data.md shows them."""
    text = Path(__file__).parents[3].joinpath("docs/data.md").read_text(encoding="utf-8")
    section = text.partition("## Phrases and boxes")[2].partition("## Shards")[0]
    rows, by_image = re.findall(r"```json\n(.*?)```", section, re.S)
    hat, cups = parse_phrases(write(tmp_path / "rows.json", rows))
    assert hat.captions == ["a man in a red hat"]
    assert len(cups.boxes) == 2 and cups.categories == ["cups"]
    hat, man = parse_phrases(write(tmp_path / "by_image.json", by_image))
    entries = annotate([hat, man], "caption", CaptionProcessor())
    assert words_of(entries) == [
        ("a man in a red hat", [[3, 4, 5], [0, 1]]),
        ("a man smiles", [[0, 1]]),
    ]
