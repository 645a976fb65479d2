"""What the downstream models do beyond LAVIS's: edges, switches, errors, two images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lavis.models import load_model_and_preprocess
from lavis.models.base_model import BaseModel
from toy_models import whole_batch

from softmask_plugin.errors import UserError
from softmask_plugin.models import (
    SoftMaskBlipPretrain,
    SoftMaskClassification,
    SoftMaskFeatureExtractor,
    SoftMaskImageTextMatching,
    SoftMaskNlvr,
    SoftMaskNlvrPretrain,
    SoftMaskPretrain,
    SoftMaskRetrieval,
    SoftMaskVqa,
)
from softmask_plugin.models.nlvr import assign
from softmask_plugin.nn.sampling import Draws


def sound(model, batch):
    """Run one training step, check that losses and gradients are finite, and return its output."""
    out = model.train()(batch)
    out["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    return out


# ---- retrieval


@pytest.mark.parametrize("ids", [[5], [5, 5, 5], [5, 5, 6]])
def test_a_batch_of_one_image_has_no_negatives(make_other, make_batch, ids):
    model = make_other(SoftMaskRetrieval)
    out = sound(model, {**make_batch(len(ids)), "image_id": torch.tensor(ids)})
    if len(set(ids)) > 1:
        return
    model.zero_grad()  # ITM of the positives alone
    with torch.no_grad():
        batch = make_batch(len(ids))
        captions = model.tokenize(batch["text_input"])
        memory = model.bert.remember(model.visual_encoder(batch["image"]))
        fused = model.bert.fuse(model.bert.encode(captions.ids, captions.packing), memory)
        expected = -model.match(fused.cls).log_softmax(1)[:, 1].mean()
    torch.testing.assert_close(out["loss_itm"], expected)


def test_retrieval_has_the_papers_innovations_as_options(make_other, make_batch):
    batch = {**make_batch(4), "image_id": torch.tensor([1, 2, 2, 3])}
    plain = sound(make_other(SoftMaskRetrieval), dict(batch))
    assert "loss_soft" not in plain
    masked = sound(make_other(SoftMaskRetrieval, soft_mask={"enabled": True}), dict(batch))
    assert masked["loss_soft"] > 0
    for name in ("loss_itc", "loss_itm"):  # the mask changes neither the draws nor the others
        torch.testing.assert_close(masked[name], plain[name])
    torch.testing.assert_close(
        masked["loss"], plain["loss_itc"] + plain["loss_itm"] + masked["loss_soft"]
    )
    focal = make_other(SoftMaskRetrieval, itc={"gamma": 2.0})(dict(batch))
    assert focal["loss_itc"] < plain["loss_itc"]
    with pytest.raises(UserError, match="model.soft_mask.in_mlm is true: .* has no MLM"):
        make_other(SoftMaskRetrieval, soft_mask={"in_mlm": True})
    with pytest.raises(UserError, match="model.soft_mask.score is 'word': .* has no MLM"):
        make_other(SoftMaskRetrieval, soft_mask={"score": "word"})


# ---- two images


def test_swapping_the_images_matters_and_each_layer_attends_to_its_own(make_other, make_batch):
    model = make_other(SoftMaskNlvr).eval()
    first, second = make_batch(3)["image"], make_batch(2)["image"][[0, 1, 0]]
    text = make_batch(3)["text_input"]
    batch = {"image0": first, "image1": second, "text_input": text, "label": torch.zeros(3)}
    one = model.predict(dict(batch))["predictions"]
    other = model.predict({**batch, "image0": second, "image1": first})["predictions"]
    assert not torch.allclose(one, other)
    layers = model.bert.fusion_layers
    assert len(layers) == 6  # twice three
    for a, b in zip(layers[::2], layers[1::2], strict=True):
        assert a.crossattention.self.key.weight is b.crossattention.self.key.weight
        assert a.crossattention.self.query.weight is not b.crossattention.self.query.weight
    first, second, *_ = model.text_encoder_m.fusion_layers
    assert first.crossattention.self.key.weight is second.crossattention.self.key.weight


def test_text_assignment_places_the_own_image_as_the_label_says(make_other, make_batch):
    seen = []
    for step in range(50):
        first, second, label = assign(torch.zeros(6, 6), Draws(0, step))
        own = torch.arange(6)
        assert (first != second).all()
        assert torch.equal(first == own, label == 0)
        assert torch.equal(second == own, label == 1)
        seen += label.tolist()
    assert all(80 < seen.count(label) < 120 for label in range(3))
    batch = make_batch(6)
    batch.pop("image_id", None)
    assert sound(make_other(SoftMaskNlvrPretrain), batch)["loss"] > 0
    assert make_other(SoftMaskNlvrPretrain)(make_batch(1))["loss"].isfinite()


def test_text_assignment_draws_similar_images_most_often():
    """In proportion to the softmax of similarities, the own image left out, as in ALBEF."""
    similarity = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    counts, own = torch.zeros(2, 4, 4), torch.arange(4)
    for step in range(3000):
        first, second, label = assign(similarity, Draws(0, step))
        for position, other in enumerate((second, first)):
            rows = own[label == position]
            counts[position, rows, other[rows]] += 1
    expected = similarity.softmax(dim=1).fill_diagonal_(0)
    expected /= expected.sum(dim=1, keepdim=True)
    for found in counts / counts.sum(dim=2, keepdim=True):
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


# ---- several images


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (SoftMaskClassification, r"3 images for 1 text\(s\): each text takes 1"),
        (SoftMaskNlvr, r"6 images for 1 text\(s\): each text takes 2"),
    ],
)
def test_images_are_as_many_as_texts_take(make_other, make_batch, cls, message):
    batch = make_batch(3)
    images = {"image": batch["image"], "image0": batch["image"], "image1": batch["image"]}
    with pytest.raises(UserError, match=message):
        make_other(cls).predict({**images, "text_input": ["a cat"], "label": torch.zeros(3)})


@pytest.mark.parametrize(
    "cls", [SoftMaskPretrain, SoftMaskRetrieval, SoftMaskBlipPretrain, SoftMaskNlvrPretrain]
)
def test_training_pairs_need_a_text_for_each_image(make_other, make_batch, cls):
    batch = whole_batch(make_batch(3))
    for texts in (["a cat"] * 2, ["a cat"] * 4):
        with pytest.raises(UserError, match=rf"3 images for {len(texts)} text\(s\)"):
            make_other(cls).train()({**batch, "text_input": texts})
    with pytest.raises(UserError, match="there is no caption: give at least one"):
        make_other(cls).train()({**batch, "text_input": []})


@pytest.mark.parametrize(
    "change", [lambda x: x[0], lambda x: x.movedim(1, -1), lambda x: x.to(torch.uint8)]
)
def test_raw_images_are_refused(make_other, make_batch, change):
    model, image = make_other(SoftMaskImageTextMatching), make_batch(2)["image"]
    with pytest.raises(ValueError, match=r"give processed ones, \(B, 3, H, W\) of floats"):
        model({"image": change(image), "text_input": ["a cat", "a dog"]})


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, list])
def test_labels_of_any_whole_type(make_other, make_batch, dtype):
    batch, label = make_batch(2), torch.tensor([0, 1])
    given = label.tolist() if dtype is list else label.to(dtype)
    losses = [
        make_other(SoftMaskClassification)({**batch, "label": x})["loss"] for x in (label, given)
    ]
    assert torch.equal(*losses)


def test_lavis_way_to_predict(make_other, make_batch):
    batch = {**make_batch(3), "label": torch.tensor([0, 1, 2])}
    model = make_other(SoftMaskClassification).eval()
    found, expected = model(dict(batch), is_train=False), model.predict(dict(batch))
    assert torch.equal(found["predictions"], expected["predictions"])
    del batch["label"]  # new images have none
    assert torch.equal(model.predict(batch).pop("predictions"), expected["predictions"])


@pytest.mark.parametrize("call", ["forward", "extract_features"])
def test_pairs_need_a_text_for_each_image(make_other, make_batch, call):
    cls = SoftMaskImageTextMatching if call == "forward" else SoftMaskFeatureExtractor
    batch = {"image": make_batch(3)["image"], "text_input": ["a cat", "a dog"]}
    with pytest.raises(UserError, match=r"3 images for 2 text\(s\)"):
        getattr(make_other(cls), call)(batch)


# ---- questions


def test_vqa_follows_a_list_of_answers_that_changes(make_other, make_batch):
    model, samples = make_other(SoftMaskVqa).eval(), {**make_batch(2), "text_input": ["a", "b"]}
    answers = ["red", "blue"]
    assert set(model.predict_answers(samples, answers)) <= {"red", "blue"}
    for changed in (["red", "blue", "green"], ["circle", "star", "ring"]):
        answers[:] = changed
        model.known_answers, known = None, model.known_answers
        expected = model.predict_answers(samples, [*changed])
        model.known_answers = known
        assert model.predict_answers(samples, answers) == expected


def test_vqa_says_what_is_missing(make_other, make_batch):
    model = make_other(SoftMaskVqa).eval()
    image = make_batch(2)["image"]
    with pytest.raises(UserError, match="gives no list of them"):
        model.predict_answers({"image": image, "text_input": ["a", "b"]}, None)
    with pytest.raises(UserError, match=r"2 images for 1 text\(s\): each text takes 1"):
        model.predict_answers({"image": image, "text_input": "what is red"}, ["yes"])
    with pytest.raises(UserError, match="run.inference_method is 'generate': .* set it to rank"):
        model.predict_answers(
            {"image": image, "text_input": ["a", "b"]}, ["yes"], inference_method="generate"
        )
    one = {"image": image[:1], "text_input": "what"}
    for answers in (["yes"], "yes", {"yes"}, np.array(["yes"])):
        assert model.predict_answers(one, answers) == ["yes"]


def test_a_vqa_model_learns_its_batch(make_other, make_batch):
    """Teacher forcing, decoding and ranking agree: the model answers what it was trained on."""
    model = make_other(SoftMaskVqa, use_distill=False, bert={"dropout": 0.0})
    questions = ["what is red", "how many stars", "is there a ring", "what is small"]
    answers = ["a circle", "a large star", "a ring", "a circle and a ring"]
    batch = {
        "image": make_batch(4)["image"],
        "text_input": questions,
        "answer": answers,
        "n_answers": torch.ones(4, dtype=torch.long),
        "weight": torch.ones(4),
    }
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model.train()(batch)["loss"].backward()
        optimizer.step()
    assert model.eval().predict_answers(batch, answers) == answers


# ---- how they are called


@pytest.mark.parametrize(
    "name",
    [
        "softmask_retrieval",
        "softmask_classification",
        "softmask_nlvr",
        "softmask_nlvr_pretrain",
        "softmask_vqa",
        "softmask_image_text_matching",
        "softmask_feature_extractor",
    ],
)
def test_a_tiny_type_needs_no_download(name):
    model, images, texts = load_model_and_preprocess(name, "tiny", is_eval=True)
    assert isinstance(model, BaseModel) and not model.training
    assert {"eval"} <= images.keys() and {"eval"} <= texts.keys()


def test_features_say_what_is_missing(make_other):
    model = make_other(SoftMaskFeatureExtractor)
    with pytest.raises(UserError, match="mode is 'imag': did you mean 'image'"):
        model.extract_features({}, "imag")
    with pytest.raises(UserError, match=r"samples\['image'\] is missing: mode image"):
        model.extract_features({}, "image")


def test_an_unknown_head_is_refused(make_other, make_batch):
    with pytest.raises(UserError, match="match_head is 'itn': did you mean 'itm'"):
        make_other(SoftMaskImageTextMatching)(make_batch(2), "itn")


@pytest.mark.parametrize(
    "cls",
    [SoftMaskRetrieval, SoftMaskClassification, SoftMaskNlvr, SoftMaskNlvrPretrain, SoftMaskVqa],
)
def test_a_step_in_bf16_is_near_float32(make_other, make_batch, cls):
    batch = whole_batch(make_batch(4, epoch=4))
    exact = make_other(cls).train()(dict(batch))["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = make_other(cls).train()(dict(batch))["loss"]
    rounded.backward()
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_precision_matches(make_other, make_batch, dtype):
    model = make_other(SoftMaskImageTextMatching).eval()
    batch = {"image": make_batch(2)["image"], "text_input": ["a cat", "a dog"]}
    exact = model(batch)
    torch.testing.assert_close(model.to(dtype)(batch).float(), exact, rtol=0.05, atol=0.05)


def test_distillation_off_leaves_no_momentum_model(make_other, make_batch):
    model = make_other(SoftMaskClassification, use_distill=False)
    assert not [name for name in model.state_dict() if "_m." in name]
    sound(model, {**make_batch(3), "label": torch.tensor([0, 1, 2])})


@pytest.mark.parametrize("cls", [SoftMaskClassification, SoftMaskVqa])
def test_without_weight_the_momentum_model_is_not_asked(make_other, make_batch, cls):
    model, asked = make_other(cls, alpha=0.4, alpha_epochs=1).train(), []
    model.visual_encoder_m.register_forward_hook(lambda *_: asked.append(1))
    labels = {"label": torch.tensor([0, 1]), "answer": ["a", "b"], "n_answers": torch.ones(2).int()}
    for iters, expected in ((0, 0), (1, 1)):
        place = {"epoch": 0, "iters": iters, "num_iters_per_epoch": 5}
        model({**make_batch(2), **labels, "weight": torch.ones(2), **place})
        assert len(asked) == expected
