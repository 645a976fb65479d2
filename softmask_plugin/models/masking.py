"""How a training step draws its soft mask: whose map, of which word (see ``soft_mask``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from softmask_plugin.models.aligned import AlignedBase, Features
from softmask_plugin.nn.image_memory import ImageMemory, View
from softmask_plugin.nn.pairs import Pairs
from softmask_plugin.nn.sampling import Draws
from softmask_plugin.nn.tokens import Packing
from softmask_plugin.soft_mask import (
    grad_cam,
    keep_factors,
    mask_effect,
    normalize,
    pick_words,
    word_map,
    word_score,
)


class SoftMask(NamedTuple):
    """The factor of each image token, (B, S), and the index of each caption's picked word, (B,),
    -1 if it has no word to pick. Both None while the mask is off."""

    keep: Tensor | None = None
    word: Tensor | None = None


class SoftMaskedBase(AlignedBase):
    """Models that mask images in training by what a word of the caption sees in them."""

    def masks_at(self, step: int) -> bool:
        """Whether the soft mask is on at a step."""
        return self.options.soft_mask.enabled and step >= self.options.soft_mask.start_iter

    def draw_mask(
        self,
        pairs: Pairs,
        online: Features,
        words: Tensor,
        scored: Packing,
        memory: ImageMemory,
        draws: Draws,
    ) -> SoftMask:
        """Mask what ``soft_mask.score`` says of a word that the caption shows: its similarity, or
        what it means to the match, whose pass goes into ``pairs``.

        Args:
            online: B images and captions.
            words: Word index per token, (B, T); -1 where the soft mask may not pick.
            scored: The tokens of a positive pair that the losses need.
        """
        option = self.options.soft_mask
        if option.score == "similarity":
            cam = self.similarity_maps(online.image, online.words)
        else:
            with torch.enable_grad():  # the map is a gradient, under no_grad as well
                fused, attention = self.bert.fuse_with_attention(
                    online.text, memory, option.layer, scored
                )
                cam = grad_cam(self.match(fused.cls)[:, 1], attention, self.bert.first_patch)
            pairs.fused["positive"] = fused
        word = pick_words(cam, words, option.words, draws.stream("word", words.device))
        return self.mask_of(word_map(cam, words, word), word, draws)

    def draw_word_mask(
        self,
        predict: Callable[[View], Tensor],
        image: Tensor,
        words: Tensor,
        predicted: Tensor,
        targets: Tensor,
        draws: Draws,
    ) -> tuple[Tensor, SoftMask]:
        """Mask what a word of each caption means to its own prediction.

        Args:
            predict: Vocabulary logits of M tokens, (M, vocabulary), from a view of B images.
            image: Image states, (B, S, width).
            words: Word index per token, (B, T); -1 where the soft mask may not pick.
            predicted: Flat positions of the M tokens in (B, T), int64.
            targets: Their ids, (M,).

        Returns:
            The logits, and the soft mask.
        """
        choice = self.options.soft_mask.words
        word = pick_words(None, words, choice, draws.stream("word", words.device))
        picked = (words == word[:, None]) & (words >= 0)
        with torch.enable_grad():  # the map is a gradient, under no_grad as well
            keep = torch.ones(image.shape[:2], device=words.device, requires_grad=True)
            logits = predict(View(keep=keep))
            score = picked.flatten()[predicted] * word_score(logits, targets)
            maps = mask_effect(score, keep)
        return logits, self.mask_of(maps, word, draws)

    def mask_of(self, maps: Tensor, word: Tensor, draws: Draws) -> SoftMask:
        """The soft mask from the map of each picked word, (B, P)."""
        option, patches = self.options.soft_mask, draws.stream("patches", maps.device)
        return SoftMask(keep_factors(normalize(maps), option.kind, option.strength, patches), word)
