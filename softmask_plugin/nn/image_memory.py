"""The image side of cross-attention: keys and values, projected once per image and layer.

In a cross-attention layer K and V depend on the image alone, so positives, hard negatives, the soft
mask and MLM all read the same ones. Two exact identities make that enough:

- another image for a pair is a row index into K and V;
- a soft mask m (one scalar per image token) commutes with the projection,
  ``W (m v) + b = m (W v + b - b) + b``, so masked features need no second projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Keys and values of one cross-attention layer, (B, H, S, d), and its biases, (H, 1, d)."""

    key: Tensor
    value: Tensor
    key_bias: Tensor
    value_bias: Tensor

    def seen_through(self, view: View) -> tuple[Tensor, Tensor]:
        """Keys and values, (n, H, S, d), as the captions of ``view`` see them."""
        key, value = self.key, self.value
        if view.images is not None:
            key, value = key[view.images], value[view.images]
        if view.keep is not None:
            keep = view.keep[:, None, :, None].to(key.dtype)
            # lerp(b, x, m) = b + m (x - b): the masked features' projection
            key = torch.lerp(self.key_bias.to(key.dtype).expand_as(key), key, keep)
            value = torch.lerp(self.value_bias.to(key.dtype).expand_as(value), value, keep)
        return key, value

    def attend(self, query: Tensor, views: Sequence[View], dropout: float) -> Tensor:
        """Attention of queries (N, H, T, d), split over ``views`` in turn; returns (N, H, T, d)."""
        outputs, start = [], 0
        for view in views:
            key, value = self.seen_through(view)
            n = view.captions_per_image
            rows = query[start : start + n * len(key)]
            start += n * len(key)
            # Captions of one image become one long query: (images, H, n T, d)
            grouped = rows.unflatten(0, (-1, n)).transpose(1, 2).flatten(2, 3)
            out = F.scaled_dot_product_attention(grouped, key, value, dropout_p=dropout)
            outputs.append(out.unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1))
        if start != len(query):
            raise ValueError(f"views cover {start} captions of {len(query)}")
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def attend_with_probabilities(
        self, query: Tensor, view: View, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """As ``attend`` for one view, with the probabilities (N, H, T, S) from before dropout."""
        key, value = self.seen_through(view)
        probabilities = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)
        if torch.is_grad_enabled() and not probabilities.requires_grad:  # every encoder is frozen
            probabilities.requires_grad_()
        return F.dropout(probabilities, dropout, dropout > 0) @ value, probabilities
