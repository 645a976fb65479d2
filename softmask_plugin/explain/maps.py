"""Where the words of captions look: the heat maps that training masks with, for whole batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softmask_plugin.nn.image_memory import ImageMemory
from softmask_plugin.nn.tokens import Packing, Tokens
from softmask_plugin.soft_mask import grad_cam, word_map
from softmask_plugin.tokenization import Captions

if TYPE_CHECKING:
    from softmask_plugin.models.aligned import AlignedBase


@dataclass(frozen=True)
class WordMaps:
    """Heat maps of the words of B captions, of which the longest has W words.

    Attributes:
        maps: Grad-CAM of the matching score for each word over the patch grid, (B, W, h, w),
            float32, >= 0; zeros where ``real`` is False.
        real: True where a caption has a word, (B, W).
        score: probability of a match, (B,), float32.
    """

    maps: Tensor
    real: Tensor
    score: Tensor


@dataclass(frozen=True)
class Pairs:
    """B images and a caption for each, encoded but not fused.

    Attributes:
        captions: the captions' tokens, on the CPU.
        text: their states.
        memory: keys and values of the images.
    """

    captions: Captions
    text: Tokens
    memory: ImageMemory

    @classmethod
    @torch.no_grad()
    def encode(cls, model: AlignedBase, images: Tensor, captions: list[str]) -> Pairs:
        """Encode as :func:`word_maps` says; no map needs the graph of what happens here."""
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images do not pair with {len(captions)} captions")
        read = model.reader.read(captions)
        packing = Packing.of(read.mask).to(model.device)
        text = model.bert.encode(read.ids.to(model.device), packing)
        return cls(read, text, model.bert.remember(model.visual_encoder(images.to(model.device))))


def word_maps(model: AlignedBase, images: Tensor, captions: list[str]) -> WordMaps:
    """Map every word of every caption in one forward pass, and a backward pass to the attention.

    Args:
        model: one with a matching head, in the mode that it is in: dropout blurs the maps.
        images: processed images, (B, 3, H, W).
        captions: processed captions, B of them.

    Returns:
        Maps and scores on the model's device, detached.

    Raises:
        ValueError: there are not as many images as captions.
    """
    return map_words(model, Pairs.encode(model, images, captions))


def map_words(model: AlignedBase, pairs: Pairs) -> WordMaps:
    """As :func:`word_maps`, for pairs that are encoded already."""
    with torch.enable_grad():
        fused, attention = model.bert.fuse_with_attention(
            pairs.text, pairs.memory, model.map_layer, pairs.text.packing.cls_only
        )
        logits = model.match(fused.cls)
        cam = grad_cam(logits[:, 1], attention)
    size, side = len(cam), model.visual_encoder.grid
    count = int(pairs.captions.words.max()) + 1
    word_ids = pairs.captions.words.to(cam.device)
    words = torch.arange(count, device=cam.device).expand(size, count)
    maps = torch.vmap(word_map, in_dims=(None, None, 1), out_dims=1)(cam, word_ids, words)
    return WordMaps(
        maps=maps.reshape(size, count, side, side),
        real=word_ids.amax(dim=1, keepdim=True) >= words,
        score=logits.detach().float().softmax(dim=-1)[:, 1],
    )


def phrase_maps(words: WordMaps) -> Tensor:
    """Mean map of each caption's words: (B, h, w), float32; zeros for a caption without words.

    ALBEF's evaluation on RefCOCO+ averages over tokens instead: there [CLS] and [SEP] count too,
    and a word counts once for each of its pieces.
    """
    count = words.real.sum(dim=1).clamp_min(1)
    return words.maps.sum(dim=1) / count[:, None, None]
