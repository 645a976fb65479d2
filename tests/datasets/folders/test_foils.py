"""The user's own foils and those of published benchmarks, as the foil task reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import toy_builders
from PIL import Image
from toy_folders import write

from softmask_plugin.datasets.tables.foils import parse_foils
from softmask_plugin.datasets.tables.layouts import TableOptions
from softmask_plugin.errors import UserError
from softmask_plugin.report.records import chance_of

FOILS = [
    {"image": "red.png", "caption": "A red photo", "foil": "A blue photo", "group": "colour"},
    {"image": "red.png", "caption": "it is red", "foil": "it is old"},
    {"image": "green.png", "caption": "green, not red", "foil": "red, not green", "pair": 7},
    {"image": "blue.png", "caption": "red, not green", "foil": "green, not red", "pair": 7},
]


def build(*options):
    """The data sets for 8 x 8 pixels of photos/."""
    given = ("images=photos", "vis_processor.eval.image_size=8", *options)
    return toy_builders.build("foils_folder", *given)


def parsed(name, content, **options):
    return parse_foils(write(name, content), options=TableOptions(**options))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv"])
def test_foils_in_every_format(colour_photos, suffix):
    items = parsed(f"mine.{suffix}", FOILS)
    assert items[:2] == [FOILS[0], {**FOILS[1], "group": "mine"}]
    assert [item.get("pair") for item in items] == [None, None, "mine 7", "mine 7"]


def test_the_task_gets_texts_groups_and_chances(colour_photos):
    test = build(f"foils.test={write('mine.json', FOILS)}")["test"]
    sample = test[0]
    assert (sample["caption"], sample["foil"]) == ("a red photo", "a blue photo")
    assert sample["image"].shape == (3, 8, 8) and sample["index"] == 0
    names = [f"acc{itc}{group}" for itc in ("", "_itc") for group in ("", "_colour", "_mine")]
    assert chance_of(test) == dict.fromkeys(names, 50.0)


def test_a_folder_of_files_gives_a_group_each(colour_photos):
    Path("data").mkdir()
    write("data/swap.json", FOILS[1:2])
    write("data/add.csv", [{**row, "group": ""} for row in FOILS[:1]])
    write("data/README.md", "no table")
    test = build("foils.test=data")["test"]
    assert [item["group"] for item in test.annotation] == ["add", "swap"]


def test_columns_of_other_names(colour_photos):
    rows = [{"file": "red.png", "said": "red", "false_": "old", "kind": "age", "set": 1}]
    write("mine.csv", rows)
    keys = ["image_key=file", "caption_key=said", "foil_key=false_", "group_key=kind"]
    (item,) = build("foils.val=mine.csv", *keys)["val"].annotation
    told = {"image": "red.png", "caption": "red", "foil": "old", "group": "age"}
    assert told.items() <= item.items()
    with pytest.raises(UserError, match="no 'kid' among its columns"):
        build("foils.val=mine.csv", *keys[:3], "group_key=kid")


# ---- published files


def test_foils_of_sugar_crepe(tmp_path):
    rows = {
        str(i): {"filename": f"00{i}.jpg", "caption": f"cup {i}", "negative_caption": f"two {i}"}
        for i in (0, 1)
    }
    items = parsed(tmp_path / "swap_att.json", json.dumps(rows, indent=4))
    assert items == [
        {"image": f"00{i}.jpg", "caption": f"cup {i}", "foil": f"two {i}", "group": "swap_att"}
        for i in (0, 1)
    ]


def test_foils_of_valse(tmp_path, caplog):
    def row(votes, caption="A man exercises."):
        return {
            **{"dataset": "SWiG", "dataset_idx": "a_1.jpg", "image_file": "a_1.jpg"},
            **{"linguistic_phenomena": "actions", "classes": "man", "classes_foil": "torso"},
            **{"mturk": {"foil": 0, "caption": votes, "other": 0}},
            **{"caption": caption, "foil": "A torso exercises."},
        }

    rows = {"test_0": row(3), "test_1": row(1), "test_2": row(2, ["A man runs.", "Another."])}
    items = parsed(tmp_path / "actant-swap.json", json.dumps(rows))
    assert [item["caption"] for item in items] == ["A man exercises.", "A man runs."]
    assert {item["image"] for item in items} == {"a_1.jpg"}
    assert {item["group"] for item in items} == {"actant-swap"}
    assert "entry 'test_1': fewer than two annotators chose the caption" in caplog.text


def test_foils_of_aro_show_a_part_of_the_image(colour_photos):
    image = Image.new("RGB", (16, 8), "red")
    image.paste((0, 0, 255), (8, 0, 16, 8))
    image.save("photos/23.png")
    row = {
        **{"image_id": "23", "image_path": "23.png", "relation_name": "on"},
        **{"true_caption": "the cup is on the table", "false_caption": "the table is on the cup"},
        **{"bbox_x": 9, "bbox_y": 0, "bbox_w": 6, "bbox_h": 8},
    }
    rows = [row, {**row, "bbox_w": 0}, {**row, "bbox_x": None}]
    rows += [{**row, "bbox_x": float("inf")}, {**row, "bbox_w": 10**9}, {**row, "bbox_x": 16}]
    file = write("visual_genome_relation.json", rows)
    test = build(f"foils.test={file}", "group_key=relation_name")["test"]
    item, _ = test.annotation
    assert (item["caption"], item["foil"]) == (row["true_caption"], row["false_caption"])
    assert item["group"] == "on"
    _, (part,) = test.open(0)
    assert part.size == (6, 8) and part.getcolors() == [(48, (0, 0, 255))]
    log = Path("run/skipped_images.log").read_text()
    assert "the box (9, 0, 0, 8) is empty" in log and "is not four whole numbers" in log
    assert "the box (inf, 0, 6, 8) is not four whole numbers" in log
    assert "the box (9, 0, 1000000000, 8) is empty or has over 89,478,485 pixels" in log
    with pytest.raises(
        UserError, match=r"23.png: the box .16, 0, 22, 8. lies outside of its 16 x 8"
    ):
        test.open(1)
    assert parse_foils(file)[0]["group"] == "visual_genome_relation"


def test_foils_of_winoground(tmp_path):
    row = {
        **{"id": 4, "image_0": "ex_4_img_0", "image_1": "ex_4_img_1", "num_main_preds": 1},
        **{"caption_0": "an old person kisses a young person", "tag": "Adjective-Age"},
        **{"caption_1": "a young person kisses an old person", "secondary_tag": ""},
        "collapsed_tag": "Object",
    }
    first, second = parsed(tmp_path / "examples.jsonl", [row])
    assert first == {
        **{"image": "ex_4_img_0.png", "group": "Object", "pair": "examples 4"},
        **{"caption": row["caption_0"], "foil": row["caption_1"]},
    }
    swapped = {"caption": first["foil"], "foil": first["caption"]}
    assert second == {**first, **swapped, "image": "ex_4_img_1.png"}


# ---- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"foil": ""}, "no usable foil: ''"),
        ({"foil": "it is red"}, "caption and foil are the same: 'it is red'"),
        ({"caption": None}, "no usable caption: None"),
        ({"image": "../a.jpg"}, "image '../a.jpg' is outside the images folder"),
        ({"bbox_x": 1, "bbox_y": 1, "bbox_w": 5, "bbox_h": 0}, r"the box (1, 1, 5, 0) is empty"),
        ({"bbox_x": 1, "bbox_y": "a", "bbox_w": 5, "bbox_h": 5}, "is not four whole numbers"),
    ],
    ids=str,
)
def test_a_bad_foil_is_skipped_and_reported(tmp_path, caplog, change, message):
    assert len(parsed(tmp_path / "a.json", [FOILS[0], {**FOILS[1], **change}])) == 1
    assert "Skipped 1 rows of a.json" in caplog.text and message in caplog.text


def test_foils_that_read_like_their_caption_are_left_out(colour_photos, caplog):
    """A model would tie them: the same after cleaning, or different where captions are cut."""
    long = "it is " + "very " * 40
    alike = [{**FOILS[0], "caption": "It is red.", "foil": "it is red"}]
    alike += [{**FOILS[0], "caption": f"{long} red", "foil": f"{long} blue"}]
    write("a.json", [FOILS[0], *alike])
    assert len(build("foils.test=a.json")["test"]) == 1
    assert "Skipped 2 foils that are cleaned or cut to their captions" in caplog.text
    write("b.json", alike)
    with pytest.raises(UserError, match="b.json: each foil is cleaned or cut to its caption"):
        build("foils.test=b.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "foils_folder.foils names no file: set its val or test"),
        (["foils.train=a.json"], "unknown key datasets.foils_folder.foils.train"),
        (["foils.test=none.json"], "cannot read the foil file none.json"),
        (["foils.test=photos"], "photos holds no file that ends in .json"),
        (["foils.test=pairs.json"], "pair 'pairs 7' must be two rows with caption and foil exc"),
        (["foils.test=plain.csv"], "plain.csv has no 'foil' among its columns"),
        (["foil=a"], "unknown key datasets.foils_folder.foil: did you mean 'foils'"),
    ],
    ids=str,
)
def test_wrong_input_gets_one_clear_line(colour_photos, options, message):
    write("pairs.json", [*FOILS, FOILS[3]])
    write("plain.csv", [{"image": "red.png", "caption": "it is red"}])
    with pytest.raises(UserError, match=message) as caught:
        build(*options)
    assert "\n" not in str(caught.value)


def test_a_pair_without_its_second_image_is_no_pair(colour_photos):
    Path("photos/blue.png").unlink()
    test = build(f"foils.test={write('mine.json', FOILS)}")["test"]
    assert [item["image"] for item in test.annotation] == ["red.png", "red.png", "green.png"]
