"""Patch dropout of the image encoder, against transformers' MAE, which leaves patches out too."""

from __future__ import annotations

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEModel

from softmask_plugin.nn.sampling import Draws, draw_patches
from softmask_plugin.nn.vision import Visible, VisionTransformer

PATCHES = 16


def vit(**changes):
    torch.manual_seed(0)
    options = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 3}
    model = VisionTransformer(**{**options, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def images(count=3, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def mae(ours, dropout):
    """transformers' MAE encoder with the same weights."""
    config = ViTMAEConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-6,
        mask_ratio=dropout,
    )
    twin, state = ViTMAEModel(config), ours.state_dict()
    names = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "norm.": "layernorm.",
        "blocks.": "encoder.layer.",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    theirs = {}
    for key, tensor in state.items():
        name = key
        for own, other in names.items():
            name = name.replace(own, other)
        if "attn.qkv" in name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                theirs[name.replace("attn.qkv", f"attention.attention.{part}")] = piece
        else:
            theirs[name] = tensor
    twin.load_state_dict(theirs)
    return twin.requires_grad_().train()  # MAE's position embeddings are fixed


@pytest.mark.parametrize("dropout", [0.5, 0.75])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_visible_patches_equal_maes_forward_and_backward(dropout, checkpointing):
    ours = vit(checkpointing=checkpointing).train()
    theirs, noise = mae(ours, dropout), torch.rand(3, PATCHES)
    kept = noise.argsort(dim=1)[:, : int((1 - dropout) * PATCHES)]
    got = ours(Visible(images(), kept))
    expected = theirs(images(), noise=noise).last_hidden_state
    assert got.shape == (3, 1 + kept.shape[1], 24)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    embeddings, layer = theirs.embeddings, theirs.encoder.layer[0]
    for own, other in (
        (ours.cls_token, embeddings.cls_token),
        (ours.pos_embed, embeddings.position_embeddings),
        (ours.patch_embed.proj.weight, embeddings.patch_embeddings.projection.weight),
        (ours.blocks[0].mlp.fc1.weight, layer.intermediate.dense.weight),
    ):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_all_patches_in_another_order_are_the_whole_image():
    model = vit().eval()
    order = torch.rand(3, PATCHES).argsort(dim=1)
    tokens, whole = model(Visible(images(), order)), model(images())
    torch.testing.assert_close(tokens[:, 0], whole[:, 0])
    torch.testing.assert_close(tokens[:, 1:], whole[torch.arange(3)[:, None], 1 + order])


@torch.no_grad()
def test_a_frozen_backbone_sees_the_whole_image():
    model = vit(image_size=64, patch_size=16, backbone="tf_efficientnet_lite0").eval()
    features, kept = model.shared(images(2, 64)), torch.tensor([[3, 0, 9], [15, 7, 1]])
    tokens = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(features)], dim=1)
    tokens = (tokens + model.pos_embed)[torch.arange(2)[:, None], [[0, 4, 1, 10], [0, 16, 8, 2]]]
    for block in model.blocks:
        tokens = block(tokens)
    for each in (features, images(2, 64)):
        torch.testing.assert_close(model(Visible(each, kept)), model.norm(tokens))


@pytest.mark.parametrize(
    ("patches", "dropout", "kept"), [(256, 0.5, 128), (49, 0.25, 37), (9, 0.1, 8), (4, 0.99, 1)]
)
def test_every_image_keeps_as_many_patches(patches, dropout, kept):
    drawn = draw_patches(7, patches, dropout, torch.Generator().manual_seed(0))
    assert drawn.shape == (7, kept) and drawn.min() >= 0 and drawn.max() < patches
    assert all(len(set(row)) == kept for row in drawn.tolist())


def test_any_patch_is_as_likely_as_any_other_in_each_image():
    drawn = draw_patches(4000, PATCHES, 0.5, torch.Generator().manual_seed(0))
    kept = torch.zeros(4000, PATCHES).scatter_(1, drawn, 1)
    torch.testing.assert_close(kept.mean(dim=0), torch.full((PATCHES,), 0.5), atol=0.03, rtol=0)
    # Two patches together: 8/16 * 7/15 of the time
    pairs = (kept.T @ kept / 4000)[~torch.eye(PATCHES, dtype=torch.bool)]
    torch.testing.assert_close(pairs, torch.full_like(pairs, 7 / 30), atol=0.03, rtol=0)
    assert len(kept.unique(dim=0)) > 3000


def test_patches_are_left_out_in_the_first_steps_of_training_alone():
    model, draws = vit(patch_dropout=0.5, patch_dropout_steps=3), [Draws(1, i) for i in range(5)]
    x = images()
    seen = [model.train().visible(x, each) for each in draws]
    assert all(isinstance(each, Visible) and each.images is x for each in seen[:3])
    assert seen[3] is seen[4] is model.eval().visible(x, draws[0]) is x
    assert vit().train().visible(x, draws[0]) is x
    assert vit(patch_dropout=0.5).train().visible(x, Draws(1, 10**6)).patches.shape == (3, 8)
    state = torch.get_rng_state()
    again = model.train().visible(x, Draws(1, 0))
    assert torch.equal(again.patches, seen[0].patches)
    assert torch.equal(torch.get_rng_state(), state)
    for other in (seen[1], model.visible(x, Draws(2, 0))):  # of another step, of another rank
        assert not torch.equal(other.patches, seen[0].patches)
