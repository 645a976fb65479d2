"""Heat maps of the words of captions, by default as the soft mask trains with, for batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from softmask_plugin.errors import UserError, suggest
from softmask_plugin.explain.lavis_models import matcher_of
from softmask_plugin.explain.matcher import (
    Matcher,
    Pairs,
    Target,
    effect_maps,
    maps_of_words,
    match_logit,
    match_probability,
)
from softmask_plugin.explain.occlusion import occlusion_maps
from softmask_plugin.soft_mask import word_score
from softmask_plugin.tokenization import Captions, as_list

Method = Literal["gradcam", "attention", "word", "similarity", "occlusion"]
TRAINED = {"match": "gradcam"}  # methods by other names than ``soft_mask.score``
Phrases = Sequence[tuple[int, Sequence[int]]]  # of each: its caption's index, its words' numbers


@dataclass(frozen=True)
class WordMaps:
    """Heat maps of the words of B captions, the longest of which has W words.

    Attributes:
        maps: Map of each word over the patch grid, (B, W, h, w), float32, >= 0; zeros where
            ``real`` is False.
        real: True where a caption has a word that was mapped, (B, W).
        score: Probability of a match, (B,), float32.
        pairs: The encoded pairs, to be matched again through masks.
    """

    maps: Tensor
    real: Tensor
    score: Tensor
    pairs: Pairs


@torch.inference_mode(False)  # which forbids gradients
def word_maps(
    model: Any,
    images: Tensor,
    captions: Sequence[str],
    owners: Tensor | None = None,
    phrases: Phrases | None = None,
    method: Method | None = None,
    layer: int | None = None,
    target: Target = match_logit,
) -> WordMaps:
    """Map every word of every caption.

    ``method`` says how, for word w and patch i:

    - ``gradcam``: the paper's map (arXiv 2304.00719, 3.2), ``grad_cam`` of the target at the word's
      tokens; for BLIP-2, whose words see no patch, see ``QformerMatcher``;
    - ``attention``: the same without gradients, the plain attention of a layer;
    - ``word``: ``mask_effect`` of the word's own log-probability once [MASK] hides it, for models
      with an MLM head;
    - ``similarity``: ``similarity_map`` of the word's tokens, for models that compare words with
      patches;
    - ``occlusion``: how much less the word adds to the target when patch i has the image's mean
      colour, ``relu((s(v, t) - s(v, t - w)) - (s(v - i, t) - s(v - i, t - w)))`` with [MASK] in
      place of the word in t - w. It needs no gradient, but patches times words passes.

    Args:
        model: A model with a matching head, of this plugin or of LAVIS. Its mode is kept, and
            dropout would blur the maps.
        images: Processed images, (N, 3, H, W), each encoded once.
        captions: B processed captions.
        owners: Index of each caption's image, (B,), int64; None: caption i has image i.
        phrases: The words to map; others count as missing. None: all.
        method: See above; None: as the model's soft mask trains.
        layer: BERT layer, from 0, of ``gradcam`` and ``attention``; None: the model's own.
        target: Which score of the matching logits ``gradcam`` and ``occlusion`` explain.

    Returns:
        Maps and scores on the model's device, detached.

    Raises:
        ValueError: Images or, if given, ``owners`` do not pair with captions, or the layer has no
            cross-attention.
        UserError: The model has no matching head, or cannot do this method.
    """
    captions, matcher = as_list(captions), matcher_of(model)
    if (count := len(images if owners is None else owners)) != len(captions):
        raise ValueError(f"{count} images do not pair with {len(captions)} captions")
    pairs = matcher.encode(images, matcher.tokenize(captions), owners)
    return map_words(matcher, pairs, phrases, method, layer, target, images)


@torch.inference_mode(False)
@torch.no_grad()  # methods that need gradients turn them on
def map_words(
    matcher: Matcher,
    pairs: Pairs,
    phrases: Phrases | None = None,
    method: Method | None = None,
    layer: int | None = None,
    target: Target = match_logit,
    images: Any = None,
) -> WordMaps:
    """As ``word_maps``, from what is encoded already; ``occlusion`` needs the images as well."""
    how: str = method or TRAINED.get(matcher.score, matcher.score)
    if how not in get_args(Method):
        raise UserError(f"method is '{how}': {suggest(how, get_args(Method))}")
    real = _real(pairs.captions, phrases)
    if how in ("gradcam", "attention"):
        logits, maps = matcher.maps(pairs, real, target, layer, plain=how == "attention")
    else:
        logits = matcher.match(pairs)
    if how == "word":

        def log_probability(hidden: Pairs, at: Tensor, rows: Tensor, keep: Tensor) -> Tensor:
            return word_score(matcher.predict(hidden, at, keep), pairs.captions.ids[rows][at])

        maps = effect_maps(matcher, pairs, real, log_probability)
    elif how == "similarity":
        maps = maps_of_words(matcher.similarity_maps(pairs), pairs, real)
    elif how == "occlusion":
        maps = occlusion_maps(matcher, images, pairs, real, target)
    maps = maps.unflatten(-1, (pairs.side, pairs.side))
    return WordMaps(maps, real, match_probability(logits.float()), pairs)


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


def _real(captions: Captions, phrases: Phrases | None) -> Tensor:
    """True for the words to map, (B, W)."""
    last = captions.words.amax(dim=1, keepdim=True)
    real = last >= torch.arange(int(last.max()) + 1, device=last.device)
    return real if phrases is None else _words_of(phrases, real)


def _words_of(phrases: Phrases, real: Tensor) -> Tensor:
    """True for the words of the phrases that the captions have, (B, W)."""
    chosen = torch.zeros_like(real)
    for caption, numbers in phrases:
        chosen[caption, [number for number in numbers if number < real.shape[1]]] = True
    return chosen & real
