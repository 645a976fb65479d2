"""Vision transformer with the state-dict keys of LAVIS's ``VisionTransformerEncoder``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask_plugin.nn.attention import attend
from softmask_plugin.nn.hybrid import HybridEmbed
from softmask_plugin.nn.recompute import recompute
from softmask_plugin.nn.sampling import Draws, draw_patches


def initial_std(width: int) -> float:
    """Standard deviation of initial weights: ViT's and BERT's 0.02 at their width of 768.

    A layer's gain is std * sqrt(width), so at 0.02 the branches of a narrow model pass on almost
    nothing, and it learns late.
    """
    return 0.02 * (768 / width) ** 0.5


@dataclass(frozen=True)
class Visible:
    """B images of which the encoder sees some patches only."""

    images: Tensor  # as ``shared`` returns them
    patches: Tensor  # indices of the patches that it sees of each, (B, K), int64

    def __len__(self) -> int:
        return len(self.images)


class VisionTransformer(nn.Module):
    """ViT that returns all tokens, [CLS] first (Dosovitskiy et al., arXiv 2010.11929).

    Args:
        image_size, patch_size: Sides in pixels; the second divides the first.
        width, depth, heads: Channels of a token, number of blocks, and their attention heads, which
            divide ``width``.
        mlp_ratio: Width of the MLP's inner layer over ``width``.
        backbone, backbone_layers, backbone_frozen: A network whose feature maps replace the pixels
            of the patches, see ``HybridEmbed``; None: patches are cut from the images.
        patch_dropout: Share of an image's patches that training steps leave out, see ``visible``.
        patch_dropout_steps: First steps that do so; None: all.
        drop_path: Stochastic-depth rate of the last block; grows linearly from 0 at the first.
        norm_eps: Epsilon of the layer norms.
        checkpointing: Recompute blocks in the backward pass to save memory.
    """

    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        backbone: str | None = None,
        backbone_layers: Sequence[int] = (3, 4),
        backbone_frozen: bool = True,
        patch_dropout: float = 0.0,
        patch_dropout_steps: int | None = None,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image size {image_size} is not a multiple of the patch {patch_size}")
        self.image_size, self.vision_width, self.checkpointing = image_size, width, checkpointing
        self.patch_dropout, self.patch_dropout_steps = patch_dropout, patch_dropout_steps
        self.grid = image_size // patch_size
        self.patch_embed: Any = (
            PatchEmbed(patch_size, width, self.grid**2)
            if backbone is None
            else HybridEmbed(backbone, backbone_layers, backbone_frozen, self.grid, width)
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, width))
        rates = (drop_path * i / max(depth - 1, 1) for i in range(depth))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, r, norm_eps) for r in rates)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        std = initial_std(width)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor | Visible) -> Tensor:
        """Encode images (B, 3, H, W), or what ``shared`` or ``visible`` made of them, into tokens
        (B, 1 + patches, width); ValueError if H or W is not ``image_size``, or if they are raw."""
        whole = images.images if isinstance(images, Visible) else images
        patches = self.patch_embed(self.shared(whole))
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        if isinstance(images, Visible):
            seen = F.pad(images.patches + 1, (1, 0))  # [CLS], then the patches
            x = x.gather(1, seen[:, :, None].expand(-1, -1, x.shape[2]))
        for block in self.blocks:
            x = recompute(block, x) if self.checkpointing and self.training else block(x)
        return self.norm(x)

    def shared(self, images: Tensor) -> Tensor:
        """What this encoder and its momentum copy compute alike from images (B, 3, H, W): a frozen
        backbone's features, (B, patches, channels); without one, the images themselves."""
        if isinstance(self.patch_embed, HybridEmbed) and images.shape[1:-1] == (self.grid**2,):
            return images  # is features
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images are {tuple(images.shape)} of {images.dtype}: give processed ones, "
                "(B, 3, H, W) of floats; image[None] makes a batch of one"
            )
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images are {images.shape[-2]}x{images.shape[-1]} but the model is for "
                f"{self.image_size}x{self.image_size}: set image_size of model and processors alike"
            )
        return self.patch_embed.shared(images.to(self.cls_token.dtype))

    def visible(self, images: Tensor, draws: Draws) -> Tensor | Visible:
        """What this encoder and its momentum copy see of images in a step: in training with patch
        dropout, [CLS] and some patches, drawn for each image (FLIP, arXiv 2212.00794); else all.

        Both see the same patches, as ALBEF gives both the same image: a teacher that saw others
        would ask for what the student cannot see.
        """
        shared, steps = self.shared(images), self.patch_dropout_steps
        if not self.training or not self.patch_dropout:
            return shared
        if steps is not None and draws.step >= steps:
            return shared
        stream = draws.stream("patch dropout", shared.device)
        return Visible(shared, draw_patches(len(images), self.grid**2, self.patch_dropout, stream))


class PatchEmbed(nn.Module):
    """Cut images into patches and project each patch."""

    def __init__(self, patch_size: int, width: int, num_patches: int) -> None:
        super().__init__()
        self.num_patches = num_patches  # LAVIS's interpolate_pos_embed needs it
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, patches, width)."""
        return self.proj(images).flatten(2).transpose(1, 2)

    def shared(self, images: Tensor) -> Tensor:
        """What momentum copies share: nothing but the images."""
        return images


class Block(nn.Module):
    """Pre-norm transformer block with stochastic depth."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, drop_path: float, eps: float
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens (B, N, width)."""
        x = x + self.skip(self.attn(x, self.norm1))
        return x + self.skip(self.mlp(x, self.norm2))

    def skip(self, branch: Tensor) -> Tensor:
        """Drop a branch for some samples, and scale it for the others to keep the mean."""
        if not self.training or self.drop_path == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * kept / (1 - self.drop_path)


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Normalise tokens (B, N, width), then let them attend to each other."""
        qkv = recompute(lambda x: self.qkv(norm(x)), x, draws=False)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two-layer perceptron with GELU."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner_width)
        self.fc2 = nn.Linear(inner_width, width)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Normalise and transform each token of (B, N, width)."""
        inner = recompute(lambda x: self.fc1(norm(x)), x, draws=False)
        return recompute(lambda inner: self.fc2(F.gelu(inner)), inner, draws=False)
