"""Word maps of batches, and the grounding task in LAVIS's own evaluation loop."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lavis.tasks import setup_task
from omegaconf import OmegaConf
from tasks.test_phrases import inside, iou
from toy_items import Items, evaluate
from toy_models import matching_logits

from softmask_plugin.compare import compare
from softmask_plugin.errors import UserError
from softmask_plugin.explain.maps import phrase_maps, word_maps
from softmask_plugin.explain.pairs import explain
from softmask_plugin.tasks import grounding, items
from softmask_plugin.tasks.grounding import GroundingTask, box_scores, grounding_metrics

RAGGED = ["a small red circle above a large blue star", "", "circlestar ring", "a black heart"]
WORDS = [9, 0, 2, 3]
LEFT, RIGHT, TOP, ALL = (0, 0, 0.5, 1), (0.5, 0, 1, 1), (0, 0, 1, 0.5), (0, 0, 1, 1)


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def assert_same_maps(got, expected):
    """Equal to 1e-6 of the highest value: the maps' own scale is arbitrary."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * float(expected.max()))


# ---- word maps


def test_a_batch_of_ragged_captions_equals_its_pairs_alone(model, images):
    batch = word_maps(model, images, RAGGED)
    assert batch.maps.shape == (4, 9, 4, 4) and not batch.maps.requires_grad
    assert batch.real.sum(dim=1).tolist() == WORDS
    for i, count in enumerate(WORDS):
        alone = word_maps(model, images[i : i + 1], RAGGED[i : i + 1])
        assert alone.maps.shape == (1, count, 4, 4) and alone.real.all()
        torch.testing.assert_close(batch.score[i], alone.score[0], rtol=0, atol=1e-6)
        assert batch.real[i, :count].all() and (batch.maps[i, count:] == 0).all()
        if count:
            assert_same_maps(batch.maps[i, :count], alone.maps[0])


def test_explain_shows_these_maps(model, images):
    batch = word_maps(model, images, RAGGED)
    for i, shown in enumerate(explain(model, images, RAGGED)):
        assert shown.score == pytest.approx(batch.score[i].item(), abs=1e-6)
        assert len(shown.words) == WORDS[i]
        if WORDS[i]:
            assert_same_maps(shown.cams, batch.maps[i, : WORDS[i]])


def test_maps_equal_the_grad_cam_of_lavis_modules(model, images, albef_twin):
    """LAVIS's own attention, hooks and gradients, one pair; words of several tokens averaged."""
    caption, twin = "a circlestar ring", albef_twin(model).eval()
    tokens = model.caption_tokenizer.tokenize([caption])
    look = twin.text_encoder.bert.encoder.layer[model.options.soft_mask.layer].crossattention.self
    look.save_attention = True
    logits = matching_logits(twin, tokens, twin.visual_encoder(images[:1]))
    logits[0, 1].backward()
    cam = (look.get_attention_map() * look.get_attn_gradients().clamp_min(0))[0, :, :, 1:].mean(0)

    pieces = model.tokenizer.tokenize("circlestar")
    assert len(pieces) > 1
    parts = cam[1:-1].split([1, len(pieces), 1])  # without [CLS] and [SEP]
    expected = torch.stack([part.mean(0) for part in parts]).view(3, 4, 4).detach()
    got = word_maps(model, images[:1], [caption])
    torch.testing.assert_close(got.maps[0], expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    assert got.score.item() == pytest.approx(logits.softmax(-1)[0, 1].item(), abs=1e-5)


def test_phrase_maps_are_means_over_the_words(model, images):
    words = word_maps(model, images, RAGGED)
    got = phrase_maps(words)
    for i, count in enumerate(WORDS):
        expected = sum(words.maps[i, :count]) / max(count, 1)
        torch.testing.assert_close(got[i], torch.zeros(4, 4) + expected, rtol=1e-5, atol=0)
    assert (got[1] == 0).all() and (got[0] > 0).any()


def test_maps_in_half_precision_are_similar(model, images):
    exact = phrase_maps(word_maps(model, images, RAGGED))
    with torch.autocast("cpu", torch.bfloat16):
        rough = phrase_maps(word_maps(model, images, RAGGED))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.1 * float(exact.max()))


def test_images_and_captions_must_pair(model, images):
    with pytest.raises(ValueError, match="4 images do not pair with 2 captions"):
        word_maps(model, images, RAGGED[:2])


# ---- scores of boxes

SIDE, CELL = 3, 4  # a map of 3 x 3 patches, each 4 x 4 pixels


@st.composite
def pixel_boxes(draw):
    """Candidates whose corners are pixels of a (12, 12) image."""
    ends = st.lists(st.integers(0, SIDE * CELL), min_size=2, max_size=2, unique=True).map(sorted)
    spans = draw(st.lists(st.tuples(ends, ends), max_size=4))
    return [(x[0], y[0], x[1], y[1]) for x, y in spans]


