"""Unusual batches and broken weights: no NaN is learned or reported."""

from __future__ import annotations

import pytest
import torch
from toy_models import BLIP, TRAINED

from softmask_plugin.errors import UserError, require_finite_scores
from softmask_plugin.explain.pairs import explain
from softmask_plugin.models import (
    SoftMaskClassification,
    SoftMaskFeatureExtractor,
    SoftMaskImageTextMatching,
    SoftMaskNlvr,
    SoftMaskPretrain,
    SoftMaskRetrieval,
    SoftMaskVqa,
)

TEXTS = ["a red ring", "", "?!", "a small green square to the right of a yellow triangle", "star"]


def batch_of(size: int, image_id: int | None = None) -> dict:
    """A batch for any model; all of one image if its id is given."""
    generator = torch.Generator().manual_seed(size)
    image = torch.randn(size, 3, 32, 32, generator=generator)
    return {
        "image": image,
        "image0": image,
        "image1": image.flip(0),
        "text_input": (TEXTS * size)[:size],
        "image_id": torch.arange(size) if image_id is None else torch.full((size,), image_id),
        "label": torch.arange(size) % 2,
        "answer": (["yes", "a ring", ""] * size)[:size],
        "n_answers": torch.ones(size, dtype=torch.long),
        "weight": torch.ones(size),
        **{"epoch": 0, "iters": 1, "num_iters_per_epoch": 3},
    }


# ---- training


@pytest.mark.parametrize(
    ("size", "image_id"),
    [(1, None), (1, 7), (2, 7), (5, 7), (5, None), (25, None)],  # of a queue of 24
    ids=["one", "one of an id", "two of an id", "all of an id", "not dividing", "above the queue"],
)
@pytest.mark.parametrize("cls", [*TRAINED, *BLIP], ids=lambda cls: cls.__name__)
def test_a_step_stays_finite(make_other, cls, size, image_id):
    changes = {"soft_mask": {"enabled": True}} if issubclass(cls, SoftMaskRetrieval) else {}
    model = make_other(cls, **changes).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):  # the second reads the queues that the first wrote
        optimizer.zero_grad()
        loss = model(batch_of(size, image_id))["loss"]
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    if hasattr(model, "queue_ptr"):
        assert int(model.queue_ptr) == 2 * min(size, 24) % 24


@pytest.mark.parametrize("cls", [*TRAINED, *BLIP], ids=lambda cls: cls.__name__)
def test_no_text_at_all_stays_finite(make_other, cls):
    changes = {"soft_mask": {"enabled": True}} if issubclass(cls, SoftMaskRetrieval) else {}
    batch = {**batch_of(3), "text_input": ["", "", ""]}
    assert make_other(cls, **changes).train()(batch)["loss"].isfinite()


# ---- broken weights


def broken(model, value: float = float("nan")):
    """Break one weight of the image encoder, as a diverged run does."""
    with torch.no_grad():
        model.visual_encoder.norm.bias[0] = value
    return model.eval()


class Gallery(list):
    dataset = type("Data", (), {"text": TEXTS, "image": ["a.png", "b.png"]})


def retrieve(model, batch, k_test=2):
    return model.compute_sim_matrix(Gallery([{"image": batch["image"]}]), {"k_test": k_test})


PREDICTIONS = {
    "retrieval": (SoftMaskRetrieval, retrieve),
    "retrieval by pretraining": (SoftMaskPretrain, retrieve),
    "ITC alone": (SoftMaskRetrieval, lambda m, b: retrieve(m, b, 0)),
    "classes": (SoftMaskClassification, lambda m, b: m.predict(b)),
    "two images": (SoftMaskNlvr, lambda m, b: m.predict(b)),
    "answers": (SoftMaskVqa, lambda m, b: m.predict_answers(b, ["yes", "no", "a ring"])),
    "ITM scores": (SoftMaskImageTextMatching, lambda m, b: m(b, "itm")),
    "ITC scores": (SoftMaskImageTextMatching, lambda m, b: m(b, "itc")),
    "features": (SoftMaskFeatureExtractor, lambda m, b: m.extract_features(b)),
    "image features": (SoftMaskFeatureExtractor, lambda m, b: m.extract_features(b, "image")),
    "explanations": (
        SoftMaskImageTextMatching,
        lambda m, b: explain(m, b["image"], b["text_input"]),
    ),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_broken_model_raises_an_error(make_other, kind, value):
    cls, predict = PREDICTIONS[kind]
    model = make_other(cls).eval()
    predict(model, batch_of(2))
    with pytest.raises(UserError, match="is NaN or infinite: the weights or the images") as caught:
        predict(broken(model, value), batch_of(2))
    assert "\n" not in str(caught.value)


def test_a_broken_image_raises_an_error(make_other):
    batch = batch_of(2)
    batch["image"][1, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="a class's score is NaN or infinite"):
        make_other(SoftMaskClassification).eval().predict(batch)


def test_scores_of_any_shape_are_checked():
    good, bad = torch.zeros(3, 2), torch.tensor(float("-inf"))
    require_finite_scores("a score", good, torch.zeros(0), torch.tensor(1))
    with pytest.raises(UserError, match="^a score is NaN or infinite"):
        require_finite_scores("a score", good, bad)
