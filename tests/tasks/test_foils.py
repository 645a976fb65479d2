"""Caption against foil: scores of batches, masks of changed words, metrics and their intervals."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from lavis.tasks import setup_task
from omegaconf import OmegaConf
from scipy.special import expit
from toy_items import Items, evaluate
from toy_models import matching_logits

from softmask_plugin.compare import compare
from softmask_plugin.errors import UserError
from softmask_plugin.explain.pairs import explain
from softmask_plugin.foil_metrics import foil_metrics
from softmask_plugin.tasks import items
from softmask_plugin.tasks.foils import FoilsTask, changed_words

# (caption, foil, index of the changed word)
ITEMS = [
    ("a small red circle above a blue star", "a small pink circle above a blue star", 2),
    ("a ring", "a heart", 1),
    ("a black heart below a red ring", "a black heart above a red ring", 3),
    ("a large blue star", "a small blue star", 1),
    ("a red cross", "a red square", 2),
]


def pairs(images, annotation):
    return Items(images, annotation, caption="caption", foil="foil")


@pytest.fixture
def images():
    return torch.randn(len(ITEMS), 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def dataset(images):
    annotation = [
        {"image": f"{i // 2}.jpg", "caption": caption, "foil": foil, "group": "ab"[i % 2]}
        for i, (caption, foil, _) in enumerate(ITEMS)
    ]
    return pairs(images, annotation)


def task_of(**run) -> FoilsTask:
    return setup_task(SimpleNamespace(run_cfg=OmegaConf.create({"task": "softmask_foils", **run})))


# ---- scores


@torch.no_grad()
def test_mixed_precision_keeps_the_digits_that_tell_texts_apart(model, dataset):
    with torch.autocast("cpu", torch.bfloat16):
        results = evaluate(task_of(), model, dataset)
    for kind in ("itm", "itc"):
        scores = torch.tensor([row[kind] for row in results])
        assert not torch.equal(scores.bfloat16().float(), scores)
        assert (scores[:, 0] != scores[:, 1]).all()


@torch.no_grad()
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_scores_equal_those_of_lavis_modules(make_model, images, dataset, albef_twin, pool):
    model = make_model(text_pool=pool).eval()
    twin = albef_twin(model).eval()
    results = evaluate(task_of(), model, dataset)
    assert json.loads(json.dumps(results)) == results
    for i, row in enumerate(results):
        told = {"instance_id": str(i), "group": "ab"[i % 2], "image": f"{i // 2}.jpg"}
        assert told.items() <= row.items() and "pair" not in row
        state = twin.visual_encoder(images[i : i + 1])
        feature = torch.nn.functional.normalize(twin.vision_proj(state[:, 0]), dim=-1)
        for side, text in enumerate(ITEMS[i][:2]):
            tokens = model.caption_tokenizer.tokenize([text])
            logits = matching_logits(twin, tokens, state)[0]
            assert row["itm"][side] == pytest.approx((logits[1] - logits[0]).item(), abs=1e-5)
            words = model.bert.encode(tokens.ids, tokens.packing).states
            words = words.mean(dim=0) if pool == "mean" else words[0]
            cosine = (feature @ model.text_features(words)).item()
            assert row["itc"][side] == pytest.approx(cosine, abs=1e-5)


@pytest.mark.parametrize("score", ["match", "word"])
@pytest.mark.parametrize("kind", ["soft", "hard", "uniform"])
def test_masks_are_those_of_the_changed_words(make_model, images, dataset, kind, score):
    model = make_model(soft_mask={"kind": kind, "score": score}).eval()
    plain, masked = (evaluate(task_of(**run), model, dataset) for run in ({}, {"foil_mask": kind}))
    for i, (*texts, word) in enumerate(ITEMS):
        assert masked[i]["itc"] == plain[i]["itc"] and masked[i]["itm"] != plain[i]["itm"]
        shown = explain(model, images[[i, i]], texts)
        expected = [each.masked_scores[word].item() for each in shown]
        assert expit(masked[i]["itm"]) == pytest.approx(expected, abs=1e-6)


def test_random_masks_are_repeatable_and_not_soft(model, dataset):
    once, twice, soft = (
        [row["itm"] for row in evaluate(task_of(foil_mask=kind), model, dataset)]
        for kind in ("random", "random", "soft")
    )
    assert once == twice != soft


@pytest.mark.parametrize("score", ["match", "word"])
def test_a_text_without_a_changed_word_is_matched_unmasked(make_model, images, score):
    model = make_model(soft_mask={"score": score}).eval()
    same = {"caption": "a red ring", "foil": "a red ring", "image": "0", "group": "add"}
    (tied,) = evaluate(task_of(foil_mask="soft"), model, pairs(images, [same]))
    assert tied["itm"][0] == pytest.approx(tied["itm"][1], abs=1e-5)
    data = pairs(images, [{**same, "foil": "a red ring above"}])
    (plain,), (masked,) = (
        evaluate(task_of(**run), model, data) for run in ({}, {"foil_mask": "soft"})
    )
    assert masked["itm"][0] == pytest.approx(plain["itm"][0], abs=1e-5)
    assert abs(masked["itm"][1] - plain["itm"][1]) > 1e-5


@pytest.mark.parametrize(
    ("caption", "foil", "expected", "false"),
    [
        ("a red ring", "a blue ring", [1], [1]),
        ("an orange ring", "a blue ring", [1], [1]),  # the article only follows
        ("a ring above a star", "a ring below a star", [2], [2]),
        ("a red ring and a blue star", "a blue ring and a red star", [1, 5], [1, 5]),
        ("a ring", "a small red ring", [], [1, 2]),
        ("a ring", "a ring", [], []),
    ],
)
def test_changed_words(caption, foil, expected, false):
    found = changed_words([caption.split(), foil.split()])
    assert found == [expected, false]


# ---- metrics


def row(itm, itc=(0, 0), image="a", group="g", **more):
    return {"itm": itm, "itc": itc, "image": image, "group": group, **more}


def test_metrics_by_group():
    metrics = foil_metrics(
        [
            row((1, 0), (0.1, 0.2), "a", "one"),
            row((0, 1), (0.2, 0.2), "b", "one"),
            row((2, 2), (0.3, 0.2), "c", "two"),
        ]
    )
    found = {key: value for key, value in metrics.items() if "interval" not in key}
    right, wrong = expit([1, 0, 2]) * 100, expit([0, 1, 2]) * 100
    assert found == pytest.approx(
        {
            **{"acc": 50, "acc_one": 50, "acc_two": 50, "agg_metrics": 50},
            **{"acc_itc": 50, "acc_itc_one": 25, "acc_itc_two": 100},
            **{"right": right.mean(), "right_one": right[:2].mean(), "right_two": right[2]},
            **{"wrong": wrong.mean(), "wrong_one": wrong[:2].mean(), "wrong_two": wrong[2]},
        }
    )
    assert "acc_interval_one" in metrics and "acc_interval_two" not in metrics  # of one image


def test_intervals_of_independent_items_are_student_s():
    rng = np.random.default_rng(0)
    itm = rng.normal(size=(40, 2)) + [0.5, 0]
    rows = [row(scores, image=i) for i, scores in enumerate(itm.tolist())]
    metrics = foil_metrics(rows)
    for name, values in (("acc", itm[:, 0] > itm[:, 1]), ("right", expit(itm[:, 0]))):
        low, high = scipy.stats.ttest_1samp(100 * values, 0).confidence_interval()
        assert metrics[f"{name}_interval"] == pytest.approx((high - low) / 2)
    twice = foil_metrics([*rows, *rows])  # no more is known from a copy of each
    assert twice == pytest.approx(metrics)


def test_saturated_matches_are_still_ranked():
    metrics = foil_metrics([row((60.0, 59.0)), row((60.0, 61.0))])
    assert metrics["acc"] == 50 and metrics["right"] == metrics["wrong"] == 100


def test_winoground_scores():
    def pair(name, *scores):  # caption and foil of one image, then of the other
        return [row(each, image=f"{name}{i}", pair=name) for i, each in enumerate(scores)]

    metrics = foil_metrics(
        [
            *pair("both", (3, 1), (3, 1)),
            *pair("text", (9, 8), (3, 1)),  # but caption 1 matches the first image better
            *pair("image", (2, 3), (9, 1)),  # but the first image matches caption 1 better
            *pair("neither", (1, 2), (1, 2)),
            *pair("tied", (1, 1), (1, 1)),
            row((1, 0), image="alone"),
        ]
    )
    assert [metrics[name] for name in ("text", "image", "group")] == [40, 40, 20]
    assert metrics["acc"] == pytest.approx(100 * (2 + 2 + 1 + 0 + 1 + 1) / 11)
    assert metrics["image_g"] == 40 and metrics["text_interval_g"] == metrics["text_interval"]
    half = foil_metrics([*pair("both", (3, 1), (3, 1)), *pair("half", (1, 3))])  # one image is gone
    assert half["text"] == 100 and half["acc"] == pytest.approx(200 / 3)
    alone = [row((1, 0), image="a", pair="half"), row((0, 1), image="a"), row((2, 1), image="a")]
    assert "acc_interval" not in foil_metrics(alone)  # of one image


def test_scores_of_pairs_that_share_images_are_no_more_certain():
    def pairs(copies):
        scores = [(3, 1), (3, 1)], [(1, 3), (3, 1)], [(3, 1), (3, 1)]
        return [
            row(each, image=f"{name}{i}", pair=f"{name} {copy}")
            for name, both in enumerate(scores)
            for copy in range(copies)
            for i, each in enumerate(both)
        ]

    once, often = foil_metrics(pairs(1)), foil_metrics(pairs(20))
    assert often["text"] == once["text"]
    assert often["text_interval"] == pytest.approx(once["text_interval"])


# ---- the task in LAVIS's loop


def test_each_item_counts_once_and_metrics_are_written(model, dataset, folders):
    task = task_of()
    results = evaluate(task, model, dataset)
    padded = [*results, results[0]]  # as a distributed sampler pads
    metrics = task.after_evaluation(val_result=padded, split_name="test", epoch="best")
    assert metrics == foil_metrics(results)
    assert metrics["agg_metrics"] == metrics["acc"]
    assert json.loads((folders / "result" / "test_foils.json").read_text()) == results
    assert json.loads((folders / "evaluate.txt").read_text()) == metrics
    for each in compare(folders, folders):
        assert each.first == each.second == pytest.approx(metrics[each.metric])


def test_other_processes_report_nothing(model, dataset, folders, monkeypatch):
    results = evaluate(task_of(), model, dataset)
    monkeypatch.setattr(items, "is_main_process", lambda: False)
    assert task_of().after_evaluation(val_result=results, split_name="test") is None


@torch.no_grad()
@pytest.mark.parametrize("mask", ["none", "soft"])
def test_broken_weights_are_an_error(model, dataset, mask):
    model.itm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="a match or a similarity is NaN or infinite"):
        evaluate(task_of(foil_mask=mask), model, dataset)


def test_an_unknown_mask_is_refused():
    with pytest.raises(UserError, match="run.foil_mask is 'sotf': did you mean 'soft'"):
        task_of(foil_mask="sotf")


def test_a_data_set_without_foils_is_refused(model, images):
    for annotation in ([{"caption": "a"}], []):
        with pytest.raises(UserError, match="cannot evaluate Items, which has no foils.*scenes_f"):
            task_of().before_evaluation(model, pairs(images, annotation))


def test_a_model_that_does_not_match_is_refused(dataset):
    with pytest.raises(UserError, match="cannot evaluate Linear: use softmask_pretrain"):
        task_of().before_evaluation(torch.nn.Linear(1, 1), dataset)
