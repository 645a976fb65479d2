"""Small models: their options, captions for them, and LAVIS's ways to the same numbers."""

from __future__ import annotations

import torch
from transformers import BertForMaskedLM

from benchmarks import baseline
from softmask_plugin import models
from softmask_plugin.models.base import bert_of

SMALL = {
    "tokenizer": "scenes",
    "image_size": 32,
    "vit": {"patch_size": 8, "width": 48, "depth": 2, "heads": 3},
    "bert": {
        "vocab_size": None,
        "width": 32,
        "layers": 5,
        "heads": 4,
        "intermediate": 64,
        "fusion_layer": 2,
        "max_positions": 40,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "embed_dim": 16,
    "queue_size": 24,
}
CAPTIONS = [
    "a small red circle above a large blue star",
    "a green square",
    "a picture of a yellow triangle to the left of a small purple ring and a cross",
    "there is a large blue star below a red circle",
    "a black heart",
    "a small green square to the right of a yellow triangle",
]
LOSSES = ("loss", "loss_itc", "loss_itm", "loss_mlm", "loss_lm")
BLIP = [models.SoftMaskBlipRetrieval, models.SoftMaskBlipPretrain]
TWINS = {
    models.SoftMaskPretrain: baseline.albef_pretrain,
    models.SoftMaskRetrieval: baseline.albef_retrieval,
    models.SoftMaskBlipRetrieval: baseline.blip_retrieval,
    models.SoftMaskBlipPretrain: baseline.blip_pretrain,
}
TRAINED = [
    models.SoftMaskPretrain,
    models.SoftMaskRetrieval,
    models.SoftMaskClassification,
    models.SoftMaskNlvr,
    models.SoftMaskNlvrPretrain,
    models.SoftMaskVqa,
]
EVERY_MODEL = [*TRAINED, models.SoftMaskFeatureExtractor, models.SoftMaskImageTextMatching]


def record(owner, *names):
    """Keep what these methods return from now on, and what they are given, by name."""
    seen = {}

    def watch(name, method):
        def call(*args, **options):
            seen["given", name] = args
            seen[name] = method(*args, **options)
            return seen[name]

        setattr(owner, name, call)

    for name in names:
        watch(name, getattr(owner, name))
    return seen


def whole_batch(samples):
    """Four pairs of images and texts, with all that any model reads."""
    images, labels = samples["image"], torch.tensor([0, 1, 0, 1])
    samples |= {"image0": images, "image1": images.flip(0)}
    samples |= {"image_id": torch.arange(4), "label": labels}
    return samples | {"answer": CAPTIONS[:4], "n_answers": [1] * 4, "weight": torch.ones(4)}


def plain_bert(shape) -> BertForMaskedLM:
    """A BERT without cross-attention, of the shape of a model's text encoder."""
    config = baseline.bert_config(shape)
    config.add_cross_attention = False
    return BertForMaskedLM(config)


def matching_logits(twin, tokens, image_states) -> torch.Tensor:
    """What LAVIS's ALBEF says of captions and images, by forward passes of its own."""
    mask, bert = tokens.mask.long(), bert_of(twin.text_encoder)
    text = bert(tokens.ids, attention_mask=mask, return_dict=True, mode="text")
    fused = bert(
        encoder_embeds=text.last_hidden_state,
        attention_mask=mask,
        encoder_hidden_states=image_states,
        encoder_attention_mask=torch.ones(image_states.shape[:2], dtype=torch.long),
        return_dict=True,
        mode="fusion",
    )
    return twin.itm_head(fused.last_hidden_state[:, 0])


def assert_same_state(ours, theirs):
    """Equal keys and, but for rounding, tensors."""
    state = ours.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def assert_same_gradients(ours, theirs):
    gradients = {n: p.grad for n, p in theirs.named_parameters(remove_duplicate=False)}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_step(ours, theirs, batch):
    """Equal losses, gradients and, after the momentum model's update, state."""
    for model in (ours, theirs):
        model.train().zero_grad()
    expected, got = theirs(dict(batch)), ours(dict(batch))
    told = [name for name in LOSSES if name in expected]
    assert {name for name in got if name.startswith("loss")} == {*told}
    for name in told:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)
    expected["loss"].backward()
    got["loss"].backward()
    assert_same_gradients(ours, theirs)
    assert_same_state(ours, theirs)
