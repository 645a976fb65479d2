"""Phrases alone and within captions in the grounding task, against each pair explained alone."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_builders
import toy_items
from lavis.models import load_model_and_preprocess

from softmask_plugin.compare import compare
from softmask_plugin.datasets.scenes.grammar import article, captions, make_scenes
from softmask_plugin.datasets.scenes.render import render
from softmask_plugin.explain.maps import phrase_maps, word_maps
from softmask_plugin.explain.pairs import explain
from softmask_plugin.tasks.grounding import GroundingTask, grounding_metrics

TEXTS = ["a circlestar & a red heart", "a black heart", "a heart", "a ring above a red star"]
OWNERS = ["b", "a", "b", "a"]  # several texts of one image
PHRASES = {  # words of the text, groups
    0: [([0, 1], ["people", "other"]), ([3, 4, 5], ["other"]), ([0, 3], [])],
    1: [([0, 1, 2], ["people"])],
    2: [([0, 1], ["scene"])],
    3: [([0, 1], ["people"]), ([3, 4, 5], ["other"])],
}


def random_boxes(rng, count):
    ends = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1)  # lower and upper x and y
    return ends.reshape(count, 4).tolist()


@pytest.fixture
def dataset():
    rng = np.random.default_rng(5)
    noise = torch.Generator().manual_seed(3)
    images = {name: torch.randn(3, 32, 32, generator=noise) for name in "ab"}
    boxes = {name: random_boxes(rng, 6) for name in images}
    annotation = []
    for i, (text, image) in enumerate(zip(TEXTS, OWNERS, strict=True)):
        phrases = [
            {"words": words, "box": boxes[image][k : k + 1 + k % 2], "group": group}
            for k, (words, group) in enumerate(PHRASES[i])
        ]
        entry = {"image": image, "text": text, "boxes": boxes[image], "phrases": phrases}
        annotation.append(entry)
    return toy_items.Items([images[name] for name in OWNERS], annotation, text_input="text")


@pytest.fixture(params=["match", "word", "similarity"])
def model(request, make_model):
    return make_model(soft_mask={"score": request.param}).eval()


def evaluate(model, dataset, batch_size=3):
    task = GroundingTask(alpha=0.5)
    return task, toy_items.evaluate(task, model, dataset, batch_size)


def inside(x, y, boxes):
    return any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in boxes)


def iou(a, b):
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (area - width * height)


def expected_rows(model, dataset):
    """The pointing game by the book: each text explained alone, each patch asked in turn."""
    patches = [((x + 0.5) / 4, (y + 0.5) / 4) for y in range(4) for x in range(4)]
    rows = []
    for image, entry in zip(dataset.images, dataset.annotation, strict=True):
        (shown,) = explain(model, image[None], [entry["text"]])
        for phrase in entry["phrases"]:
            heat = sum(shown.cams[word] for word in phrase["words"]) / len(phrase["words"])
            x, y = patches[int(heat.argmax())]
            own = phrase["box"]
            others = [b for b in entry["boxes"] if all(iou(b, each) <= 0.5 for each in own)]
            hit = inside(x, y, own)
            rows.append(
                {
                    "peak": [x, y],
                    "pointing": hit,
                    "pointing_chance": mean(inside(*patch, own) for patch in patches),
                    "pointing_center": inside(0.5, 0.5, own),
                    "pointing_other": not hit and inside(x, y, others),
                    "group": phrase["group"],
                }
            )
    return rows


@torch.no_grad()
def test_metrics_are_those_of_texts_explained_alone(model, dataset, folders):
    task, results = evaluate(model, dataset)
    rows = expected_rows(model, dataset)
    assert [row["peak"] for row in results] == [row["peak"] for row in rows]
    assert [row["instance_id"] for row in results] == [str(i) for i in range(7)]
    padded = [*results, *results[:2]]  # as a distributed sampler pads
    metrics = task.after_evaluation(val_result=padded, split_name="test", epoch="best")
    names = ("pointing", "pointing_chance", "pointing_center", "pointing_other")
    expected = {}
    for suffix in ("", "/people", "/other", "/scene"):
        of = [row for row in rows if not suffix or suffix[1:] in row["group"]]
        expected |= {name + suffix: 100 * mean(row[name] for row in of) for name in names}
        gap = expected[f"pointing{suffix}"] - expected[f"pointing_other{suffix}"]
        expected[f"pointing_gap{suffix}"] = gap
    assert metrics == pytest.approx({**expected, "agg_metrics": expected["pointing"]})
    assert 0 < expected["pointing"] < 100 and expected["pointing_other"] > 0
    assert json.loads((folders / "result" / "test_grounding.json").read_text()) == results
    for each in compare(folders, folders):
        assert each.first == each.second == pytest.approx(metrics[each.metric])


@torch.no_grad()
def test_each_image_of_a_batch_is_encoded_once_and_each_text_once(model, dataset, monkeypatch):
    see, read, seen = model.visual_encoder.forward, model.bert.encode, []
    monkeypatch.setattr(model.visual_encoder, "forward", lambda x: seen.append(len(x)) or see(x))
    monkeypatch.setattr(model.bert, "encode", lambda x, y: seen.append(len(x)) or read(x, y))
    evaluate(model, dataset, batch_size=4)
    hidden = [15] if model.options.soft_mask.score == "word" else []  # once more, behind [MASK]
    assert sorted(seen) == [2, 4, *hidden]


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_batches_do_not_change_results(model, dataset, batch_size):
    (_, small), (_, whole) = (evaluate(model, dataset, size) for size in (batch_size, 3))
    assert small == whole


def test_maps_of_shared_images_equal_those_of_pairs(model):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    owners = torch.tensor([1, 0, 1, 0])
    pairs, shared = word_maps(model, images[owners], TEXTS), word_maps(model, images, TEXTS, owners)
    torch.testing.assert_close(shared.score, pairs.score)
    tolerance = {"rtol": 1e-4, "atol": 1e-6 * float(pairs.maps.max())}
    torch.testing.assert_close(shared.maps, pairs.maps, **tolerance)
    phrases = [(0, [1, 3]), (2, [1]), (2, [0])]
    some = word_maps(model, images, TEXTS, owners, phrases)
    for caption, numbers in phrases:
        torch.testing.assert_close(
            some.maps[caption, numbers], pairs.maps[caption, numbers], **tolerance
        )
    with pytest.raises(ValueError, match="3 images do not pair with 4 captions"):
        word_maps(model, images, TEXTS, owners[:3])


def test_a_phrase_is_the_mean_of_its_words_and_lost_ones_do_not_count(model):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    words = word_maps(model, images, TEXTS)
    whole = phrase_maps(words, [(i, range(9)) for i in range(4)])
    torch.testing.assert_close(whole, phrase_maps(words))
    two, cut, gone = phrase_maps(words, [(3, [0, 4]), (1, [2, 5]), (1, [5, 99])])
    torch.testing.assert_close(two, (words.maps[3, 0] + words.maps[3, 4]) / 2)
    assert torch.equal(cut, words.maps[1, 2]) and (gone == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("text", ["phrase", "caption"])
def test_the_bundled_model_points_at_the_named_thing_of_a_folder(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = []
    for i, scene in enumerate(make_scenes("test", 40)):
        render(scene, 60).save(f"{i}.png")
        caption = captions(scene)[2].text
        for thing in scene.things:
            phrase = f"{article(thing.colour)} {thing.colour} {thing.shape}"
            rows.append(
                {"image": f"{i}.png", "phrase": phrase, "box": thing.box, "caption": caption}
            )
    Path("rows.json").write_text(json.dumps(rows))
    options = ("images=.", "phrases.test=rows.json", "vis_processor.eval.image_size=60")
    dataset = toy_builders.build("phrases_folder", *options, f"text={text}")["test"]
    model, _, _ = load_model_and_preprocess(
        "softmask_image_text_matching", "scenes_tiny", is_eval=True
    )
    task, results = evaluate(model, dataset, batch_size=64)
    metrics = grounding_metrics(results, task.items)
    assert len(results) == len(rows) == 80
    assert metrics["pointing"] > 80 and metrics["pointing_other"] < 15


# ---- several boxes


def item(box, boxes, group=()):
    return {"words": [0], "box": box, "boxes": boxes, "group": [*group]}


LEFT, RIGHT, THIRD = [0, 0, 0.4, 1], [0.6, 0, 1, 1], [0.4, 0, 0.6, 1]


def test_a_peak_in_any_box_is_a_hit_and_none_of_them_is_another(make_model, monkeypatch):
    phrase = {"words": [0], "box": [LEFT, RIGHT], "group": []}
    entry = {"image": "a", "boxes": [LEFT, RIGHT, THIRD], "phrases": [phrase]}
    columns = {0: (1, 0), 4: (1, 0), 2: (0, 1)}  # of the peak: hit and other
    for column, expected in columns.items():
        heat = torch.zeros(1, 5, 5)
        heat[0, 3, column] = 1
        for name, result in (("phrase_maps", heat), ("word_maps", None)):
            target = f"softmask_plugin.tasks.grounding.{name}"
            monkeypatch.setattr(target, lambda *_, result=result: result)
        task = GroundingTask(alpha=0.5)
        model = make_model()
        task.before_evaluation(model, SimpleNamespace(annotation=[entry]))
        index = torch.tensor([0])
        samples = {"image": torch.zeros(1), "text_input": ["dogs"], "index": index}
        (row,) = task.valid_step(model, samples)
        assert (row["hit"], row["other"]) == expected and row["chance"] == 0.8


def test_a_type_called_other_is_no_metric():
    """Flickr30k Entities has a type "other"; pointing_other is a peak on another thing."""
    row = {"chance": 0.25, "other": 0.0}
    results = [{"index": 0, "hit": 1.0, **row}, {"index": 1, "hit": 0.0, **row}]
    items = [item([LEFT, RIGHT], [], ["other"]), item([THIRD], [], ["people"])]
    metrics = grounding_metrics(results, items)
    assert metrics["pointing_other"] == 0 and metrics["pointing/other"] == 100
    assert metrics["pointing_center/other"] == 0 and metrics["pointing_center/people"] == 100
    assert metrics["pointing"] == metrics["pointing_center"] == metrics["agg_metrics"] == 50
    assert not any(name.startswith("acc") for name in metrics)
