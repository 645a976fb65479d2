"""RefCOCO+ from files written here in the layout of ALBEF's and REFER's releases."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import toy_builders
from PIL import Image
from torch.utils.data import DataLoader
from toy_folders import write

from softmask_plugin.datasets.folders.refcoco import load_plain_pickle, unit_boxes
from softmask_plugin.errors import UserError

NAME = "refcoco_plus_grounding"
IMAGES = {7: (40, 20), 9: (10, 30)}  # width and height, pixels
REFS = [
    {"ref_id": 1, "ann_id": 11, "image_id": 7, "split": "val"},
    {"ref_id": 2, "ann_id": 12, "image_id": 9, "split": "testA"},
    {"ref_id": 3, "ann_id": 13, "image_id": 7, "split": "testB"},
]
TRUTHS = {11: [10, 5, 20, 10], 12: [0, 0, 5, 15], 13: [0, 0, 40.02, 20]}
DETECTIONS = {"7": [[10, 5, 20, 10, 0.9, 1], [30, 10, 20, 20]], "9": [[0, 0, 10, 30]]}


def name_of(image_id: int) -> str:
    return f"train2014/COCO_train2014_{image_id:012}.jpg"


def expression(ref_id: int, text: str) -> dict:
    image_id = {ref["ref_id"]: ref["image_id"] for ref in REFS}.get(ref_id, 7)
    return {"image": name_of(image_id), "text": text, "ref_id": ref_id, "patch": [0, 1]}


@pytest.fixture
def release(tmp_path, monkeypatch):
    """Images and the five files, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("coco/train2014").mkdir(parents=True)
    Path("data/refcoco+").mkdir(parents=True)
    for image_id, size in IMAGES.items():
        Image.new("RGB", size, "red").save(f"coco/{name_of(image_id)}")
    write("data/refcoco+_val.json", [expression(1, "Left, man!"), expression(1, "blue shirt")])
    write("data/refcoco+_test.json", [expression(2, "woman"), expression(3, "table")])
    write("data/refcoco+/dets.json", DETECTIONS)
    sizes = [{"id": i, "width": w, "height": h, "license": 1} for i, (w, h) in IMAGES.items()]
    truths = [{"id": i, "bbox": box, "category_id": 18} for i, box in TRUTHS.items()]
    write("data/refcoco+/instances.json", {"images": sizes, "annotations": truths, "info": {}})
    refs = [{**ref, "sentences": [{"raw": "x", "tokens": ["x"]}]} for ref in REFS]
    # Python 2 wrote REFER's with its default protocol
    Path("data/refcoco+/refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))
    return tmp_path


def build(*options: str) -> dict:
    return toy_builders.build(NAME, "images=coco", "vis_processor.eval.image_size=8", *options)


def test_expressions_get_their_boxes_and_groups(release):
    datasets = build()
    assert list(datasets) == ["val", "test"]
    boxes = [[0.25, 0.25, 0.75, 0.75], [0.75, 0.5, 1, 1]]  # the second is cut at the edge
    val = datasets["val"].annotation
    assert [(row["text"], row["group"]) for row in val] == [
        ("Left, man!", "val"),
        ("blue shirt", "val"),
    ]
    assert all(row["box"] == boxes[0] and row["boxes"] == boxes for row in val)
    woman, table = datasets["test"].annotation
    assert (woman["group"], woman["box"], woman["boxes"]) == (
        *("testA", [0, 0, 0.5, 0.5]),
        [[0, 0, 1, 1]],
    )
    assert (table["group"], table["box"], table["boxes"]) == ("testB", [0, 0, 1, 1], boxes)


def test_samples_have_the_layout_of_the_task(release):
    val = build("annotations.test=null")["val"]
    (batch,) = DataLoader(val, batch_size=2, collate_fn=val.collater)
    assert batch["image"].shape == (2, 3, 8, 8)
    assert batch["text_input"] == ["left man", "blue shirt"]
    assert batch["instance_id"] == ["0", "1"] and batch["index"].tolist() == [0, 1]


def test_other_folders_can_be_named(release):
    Path("data").rename("elsewhere")
    Path("elsewhere/refcoco+/dets.json").rename("mine.json")
    datasets = build("data=elsewhere", "detections=mine.json")
    assert [len(dataset) for dataset in datasets.values()] == [2, 2]


def test_a_missing_image_is_left_out(release):
    Path("coco", name_of(9)).unlink()
    assert [row["text"] for row in build()["test"].annotation] == ["table"]


def test_pixel_boxes_become_shares_of_the_image():
    assert unit_boxes([], 10, 10) == []
    outside, empty, flipped = [12, 0, 5, 5], [3, 3, 0, 4], [5, 5, -2, 2]
    assert unit_boxes([outside, [-5, 5, 10, 5], empty, flipped], 10, 20) == [[0, 0.25, 0.5, 0.5]]


# ---- what is refused

FILES = {
    "refcoco+_val.json": "ALBEF's data.tar.gz",
    "refcoco+/dets.json": "ALBEF's data.tar.gz",
    "refcoco+/instances.json": "REFER's refcoco\\+.zip",
    "refcoco+/refs(unc).p": "REFER's refcoco\\+.zip",
}


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named_with_where_to_get_it(release, file):
    Path("data", file).unlink()
    with pytest.raises(UserError, match=f"{Path(file).stem[:4]}.*No such file.*{FILES[file]}"):
        build()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"3", b"[]", b"[1, 2]", b'{"a": 1}', b"\xff\xfe\x00"]
)
def test_any_other_content_is_refused_in_one_line(release, file, content):
    Path("data", file).write_bytes(content)
    with pytest.raises(UserError, match=Path(file).stem[:4]) as error:
        build()
    assert "\n" not in str(error.value)


