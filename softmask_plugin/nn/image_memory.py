"""The image side of cross-attention: keys and values, projected once per image and layer.

In a cross-attention layer, K and V depend on the image alone, so positives, hard negatives, masked
pairs and MLM share them. Two exact identities make this work:

- Another image for a pair is another row index into K and V.
- A soft mask m (one scalar per image token) commutes with the projection W, whose bias is b. So
  masked features need no projection and no keys or values of their own: their scores are
  ``s' = m s + (1 - m) q b_k``, and attention with probabilities p gives
  ``(p m) V + sum(p (1 - m)) b_v``. Captions are short, so this costs less than a copy of K and V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softmask_plugin.nn.attention import attend
from softmask_plugin.nn.dropout import drop
from softmask_plugin.nn.recompute import recompute


@dataclass(frozen=True)
class View:
    """Which image each of n captions attends to, and through which mask."""

    images: Tensor | None = None  # index of each caption's image, (n,); None: i sees i
    keep: Tensor | None = None  # factor for each image token, (n, S), in [0, 1]; None: all ones
    captions_per_image: int = 1  # how many captions in a row share one image


@dataclass(frozen=True)
class LayerMemory:
    """One cross-attention layer's keys and values, (B, H, S, d), and its biases, (H, d, 1) and
    (H, 1, d); ``mask``, (B, 1, 1, S), is True for the keys that count (None: all)."""

    key: Tensor
    value: Tensor
    key_bias: Tensor
    value_bias: Tensor
    mask: Tensor | None = None

    def attend(self, query: Tensor, views: Sequence[View], dropout: float) -> Tensor:
        """Attend with queries (N, H, T, d), split over ``views`` in turn; returns (N, H, T, d)."""
        outputs, start = [], 0
        for view in views:
            n = view.captions_per_image
            size = n * len(self.key if view.images is None else view.images)
            # Captions of one image become one long query: (images, H, n T, d)
            rows = query[start : start + size].unflatten(0, (-1, n)).transpose(1, 2).flatten(2, 3)
            start += size
            if view.images is None:
                out = self.attend_view(rows, view, dropout)
            else:  # a copy of K and V per layer is too much to keep for the backward pass
                out = recompute(self.attend_view, rows, view, dropout, draws=dropout > 0)
            outputs.append(out.unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1))
        if start != len(query):
            raise ValueError(f"views cover {start} captions of {len(query)}")
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def attend_view(self, query: Tensor, view: View, dropout: float) -> Tensor:
        """Attend with queries (n, H, T, d) through one view."""
        if view.keep is not None:
            return self.attend_with_probabilities(query, view, dropout)[0]
        key, value, mask = self.of(view.images)
        return attend(query, key, value, mask, dropout)

    def of(self, images: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Key, value and mask of each of these images; None: of each image once."""
        if images is None:
            return self.key, self.value, self.mask
        mask = None if self.mask is None else self.mask[images]
        return self.key[images], self.value[images], mask

    def attend_with_probabilities(
        self, query: Tensor, view: View, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """As ``attend_view``, with the probabilities (n, H, T, keys) before dropout."""
        key, value, mask = self.of(view.images)
        query = query * query.shape[-1] ** -0.5
        scores = query @ key.transpose(-2, -1)
        keep = view.keep
        if keep is not None:
            # [CLS] comes first, and may have no key
            keep = keep[:, None, None, -key.shape[2] :].to(scores.dtype)
            # lerp(a, b, m) = a + m (b - a)
            scores = torch.lerp((query @ self.key_bias).expand_as(scores), scores, keep)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        probabilities = scores.softmax(dim=-1)
        if torch.is_grad_enabled() and not probabilities.requires_grad:  # all encoders are frozen
            probabilities.requires_grad_()
        weights = drop(probabilities, dropout)
        if keep is None:
            return weights @ value, probabilities
        masked = (weights * (1 - keep)).sum(dim=-1, keepdim=True)
        return (weights * keep) @ value + masked * self.value_bias, probabilities


ImageMemory = list[LayerMemory]  # one for each fusion layer
