"""Wrong options and unusable images of the user's own questions and statements."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_folders import PAIRS, QUESTIONS, STATEMENTS, build, write

from softmask_plugin.errors import UserError


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vqa_folder", [], "datasets.vqa_folder.questions names no file"),
        ("vqa_folder", ["questions.test=q.json", "images=null"], "vqa_folder.images is not set"),
        ("vqa_folder", ["questions.test=q.json", "images=x"], "there is no folder .*x"),
        ("vqa_folder", ["questions.test=q.json", "images=2014"], "there is no folder .*2014"),
        ("vqa_folder", ["questions=q.json"], "questions is 'q.json': it must be a section"),
        ("vqa_folder", ["annotations=q.json"], "annotations is 'q.json': it must be a section"),
        ("vqa_folder", ["annotations.tets=q.json"], "annotations.tets: did you mean 'test'"),
        ("vqa_folder", ["answer=a"], "unknown key datasets.vqa_folder.answer: did you mean 'answe"),
        ("vqa_folder", ["questions.val=q.json", "answers=0"], "vqa_folder.answers is 0: it must"),
        ("vqa_folder", ["questions.val=q.json", "answers=true"], "vqa_folder.answers is True"),
        ("entailment_folder", ["sentences.tst=a"], "sentences.tst: did you mean 'test'"),
        ("entailment_folder", ["sentences.val=e.json", "labels=[a]"], r"labels is \['a'\]: it m"),
        ("entailment_folder", ["sentences.val=e.json", "labels=[a,A]"], "two or more different"),
        ("entailment_folder", ["sentences.val=e.json", "labels=x"], "labels is x: it must"),
        ("entailment_folder", ["sentences.val=e.json", "labels=[yes,no]"], "yes and no in quotes"),
        ("nlvr_folder", ["sentences.train=n.json", "swap=1"], "nlvr_folder.swap is 1: it must be"),
        ("nlvr_folder", ["sentences.train=[a,b]"], "must be the path of one file"),
    ],
    ids=str,
)
def test_wrong_options_get_one_clear_line(colour_photos, name, options, message):
    write("q.json", QUESTIONS)
    write("e.json", STATEMENTS)
    write("n.json", PAIRS)
    with pytest.raises(UserError, match=message) as caught:
        build(name, *options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "files", "rows", "left"),
    [
        ("vqa_folder", "questions", QUESTIONS, ["green.png"]),
        ("entailment_folder", "sentences", STATEMENTS, ["green.png"]),
        ("nlvr_folder", "sentences", [*PAIRS, {**PAIRS[0], "image1": "red.png"}], ["red.png"]),
    ],
)
def test_evaluation_leaves_out_missing_and_unreadable_images(
    colour_photos, caplog, name, files, rows, left
):
    """One bad image is enough to leave an item out; each image is reported once."""
    gone = "blue.png" if name == "nlvr_folder" else "red.png"
    broken = None if name == "nlvr_folder" else "blue.png"
    Path("photos", gone).unlink()
    if broken:
        Path("photos", broken).write_bytes(b"no image")
    val = build(name, f"{files}.val={write('a.json', rows)}")["val"]
    shown = {image for item in val.annotation for image in item.get("images", [item.get("image")])}
    assert shown == set(left)
    assert "Skipped 1 missing images" in caplog.text
    assert ("Skipped 1 unreadable images" in caplog.text) == bool(broken)
    log = Path("run/skipped_images.log").read_text()
    assert f"photos/{gone}: no such file" in log
    assert len(log.splitlines()) == (2 if broken else 1)
    for path in Path("photos").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=f"none of the . images exists.*datasets.{name}.images"):
        build(name, f"{files}.val=a.json")


def test_an_unreadable_training_pair_is_replaced_by_the_next(colour_photos):
    Path("photos/blue.png").write_bytes(b"no image")
    train = build("nlvr_folder", f"sentences.train={write('a.json', PAIRS)}")["train"]
    assert [train[i]["instance_id"] for i in range(4)] == ["2", "2", "2", "2"]
    assert Path("run/skipped_images.log").read_text().count("\n") == 1
    Path("photos/red.png").unlink()
    with pytest.raises(UserError, match="100 images in a row cannot be read"):
        train[0]


def test_a_gallery_image_that_breaks_later_is_an_error(colour_photos):
    val = build("entailment_folder", f"sentences.val={write('a.json', STATEMENTS)}")["val"]
    Path("photos/red.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="red.png"):
        val[0]
    assert val[2]["label"] == 0
