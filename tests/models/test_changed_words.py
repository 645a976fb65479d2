"""ITM with captions of which one word was changed (``itm_words``)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from toy_models import CAPTIONS, TWINS, matching_logits, record

from softmask_plugin.datasets.scenes.grammar import captions, make_scenes
from softmask_plugin.models import SoftMaskPretrain, SoftMaskRetrieval
from softmask_plugin.nn.sampling import Draws
from softmask_plugin.nn.tokens import Packing
from softmask_plugin.tokenization import Captions

MANY = [captions(scene)[0].text for scene in make_scenes("train", 32)]


@pytest.mark.parametrize("cls", [SoftMaskPretrain, SoftMaskRetrieval])
@pytest.mark.parametrize("size", [1, 2, 6])
def test_itm_is_the_mean_over_lavis_logits_of_all_pairs(albef, make_other, make_batch, cls, size):
    off = {key: value for key, value in albef.items() if key in cls.OPTIONS.__annotations__}
    model = make_other(cls, itm_words=True, **(albef if cls is SoftMaskPretrain else off)).eval()
    drawn = record(model, "change_words", "negatives")
    batch = {**make_batch(size), "image_id": torch.arange(size)}
    out, clean = model(batch), model.tokenize(CAPTIONS[:size])
    changed = replace(clean, ids=drawn["change_words"])
    exists = (changed.ids != clean.ids).any(dim=1)
    assert exists.any() == (size == 6) and not exists.all()

    twin = TWINS[cls](model).eval()
    states = twin.visual_encoder.forward_features(batch["image"])
    pairs = [(clean, states, 1, torch.ones_like(exists)), (changed, states, 0, exists)]
    if size > 1:
        image, other = drawn["negatives"]
        swapped = Captions(clean.ids[other], Packing.of(clean.mask[other]), clean.words[other])
        pairs += [(clean, states[image], 0, exists | True), (swapped, states, 0, exists | True)]
    losses = [
        cross_entropy(
            matching_logits(twin, tokens, seen), torch.full((size,), label), reduction="none"
        )[counts]
        for tokens, seen, label, counts in pairs
    ]
    torch.testing.assert_close(out.loss_itm, torch.cat(losses).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", [SoftMaskPretrain, SoftMaskRetrieval])
@pytest.mark.parametrize("negatives", [True, False])
def test_masked_images_meet_changed_captions_only_as_negatives(
    make_other, make_batch, monkeypatch, cls, negatives
):
    mask = {"enabled": True, "negatives": negatives}
    model = make_other(cls, itm_words=True, soft_mask=mask)
    seen = {}
    monkeypatch.setattr(
        model, "matching_losses", lambda fused, *_: seen.update(fused) or [None] * 2
    )
    monkeypatch.setattr(model, "output", lambda *_, **__: None)
    model({**make_batch(6), "image_id": torch.arange(6)})
    changed = {name for name in seen if name.endswith("negative words")}
    assert changed == {"negative words"} | ({"soft negative words"} if negatives else set())


@pytest.mark.parametrize("shared", [True, False])
def test_a_changed_caption_hides_what_mlm_hides(make_model, shared):
    model = make_model(itm_words=True, text={"shared": shared, "mask_prob": 0.4})
    mask_id = model.tokenizer.mask_token_id
    for step in range(10):
        text = model.tokenize_masked(MANY, Draws(7, step))
        seen = text.ids[: len(MANY)]
        assert (seen == mask_id).any() == shared
        assert torch.equal(text.changed == mask_id, seen == mask_id)
        assert (text.changed != seen).any(dim=1).float().mean() > 0.8


def test_only_seed_and_step_decide_the_change(make_model):
    model = make_model(itm_words=True, text={"shared": False})

    def changed(step):
        torch.rand(step)  # where the global stream stands is no matter
        return model.tokenize_masked(MANY, Draws(7, step)).changed.tolist()

    assert changed(3) == changed(3)
    assert len({str(changed(step)) for step in range(6)}) > 1
