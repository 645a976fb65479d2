"""The image side of cross-attention: keys and values, projected once per image and layer.

In a cross-attention layer K and V depend on the image alone, so positives, hard negatives, the soft
mask and MLM all read the same ones. Two exact identities make that enough:

- another image for a pair is a row index into K and V;
- a soft mask m (one scalar per image token) commutes with the projection W, whose bias is b. So
  masked features need no projection, nor keys and values, of their own: their scores are
  ``s' = m s + (1 - m) q b_k``, and what is read with probabilities p is
  ``(p m) V + sum(p (1 - m)) b_v``. Captions being short, these cost less than a copy of K and V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from softmask_plugin.nn.recompute import recompute


@dataclass(frozen=True)
class View:
    """Which image each of a run of captions looks at, and through which mask.

    Attributes:
        images: row of the image batch for each caption, (n,), int64; None: caption i sees image i.
        keep: factor for each image token, (n, S), in [0, 1]; None: all ones.
        captions_per_image: the captions come in runs of this length that share one image.
    """

    images: Tensor | None = None
    keep: Tensor | None = None
    captions_per_image: int = 1


@dataclass(frozen=True)
class LayerMemory:
    """Keys and values of one cross-attention layer, (B, H, S, d), and its biases, (H, d, 1) and
    (H, 1, d); ``mask``, (B, S), is True for those that count (None: all)."""

    key: Tensor
    value: Tensor
    key_bias: Tensor
    value_bias: Tensor
    mask: Tensor | None = None

    def attend(self, query: Tensor, views: Sequence[View], dropout: float) -> Tensor:
        """Attention of queries (N, H, T, d), split over ``views`` in turn; returns (N, H, T, d)."""
        outputs, start = [], 0
        for view in views:
            n = view.captions_per_image
            size = n * len(self.key if view.images is None else view.images)
            # Captions of one image become one long query: (images, H, n T, d)
            rows = query[start : start + size].unflatten(0, (-1, n)).transpose(1, 2).flatten(2, 3)
            start += size
            if view.images is None:
                out = self.read(rows, view, dropout)
            else:  # a copy of others' K and V in each layer is too much to keep for the backward
                out = recompute(self.read, rows, view, dropout)
            outputs.append(out.unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1))
        if start != len(query):
            raise ValueError(f"views cover {start} captions of {len(query)}")
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def read(self, query: Tensor, view: View, dropout: float) -> Tensor:
        """Attention of queries (n, H, T, d) through one view, fused where torch can."""
        # On a CPU torch's fused attention has no dropout; its fallback would copy K to scale it.
        if view.keep is not None or (dropout > 0 and query.device.type == "cpu"):
            return self.read_with_probabilities(query, view, dropout)[0]
        key, value = self.seen_through(view)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.visible(view), dropout_p=dropout
        )

    def seen_through(self, view: View) -> tuple[Tensor, Tensor]:
        """Keys and values, (n, H, S, d), of the images of ``view``, not masked."""
        if view.images is None:
            return self.key, self.value
        return self.key[view.images], self.value[view.images]

    def visible(self, view: View) -> Tensor | None:
        """Which keys count for each image of ``view``, (n, 1, 1, S); None: all."""
        if self.mask is None:
            return None
        mask = self.mask if view.images is None else self.mask[view.images]
        return mask[:, None, None, :]

    def read_with_probabilities(
        self, query: Tensor, view: View, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """As ``read``, with the probabilities (N, H, T, S) from before dropout."""
        key, value = self.seen_through(view)
        query = query * query.shape[-1] ** -0.5
        scores = query @ key.transpose(-2, -1)
        keep = None if view.keep is None else view.keep[:, None, None, :].to(scores.dtype)
        if keep is not None:
            # lerp(a, b, m) = a + m (b - a)
            scores = torch.lerp((query @ self.key_bias).expand_as(scores), scores, keep)
        if (visible := self.visible(view)) is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        probabilities = scores.softmax(dim=-1)
        if torch.is_grad_enabled() and not probabilities.requires_grad:  # every encoder is frozen
            probabilities.requires_grad_()
        read = F.dropout(probabilities, dropout, dropout > 0)
        if keep is None:
            return read @ value, probabilities
        hidden = (read * (1 - keep)).sum(dim=-1, keepdim=True)
        return (read * keep) @ value + hidden * self.value_bias, probabilities