def test_files_that_do_not_match_are_refused(release):
    write("data/refcoco+_test.json", [expression(2, "woman"), expression(99, "table")])
    with pytest.raises(UserError, match=r"refs\(unc\).p has no entry 99: get that of REFER's"):
        build()
    write("data/refcoco+_test.json", [expression(2, "woman")])
    write("data/refcoco+/dets.json", {"7": []})
    with pytest.raises(UserError, match=r"dets.json has no entry '9': get that of ALBEF's"):
        build()
    write("data/refcoco+/dets.json", {"7": [], "9": [[1, 2, 3]]})
    with pytest.raises(UserError, match=r"_test.json, entry 1, or .* differently \(ValueError"):
        build()
    write("data/refcoco+_test.json", [{"image": name_of(9), "ref_id": 2}])
    with pytest.raises(UserError, match=r"_test.json, entry 1, .* differently \(KeyError\('text'"):
        build()


@pytest.mark.parametrize("image", ["/etc/passwd", "../secret.jpg", "C:\\a.jpg"])
def test_an_image_outside_the_folder_is_refused(release, image):
    write("data/refcoco+_test.json", [{**expression(2, "woman"), "image": image}])
    with pytest.raises(UserError, match="is outside the images folder"):
        build()


def test_wrong_keys_are_refused(release):
    with pytest.raises(UserError, match=f"datasets.{NAME}.dets: did you mean 'detections'"):
        build("dets=x.json")
    with pytest.raises(UserError, match=f"datasets.{NAME}.annotations.testA: did you mean 'test'"):
        build("annotations.testA=x.json")
    with pytest.raises(UserError, match=f"datasets.{NAME}.images is not set"):
        build("images=null")
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        build("images=nowhere")
    with pytest.raises(UserError, match="annotations names no file"):
        build("annotations={val: null, test: null}")


class Malicious:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("was here"),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_never_runs_code(release, protocol):
    refs, here = Path("data/refcoco+/refs(unc).p"), Path("was here")
    refs.write_bytes(pickle.dumps([{**REFS[0], "sentences": Malicious()}], protocol))
    with pytest.raises(UserError, match=r"refs\(unc\).p is not a pickle .* could run code"):
        build()
    assert not here.exists()
    pickle.loads(refs.read_bytes())  # it would have
    assert here.exists()


def test_only_plain_pickles_are_loaded(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(OrderedDict(a=1)))
    with pytest.raises(UserError, match="it asks for collections.OrderedDict"):
        load_plain_pickle(path, "nowhere")
    path.write_bytes(b"\x80\x02U\x04caf\xe9.")  # Python 2's str "caf\xe9"
    assert load_plain_pickle(path, "nowhere") == "café"
