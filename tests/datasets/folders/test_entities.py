"""Flickr30k Entities from files written here in its published layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy_builders
from PIL import Image
from torch.utils.data import DataLoader

from softmask_plugin.errors import UserError

NAME = "flickr30k_entities"
SENTENCES = {
    "1000000001": [
        "[/EN#1/people Three old sailors] with [/EN#2/bodyparts grey beards] stare at "
        "[/EN#0/notvisual each other] in [/EN#3/scene the harbour] .",
        "[/EN#1/people Three men] , [/EN#4/people a man] and [/EN#5/people a man] on "
        "[/EN#6/other/vehicles a T-shirt cart]",
        "[/EN#7/other Café Ñandú] .",
        "Nobody is annotated here .",
    ],
    "42": ["[/EN#9/animals A dog] barks ."],
}
# Chains of an object, and its box in pixels counted from 1, or its flag
OBJECTS = {
    "1000000001": [
        (("1", "4"), (1, 1, 20, 40)),
        (("1", "5"), (21, 1, 40, 40)),
        (("2",), (1, 1, 10, 10)),
        (("3",), "scene"),
        (("6",), (11, 21, 20, 30)),
        (("7",), "nobndbox"),
        (("8",), (1, 1, 40, 80)),  # of no phrase
    ],
    "42": [(("9",), (1, 1, 30, 20))],
}
SIZES = {"1000000001": (40, 80), "42": (30, 20)}
MEN = [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5]]
BEARD, CART = [0, 0, 0.25, 0.125], [0.25, 0.25, 0.5, 0.375]


def annotation(number: str) -> str:
    width, height = SIZES[number]
    lines = [f"<annotation>\n<filename>{number}.jpg</filename>"]
    lines.append(f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>")
    for chains, where in OBJECTS[number]:
        lines += ["<object>", *(f"  <name>{chain}</name>" for chain in chains)]
        if isinstance(where, str):
            flags = {"scene": 0, "nobndbox": 0, where: 1}
            lines += [f"  <{flag}>{value}</{flag}>" for flag, value in flags.items()]
        else:
            ends = zip(("xmin", "ymin", "xmax", "ymax"), where, strict=True)
            lines.append(
                "".join(["  <bndbox>", *(f"<{k}>{v}</{k}>" for k, v in ends), "</bndbox>"])
            )
        lines.append("</object>")
    return "\n".join([*lines, "</annotation>\n"])


@pytest.fixture
def release(tmp_path, monkeypatch):
    """Images and the files of two of them, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for folder in ("images", "data/Annotations", "data/Sentences"):
        Path(folder).mkdir(parents=True)
    for number, lines in SENTENCES.items():
        Image.new("RGB", SIZES[number]).save(f"images/{number}.jpg")
        Path(f"data/Sentences/{number}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        Path(f"data/Annotations/{number}.xml").write_text(annotation(number), encoding="utf-8")
    Path("data/test.txt").write_text("1000000001\n42\n")
    Path("data/val.txt").write_text("42\n")


def build(*options: str) -> dict:
    return toy_builders.build(NAME, "images=images", "vis_processor.eval.image_size=8", *options)


def phrases(dataset) -> list[tuple]:
    return [
        (each["phrase"], entry["text"], each["words"], each["box"], each["group"])
        for entry in dataset.annotation
        for each in entry["phrases"]
    ]


def test_phrases_alone_have_the_boxes_and_types_of_their_chains(release):
    datasets = build()
    assert list(datasets) == ["val", "test"]
    found = phrases(datasets["test"])
    assert found == [
        ("Three old sailors", "Three old sailors", [0, 1, 2], MEN, ["people"]),
        ("grey beards", "grey beards", [0, 1], [BEARD], ["bodyparts"]),
        ("Three men", "Three men", [0, 1], MEN, ["people"]),
        ("a man", "a man", [0, 1], [MEN[0]], ["people"]),
        ("a man", "a man", [0, 1], [MEN[1]], ["people"]),  # one pass, two phrases
        ("a T-shirt cart", "a T-shirt cart", [0, 1, 2, 3], [CART], ["other", "vehicles"]),
        ("A dog", "A dog", [0, 1], [[0, 0, 1, 1]], ["animals"]),
    ]
    assert len(datasets["test"]) == 6
    boxes = [entry["boxes"] for entry in datasets["test"].annotation]
    assert boxes == [[*MEN, BEARD, CART]] * 5 + [[[0, 0, 1, 1]]]


def test_phrases_stand_in_the_caption_where_the_file_says(release):
    found = phrases(build("text=caption")["test"])
    first, second = (
        "Three old sailors with grey beards stare at each other in the harbour .",
        "Three men , a man and a man on a T-shirt cart",
    )
    assert [each[:3] for each in found] == [
        ("Three old sailors", first, [0, 1, 2]),
        ("grey beards", first, [4, 5]),
        ("Three men", second, [0, 1]),
        ("a man", second, [2, 3]),  # of the cleaned caption, without the comma
        ("a man", second, [5, 6]),
        ("a T-shirt cart", second, [8, 9, 10, 11]),
        ("A dog", "A dog barks .", [0, 1]),
    ]


def test_samples_have_the_layout_of_the_task(release):
    test = build("text=caption")["test"]
    (batch,) = DataLoader(test, batch_size=3, collate_fn=test.collater)
    assert batch["image"].shape == (3, 3, 8, 8) and batch["index"].tolist() == [0, 1, 2]
    assert batch["text_input"][1] == "three men a man and a man on a t shirt cart"


def test_phrases_of_any_script_are_found(release):
    objects = annotation("1000000001").replace("<name>8<", "<name>7<")
    Path("data/Annotations/1000000001.xml").write_text(objects)
    found = phrases(build("text=caption")["test"])
    assert ("Café Ñandú", "Café Ñandú .", [0, 1], [[0, 0, 1, 1]], ["other"]) in found


def test_a_missing_image_is_left_out(release):
    Path("images/1000000001.jpg").unlink()
    assert [each[0] for each in phrases(build()["test"])] == ["A dog"]


def test_brackets_that_do_not_match_cost_one_sentence(release, caplog):
    file = Path("data/Sentences/42.txt")
    file.write_text("[/EN#9/animals A dog barks .\n[/EN#9/animals The dog] sits\n")
    assert [each[0] for each in phrases(build("splits.test=null")["val"])] == ["The dog"]
    problem = f"{file}, line 1: brackets that do not match"
    assert f"Skipped 1 sentences of val.txt: {problem}" in caplog.text


# ---- what is refused


@pytest.mark.parametrize("file", ["val.txt", "Annotations/42.xml", "Sentences/42.txt"])
def test_a_missing_file_is_named_with_where_to_get_it(release, file):
    Path("data", file).unlink()
    with pytest.raises(UserError, match=f"{Path(file).name} .No such file.*Flickr30k Entities"):
        build()


BAD = {
    b"": "no element found",
    b"<annotation>": "no element found",
    b"<annotation/>": "no width, height",
    b"<annotation><size><width>0</width><height>9</height></size></annotation>": "0.0 x 9.0 pixels",
    b"<annotation><size><width>wide</width><height>9</height></size></annotation>": "'wide'",
    annotation("42").replace("xmin", "left").encode(): "no xmin, ymin, xmax, ymax",
    b'<!DOCTYPE a [<!ENTITY b "b">]><a>&c;</a>': "undefined entity",
}


@pytest.mark.parametrize("content", BAD)
def test_another_layout_is_refused_in_one_line(release, content):
    Path("data/Annotations/42.xml").write_bytes(content)
    message = f"42.xml is laid out differently .*{BAD[content]}.*Flickr30k Entities"
    with pytest.raises(UserError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_a_bomb_of_entities_is_refused(release):
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12))
    bomb = f'<!DOCTYPE a [<!ENTITY e0 "boom">{entities}]><a>&e11;</a>'
    Path("data/Annotations/42.xml").write_text(bomb)
    with pytest.raises(UserError, match="42.xml is laid out differently"):
        build()


def test_files_that_are_not_text_or_lead_elsewhere_are_refused(release):
    Path("data/Sentences/42.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="42.txt is not UTF-8 text: get that of"):
        build()
    Path("data/val.txt").write_text("../../secret\n")
    with pytest.raises(UserError, match="val.txt: image .* is outside the images folder"):
        build()
    Path("data/val.txt").write_text("")
    with pytest.raises(UserError, match="val.txt: its 0 images have no phrase with a box"):
        build()


def test_wrong_keys_are_refused(release):
    with pytest.raises(
        UserError, match=f"datasets.{NAME}.text is 'captoin': did you mean 'caption'"
    ):
        build("text=captoin")
    with pytest.raises(UserError, match=f"unknown key datasets.{NAME}.splits.train"):
        build("splits.train=data/train.txt")
    with pytest.raises(UserError, match=r"cannot read elsewhere/val.txt .*BryanPlummer"):
        build("data=elsewhere")
