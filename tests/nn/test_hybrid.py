"""Patches from a backbone's feature maps, against timm's own model with the same weights."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

from softmask_plugin.errors import UserError
from softmask_plugin.nn.hybrid import HybridEmbed
from softmask_plugin.nn.momentum import MomentumPairs, momentum_copy
from softmask_plugin.nn.vision import VisionTransformer

NAME = "tf_efficientnet_lite0"


def vit(**changes):
    torch.manual_seed(0)
    options = {"image_size": 64, "width": 24, "depth": 1, "heads": 2, "backbone": NAME}
    return VisionTransformer(**{**options, **changes})


def images(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("name", [NAME, "resnet18"])
@pytest.mark.parametrize("frozen", [True, False])
def test_features_are_timms_maps_on_the_grid_of_patches(name, frozen):
    embed = vit(backbone=name, backbone_layers=[2, 3, 4], backbone_frozen=frozen).patch_embed
    twin = timm.create_model(name, features_only=True, out_indices=(2, 3, 4)).eval()
    twin.load_state_dict(embed.backbone.state_dict())
    maps = twin(images())
    assert [each.shape[-1] for each in maps] == [8, 4, 2]  # strides of 8, 16 and 32
    features = embed.features(images()).unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    finest, fitting, coarse = features.split([each.shape[1] for each in maps], dim=1)
    torch.testing.assert_close(fitting, maps[1])
    torch.testing.assert_close(finest, F.avg_pool2d(maps[0], 2))
    centre = maps[2].mean(dim=(2, 3))  # of the four cells, which the interpolation keeps
    torch.testing.assert_close(coarse.mean(dim=(2, 3)), centre)
    torch.testing.assert_close(coarse[..., 0, 0], maps[2][..., 0, 0])


@pytest.mark.parametrize("frozen", [True, False])
def test_training_leaves_norms_and_a_frozen_backbone_as_they_are(frozen):
    model = vit(backbone_frozen=frozen).train()
    names = {name for name, _ in model.named_parameters() if "backbone" in name}
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert bool(names) is not frozen and "patch_embed.backbone.bn1.running_mean" in before
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images()).square().sum().backward()
    optimizer.step()
    changed = {key for key, tensor in model.state_dict().items() if not tensor.equal(before[key])}
    assert changed >= names and not any("running" in key or "batches" in key for key in changed)
    assert {key for key in changed if "backbone" in key} == names
    assert "patch_embed.proj.weight" in changed


def test_a_momentum_copy_shares_a_frozen_backbone_and_averages_the_rest():
    online = vit().eval()
    momentum = momentum_copy(online)
    assert momentum.patch_embed.backbone is online.patch_embed.backbone
    assert momentum.patch_embed.proj is not online.patch_embed.proj
    assert momentum.state_dict().keys() == online.state_dict().keys()
    with torch.no_grad():
        online.patch_embed.proj.weight.add_(1)
    pairs = MomentumPairs([(online, momentum)])
    before = momentum.patch_embed.proj.weight.clone()
    pairs.update(0.5)
    torch.testing.assert_close(momentum.patch_embed.proj.weight, before + 0.5)


def test_a_momentum_copy_has_a_backbone_of_its_own_if_it_trains():
    online = vit(backbone_frozen=False)
    momentum = momentum_copy(online)
    assert momentum.patch_embed.backbone is not online.patch_embed.backbone
    with torch.no_grad():
        online.patch_embed.backbone.bn1.running_mean.fill_(3)
    MomentumPairs([(online, momentum)]).restart()
    assert momentum.patch_embed.backbone.bn1.running_mean[0] == 3


@torch.no_grad()
def test_features_computed_once_serve_both_encoders():
    model = vit().eval()
    features = model.shared(images())
    assert features.shape == (2, 16, 112 + 320)
    torch.testing.assert_close(model(features), model(images()))
    assert model.shared(features) is features
    plain, training = vit(backbone=None), vit(backbone_frozen=False)
    for each in (plain, training):
        x = images()
        assert each.shared(x) is x


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="images are 32x32 but the model is for 64x64"):
        vit()(images(32))


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("tf_efficientnet_lit", [3], "model.vit.backbone is .* did you mean 'tf_efficientnet_l"),
        ("resnet18", [3, 9], r"no feature maps \[3, 9\] of resnet18"),
        ("vit_tiny_patch16_224", [3, 9], "no feature maps .* of vit_tiny_patch16_224"),
    ],
)
def test_what_timm_has_not_gets_one_line(name, layers, message):
    with pytest.raises(UserError, match=message) as caught:
        HybridEmbed(name, layers, frozen=True, grid=4, width=24)
    assert "\n" not in str(caught.value)
