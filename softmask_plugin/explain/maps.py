"""Heat maps of the words of captions, as the soft mask trains with, for whole batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softmask_plugin.nn.image_memory import ImageMemory, View
from softmask_plugin.nn.tokens import Packing, Tokens
from softmask_plugin.soft_mask import grad_cam, mask_effect, word_map, word_score
from softmask_plugin.tokenization import Captions, as_list

if TYPE_CHECKING:
    from softmask_plugin.models.aligned import AlignedBase

Phrases = Sequence[tuple[int, Sequence[int]]]  # of each: its caption's index, its words' numbers


@dataclass(frozen=True)
class WordMaps:
    """Heat maps of the words of B captions, the longest of which has W words.

    Attributes:
        maps: Map of each word over the patch grid, (B, W, h, w), float32, >= 0; zeros where
            ``real`` is False.
        real: True where a caption has a word that was mapped, (B, W).
        score: Probability of a match, (B,), float32.
        text, memory: The captions' states, and the images' keys and values, to match the pairs
            again through masks.
    """

    maps: Tensor
    real: Tensor
    score: Tensor
    text: Tokens
    memory: ImageMemory


def word_maps(
    model: AlignedBase,
    images: Tensor,
    captions: Sequence[str],
    owners: Tensor | None = None,
    phrases: Phrases | None = None,
) -> WordMaps:
    """Map every word of every caption, as the model's ``map_score`` says: what it means to the
    match, or what the image means to its own prediction once it is hidden.

    Args:
        model: A model with a matching head. Its mode is kept, and dropout would blur the maps.
        images: Processed images, (N, 3, H, W), each encoded once.
        captions: B processed captions.
        owners: Index of each caption's image, (B,), int64; None: caption i has image i.
        phrases: The words to map; others count as missing. None: all.

    Returns:
        Maps and scores on the model's device, detached.

    Raises:
        ValueError: Images or, if given, ``owners`` do not pair with captions.
    """
    captions = as_list(captions)
    if (count := len(images if owners is None else owners)) != len(captions):
        raise ValueError(f"{count} images do not pair with {len(captions)} captions")
    with torch.no_grad():  # no map needs the graph of the encoders
        tokenized = model.tokenize(captions)
        text = model.bert.encode(tokenized.ids, tokenized.packing)
        memory = model.bert.remember(model.visual_encoder(images.to(model.device)))
    return map_words(model, memory, tokenized, text, owners, phrases)


def map_words(
    model: AlignedBase,
    memory: ImageMemory,
    captions: Captions,
    text: Tokens,
    owners: Tensor | None = None,
    phrases: Phrases | None = None,
) -> WordMaps:
    """As ``word_maps``, from what is encoded already.

    Args:
        model: A model with a matching head.
        memory, captions, text: Keys and values of the images; tokens and states of B captions.
        owners, phrases: As for ``word_maps``.
    """
    rows, count = len(captions.ids), int(captions.words.max()) + 1
    words = torch.arange(count, device=captions.words.device).expand(rows, count)
    real = captions.words.amax(dim=1, keepdim=True) >= words
    if phrases is not None:
        real = _words_of(phrases, real)
    view, cls = View(images=owners), text.packing.cls_only
    if model.map_score == "word":
        with torch.no_grad():
            logits = model.match(model.bert.fuse(text, memory, (view,), cls).cls)
        maps = own_maps(model, memory, captions, real, owners)
    else:
        with torch.enable_grad():
            fused, attention = model.bert.fuse_with_attention(
                text, memory, model.map_layer, cls, view
            )
            logits = model.match(fused.cls)
            cam = grad_cam(logits[:, 1], attention, model.bert.first_patch)
        each = torch.vmap(word_map, in_dims=(None, None, 1), out_dims=1)
        maps = each(cam, captions.words, words) * real[:, :, None]
    side = model.visual_encoder.grid
    return WordMaps(
        maps=maps.reshape(rows, count, side, side),
        real=real,
        score=logits.detach().float().softmax(dim=-1)[:, 1],
        text=text,
        memory=memory,
    )


@torch.enable_grad()
def own_maps(
    model: AlignedBase,
    memory: ImageMemory,
    captions: Captions,
    real: Tensor,
    owners: Tensor | None = None,
) -> Tensor:
    """Hide each word of each caption in turn, and map what its prediction depends on.

    Args:
        model: A model with an MLM head.
        memory: Keys and values of the images.
        captions: B tokenized captions.
        real: True for the words to map, (B, W).
        owners: As for ``word_maps``.

    Returns:
        ``mask_effect`` of each word's log-probability, (B, W, patches).
    """
    rows, words = real.nonzero(as_tuple=True)
    hidden = captions.words[rows] == words[:, None]
    ids, mask_id = captions.ids[rows], model.tokenizer.mask_token_id
    texts = model.bert.encode(ids.masked_fill(hidden, mask_id), Packing.of(captions.mask[rows]))
    patches = model.visual_encoder.grid**2
    keep = torch.ones(len(rows), 1 + patches, device=ids.device, requires_grad=True)
    views = (View(images=rows if owners is None else owners[rows], keep=keep),)
    fused = model.bert.fuse(texts, memory, views, wanted=Packing.of(hidden))
    score = word_score(model.text_encoder(fused.states), ids[hidden])
    maps = keep.new_zeros(*real.shape, patches)
    return maps.index_put((rows, words), mask_effect(score, keep)).detach()


def phrase_maps(words: WordMaps, phrases: Phrases | None = None) -> Tensor:
    """Mean map of each phrase's words: (phrases, h, w), float32; zeros for one without words.

    Words that a caption lost, cut to the model's length, do not count. Without ``phrases``, each
    caption is one. ALBEF's evaluation on RefCOCO+ averages over tokens instead, so [CLS] counts
    too, and a word counts once for each of its pieces.
    """
    if phrases is None:
        phrases = [(i, range(words.real.shape[1])) for i in range(len(words.real))]
    chosen = [words.maps[_words_of([phrase], words.real)] for phrase in phrases]
    return torch.stack([maps.sum(dim=0) / max(len(maps), 1) for maps in chosen])


def _words_of(phrases: Phrases, real: Tensor) -> Tensor:
    """True for the words of the phrases that the captions have, (B, W)."""
    chosen = torch.zeros_like(real)
    for caption, numbers in phrases:
        chosen[caption, [number for number in numbers if number < real.shape[1]]] = True
    return chosen & real