@given(
    maps=st.lists(
        st.lists(st.integers(0, 5), min_size=SIDE**2, max_size=SIDE**2).filter(any),
        min_size=3,
        max_size=3,
    ),
    boxes=st.tuples(pixel_boxes(), pixel_boxes(), pixel_boxes()),
    alpha=st.sampled_from([0, 0.5, 1]),
)
def test_box_scores_equal_sums_over_pixels(maps, boxes, alpha):
    maps = np.array(maps, dtype=float).reshape(3, SIDE, SIDE)
    full = SIDE * CELL
    unit = [[tuple(end / full for end in box) for box in candidates] for candidates in boxes]
    for heat, candidates, got in zip(maps, boxes, box_scores(maps, unit, alpha), strict=True):
        pixels = heat.repeat(CELL, axis=0).repeat(CELL, axis=1)
        expected = [
            pixels[y0:y1, x0:x1].sum() / pixels.sum() / ((y1 - y0) * (x1 - x0) / full**2) ** alpha
            for x0, y0, x1, y1 in candidates
        ]
        assert got.tolist() == pytest.approx(expected, abs=1e-12)


def test_alpha_weighs_mass_against_area():
    heat = np.array([[[3.0, 1.0], [0.0, 0.0]]])
    corner = (0, 0, 0.5, 0.5)
    assert box_scores(heat, [[corner, TOP, ALL]], 0)[0].tolist() == [0.75, 1, 1]
    assert box_scores(heat, [[corner, TOP, ALL]], 1)[0].tolist() == [3, 2, 1]


# ---- metrics


def item(box, boxes, group="val"):
    return {"text": "", "box": box, "boxes": boxes, "group": group}


def result(index, scores, hit=0.0, chance=0.0, other=0.0):
    return {"index": index, "scores": scores, "hit": hit, "chance": chance, "other": other}


def test_metrics_by_group():
    annotation = [
        item(LEFT, [RIGHT, LEFT, ALL]),  # ALL overlaps by exactly 0.5, which is not above it
        item(LEFT, [(0, 0, 0.49, 1), (0, 0, 0.3, 1), RIGHT, TOP], "testA"),
        item(LEFT, [(0, 0, 0.49, 1), (0, 0, 0.3, 1), RIGHT, TOP], "testA"),
    ]
    results = [
        result(0, [0.1, 0.2, 0.3], hit=0.5, chance=0.25, other=0.3),
        result(1, [0.1, 0.2, 0, 0], hit=1),  # IoU 0.6
        result(2, [0.1, 0, 0.2, 0]),
    ]
    assert grounding_metrics(results, annotation) == pytest.approx(
        {
            **{"acc": 100 / 3, "acc_val": 0, "acc_testA": 50, "agg_metrics": 100 / 3},
            **{"acc_chance": (100 / 3 + 50 + 50) / 3, "acc_chance_testA": 50},
            **{"acc_chance_val": 100 / 3},
            **{"pointing": 50, "pointing_val": 50, "pointing_testA": 50},
            **{"pointing_chance": 25 / 3, "pointing_chance_val": 25, "pointing_chance_testA": 0},
            **dict.fromkeys((f"pointing_center{x}" for x in ("", "_val", "_testA")), 100),
            **{"pointing_other": 10, "pointing_other_val": 30, "pointing_other_testA": 0},
            **{"pointing_gap": 40, "pointing_gap_val": 20, "pointing_gap_testA": 50},
        }
    )


def test_tied_candidates_share_the_hit_and_none_is_a_miss():
    annotation = [item(LEFT, [LEFT, RIGHT, TOP]), item(LEFT, [])]
    metrics = grounding_metrics([result(0, [0.5, 0.5 + 1e-13, 0.1])], annotation)
    assert metrics["acc"] == 50
    assert grounding_metrics([result(0, [0.0, 0.0, 0.0])], annotation)["acc"] == pytest.approx(
        100 / 3
    )
    nothing = grounding_metrics([result(1, [])], annotation)
    assert nothing["acc"] == nothing["acc_chance"] == 0


def test_a_peak_on_another_thing_is_told_from_one_on_the_ground(model, monkeypatch):
    entry = item(LEFT, [LEFT, (0.1, 0, 0.5, 1), (0.5, 0, 0.75, 1)])
    peaks = {"own": 1, "other": 2, "ground": 3}
    for where, column in peaks.items():
        heat = torch.zeros(1, 4, 4)
        heat[0, 0, column] = 1
        monkeypatch.setattr(grounding, "phrase_maps", lambda _, heat=heat: heat)
        monkeypatch.setattr(grounding, "word_maps", lambda *_: None)
        task = task_of()
        task.before_evaluation(model, SimpleNamespace(annotation=[entry]))
        samples = {
            "image": None,
            "text_input": [""],
            "index": torch.tensor([0]),
            "instance_id": ["0"],
        }
        (row,) = task.valid_step(model, samples)
        assert (row["hit"], row["other"]) == (where == "own", where == "other")


# ---- the task in LAVIS's loop


@pytest.fixture
def dataset(images):
    annotation = [
        {"text": text, "box": box, "boxes": boxes, "group": group}
        for text, box, boxes, group in zip(
            RAGGED,
            (LEFT, TOP, RIGHT, (0.1, 0.3, 0.9, 0.7)),
            ([LEFT, RIGHT], [TOP, LEFT, ALL], [RIGHT], [(0.1, 0.3, 0.9, 0.6), TOP]),
            ("testA", "testA", "testB", "testB"),
            strict=True,
        )
    ]
    return Items(images, annotation, text_input="text")


