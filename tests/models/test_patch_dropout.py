"""Patch dropout in every model: equal to the same step on images that a plain loop cut."""

from __future__ import annotations

import pytest
import torch
from toy_models import BLIP, SMALL, TRAINED, whole_batch

from softmask_plugin.explain.pairs import explain
from softmask_plugin.nn.sampling import Draws
from softmask_plugin.nn.vision import Visible, VisionTransformer

HALF = {"vit": {**SMALL["vit"], "patch_dropout": 0.5}}
MODELS = [*TRAINED, *BLIP]

pytestmark = pytest.mark.usefixtures("same_negatives")


def encode_one_by_one(encoder, visible):
    """The states of images of which only some patches exist."""
    states = []
    for image, patches in zip(visible.images, visible.patches, strict=True):
        x = encoder.patch_embed(image[None]) + encoder.pos_embed[:, 1:]
        x = torch.stack([encoder.cls_token[0, 0] + encoder.pos_embed[0, 0], *x[0, patches]])[None]
        for block in encoder.blocks:
            x = block(x)
        states.append(encoder.norm(x)[0])
    return torch.stack(states)


@pytest.mark.parametrize("cls", MODELS)
def test_a_step_equals_one_on_images_cut_one_by_one(make_other, make_batch, cls, monkeypatch):
    """Also: both encoders see the same half, drawn for each image."""
    found, seen = [], []

    def spy(encoder, images):
        seen.append(images)
        return encode_one_by_one(encoder, images)

    for forward in (VisionTransformer.forward, spy):
        monkeypatch.setattr(VisionTransformer, "forward", forward)
        torch.manual_seed(0)
        model = make_other(cls, **HALF).train()
        out = model(whole_batch(make_batch(4)))
        out.loss.backward()
        losses = {name: out[name] for name in out if name.startswith("loss")}
        found.append((losses, {name: p.grad for name, p in model.named_parameters()}))
    (losses, gradients), (plain, expected) = found
    assert losses.keys() == plain.keys() and all(loss.isfinite() for loss in losses.values())
    for name, loss in losses.items():
        torch.testing.assert_close(loss, plain[name], msg=name)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)
        assert gradient.abs().sum() > 0 or "bias" in name, name
    first, *others = (each.patches for each in seen)
    assert len(others) == hasattr(model, "momentum") and all(map(first.equal, others))
    assert first.shape[1] == 8 and len({(*row,) for row in first.tolist()}) > 1


@torch.no_grad()
@pytest.mark.parametrize("cls", MODELS)
def test_whole_images_leave_no_trace_of_it(make_other, make_batch, cls):
    """In evaluation, and in training after the steps that it lasts, to the last bit."""
    losses = []
    for changes in ({}, {"vit": {**HALF["vit"], "patch_dropout_steps": 8}}):
        model, samples = make_other(cls, **changes), whole_batch(make_batch(4))  # of step 8
        losses.append(torch.stack([model.train(mode)(samples).loss for mode in (False, True)]))
    assert torch.equal(*losses)


@pytest.mark.parametrize("score", ["match", "word", "similarity"])
@pytest.mark.parametrize("kind", ["soft", "hard", "random", "uniform"])
def test_masks_have_a_factor_for_each_visible_patch(make_model, make_batch, score, kind):
    mask = {"score": score, "kind": kind, "negatives": True}
    out = make_model(**HALF, soft_mask=mask, text={"mask_prob": 0.4}).train()(make_batch(6))
    assert out.keep.shape == (6, 1 + 8) and (out.keep[:, 0] == 1).all()
    assert out.keep.amin() < 1 and out.loss.isfinite()


def test_maps_of_a_model_in_training_lie_on_the_whole_grid(make_model, make_batch):
    model = make_model(**HALF).train()
    samples = make_batch(2)
    assert isinstance(model.visual_encoder.visible(samples["image"], Draws(0, 0)), Visible)
    for pair in explain(model, samples["image"], samples["text_input"]):
        assert pair.cams.shape[1:] == (4, 4)
