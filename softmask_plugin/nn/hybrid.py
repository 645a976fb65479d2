"""Patches from the feature maps of another network: a hybrid ViT (Dosovitskiy et al., arXiv
2010.11929, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask_plugin.errors import UserError, reason_of, suggest
from softmask_plugin.nn.momentum import freeze, is_frozen


class HybridEmbed(nn.Module):
    """Join feature maps of a backbone on the grid of patches, and project each patch.

    The backbone's norms keep their statistics, frozen or not, so batches do not change it.

    Args:
        backbone: Name of a timm model with ``features_only``, such as ``resnet50``.
        layers: Which of its feature maps to join: timm's ``out_indices``.
        frozen: Whether the backbone stays as it is. Momentum copies then share it.
        grid: Patches along a side of the image. Maps of another size are interpolated.
        width: Channels of a token.

    Raises:
        UserError: timm has no such model or map.
    """

    def __init__(
        self, backbone: str, layers: Sequence[int], frozen: bool, grid: int, width: int
    ) -> None:
        super().__init__()
        self.grid = grid
        self.num_patches = grid**2  # LAVIS's interpolate_pos_embed needs it
        self.backbone_name, self.backbone = backbone, build_backbone(backbone, layers)
        if frozen:
            freeze(self.backbone)
        channels = sum(self.backbone.feature_info.channels())
        self.norm = nn.LayerNorm(channels)  # maps differ in scale, and dwarf position embeddings
        self.proj = nn.Linear(channels, width)
        self.train()

    def train(self, mode: bool = True) -> HybridEmbed:
        """Set the mode, except for the backbone's."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) or their features (B, patches, channels) -> (B, patches, width)."""
        features = images if images.ndim == 3 else self.features(images)
        return self.proj(self.norm(features))

    def features(self, images: Tensor) -> Tensor:
        """The backbone's features of each patch: (B, 3, H, W) -> (B, patches, channels)."""
        # On a CPU, this layout halves the time of convolutions
        maps = self.backbone(images.contiguous(memory_format=torch.channels_last))
        maps = [F.interpolate(each, (self.grid, self.grid), mode="bilinear") for each in maps]
        return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)

    def shared(self, images: Tensor) -> Tensor:
        """What momentum copies share: the features of images if the backbone is frozen."""
        return self.features(images) if is_frozen(self.backbone) else images


def build_backbone(name: str, layers: Sequence[int]) -> Any:
    """Build a timm model that returns feature maps, with random weights; UserError if it cannot."""
    import timm  # not at the top: it needs torchvision, and this package otherwise torch alone

    if not timm.is_model(name):
        raise UserError(f"model.vit.backbone is '{name}': {suggest(name, timm.list_models())}")
    try:
        return timm.create_model(name, features_only=True, out_indices=tuple(layers))
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise UserError(
            f"timm gives no feature maps {list(layers)} of {name} ({reason_of(error)}): set "
            "model.vit.backbone_layers to indices of its maps, 0 to 4 for most, or choose a "
            "convolutional model.vit.backbone"
        ) from error