def task_of(**run) -> GroundingTask:
    return setup_task(
        SimpleNamespace(run_cfg=OmegaConf.create({"task": "softmask_grounding", **run}))
    )


@torch.no_grad()
def test_results_are_those_of_explained_pairs(model, images, dataset):
    results = evaluate(task_of(grounding_alpha=1), model, dataset)
    assert [row["instance_id"] for row in results] == ["0", "1", "2", "3"]
    assert json.loads(json.dumps(results)) == results
    explained = explain(model, images, RAGGED)
    for row, shown, entry in zip(results, explained, dataset.annotation, strict=True):
        heat = shown.cams.double().mean(dim=0).numpy() if shown.words else np.ones((4, 4))
        (expected,) = box_scores(heat[None], [entry["boxes"]], alpha=1)
        assert row["scores"] == pytest.approx(expected.tolist(), rel=1e-4)
        y, x = np.unravel_index(heat.argmax(), heat.shape)
        assert row["peak"] == [(x + 0.5) / 4, (y + 0.5) / 4]
        if shown.words:  # otherwise all patches are peaks
            hit = inside(*row["peak"], [entry["box"]])
            others = [box for box in entry["boxes"] if iou(box, entry["box"]) <= 0.5]
            assert row["hit"] == hit
            assert row["other"] == (not hit and inside(*row["peak"], others))
    assert [row["chance"] for row in results] == [0.5, 0.5, 0.5, 0.5]
    assert results[1]["hit"] == 0.5


@torch.no_grad()
def test_each_item_counts_once_and_metrics_are_written(model, dataset, folders):
    task = task_of()
    results = evaluate(task, model, dataset)
    padded = [*results, results[0]]  # as a distributed sampler pads
    metrics = task.after_evaluation(val_result=padded, split_name="test", epoch="best")
    assert metrics == grounding_metrics(results, dataset.annotation)
    assert metrics["agg_metrics"] == metrics["acc"]
    assert {"acc_testA", "acc_testB"} < set(metrics)
    assert json.loads((folders / "result" / "test_grounding.json").read_text()) == results
    assert json.loads((folders / "evaluate.txt").read_text()) == metrics
    for each in compare(folders, folders):
        assert each.first == each.second == pytest.approx(metrics[each.metric])


@torch.no_grad()
def test_processes_share_the_work(model, dataset, folders, monkeypatch):
    task = task_of()
    results = evaluate(task, model, dataset)
    monkeypatch.setattr("lavis.tasks.base_task.get_world_size", lambda: 2)
    for rank, share in ((1, results[1::2]), (0, results[::2])):
        monkeypatch.setattr("lavis.tasks.base_task.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("lavis.tasks.base_task.is_main_process", lambda rank=rank: rank == 0)
        monkeypatch.setattr(items, "is_main_process", lambda rank=rank: rank == 0)
        metrics = task.after_evaluation(val_result=share, split_name="test", epoch=0)
        assert (metrics is None) == (rank == 1)
    assert metrics == pytest.approx(grounding_metrics(results, dataset.annotation))


@torch.no_grad()
def test_a_constant_map_scores_chance(model, images, folders):
    """Without words there is no map: candidates of one size tie, so do all patches."""
    cells = [(x / 4, y / 4, (x + 1) / 4, (y + 1) / 4) for x in range(4) for y in range(4)]
    annotation = [
        item(box, cells) for box in ((0.25, 0.5, 0.5, 0.75), cells[0], cells[15], cells[6])
    ]
    task, dataset = task_of(), Items(images, annotation, text_input="text")
    metrics = task.after_evaluation(evaluate(task, model, dataset), split_name="val", epoch=0)
    assert metrics["pointing"] == pytest.approx(metrics["pointing_chance"]) == 100 / 16
    assert metrics["acc"] == pytest.approx(metrics["acc_chance"]) == 100 / 16


@torch.no_grad()
def test_broken_weights_are_an_error(model, dataset):
    model.itm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="a heat map is NaN or infinite"):
        evaluate(task_of(), model, dataset)


@pytest.mark.parametrize("alpha", [-1, "half", None, True, float("nan")])
def test_a_wrong_alpha_is_refused(alpha):
    with pytest.raises(UserError, match="run.grounding_alpha is .*: it must be a number >= 0"):
        task_of(grounding_alpha=alpha)


def test_a_data_set_without_boxes_is_refused(model, images):
    for annotation in ([{"text": "a", "box": LEFT}], []):
        with pytest.raises(UserError, match="cannot evaluate Items.*refcoco_plus_grounding"):
            task_of().before_evaluation(model, Items(images, annotation, text_input="text"))


def test_a_model_that_does_not_match_is_refused(dataset):
    with pytest.raises(UserError, match="cannot evaluate Linear: use softmask_pretrain"):
        task_of().before_evaluation(torch.nn.Linear(1, 1), dataset)
