"""Explain pairs: for each word, the heat map, the soft mask and its effect on the match."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softmask_plugin.datasets.tables.phrases import occurrences
from softmask_plugin.errors import UserError, require_finite_scores, suggest
from softmask_plugin.explain.lavis_models import matcher_of
from softmask_plugin.explain.maps import word_maps
from softmask_plugin.explain.matcher import Matcher, Pairs, match_probability
from softmask_plugin.soft_mask import Kind, keep_factors, normalize
from softmask_plugin.tokenization import FUNCTION_WORDS, as_list


@dataclass(frozen=True, repr=False)
class Explanation:
    """How a caption's words refer to an image.

    Attributes:
        words: The caption's words, in order.
        cams: Heat map of each word over the patch grid, (words, h, w), >= 0.
        masks: How much of each patch the word's mask hides, (words, h, w), in [0, 1].
        score: Probability of a match.
        masked_scores: Probability of a match with each word masked, (words,).
        kind, strength: Kind and strength of the masks, as in the ``soft_mask`` options.
        kept: The part of the caption that was not cut off as too long.
    """

    caption: str
    words: list[str]
    cams: Tensor
    masks: Tensor
    score: float
    masked_scores: Tensor
    kind: Kind
    strength: float
    kept: str

    def __repr__(self) -> str:
        return f"<match {self.score:.3f}: {self.kept!r}, {len(self.words)} words explained>"

    @property
    def cut(self) -> str:
        """How much of a caption was kept, in words; "" for all of it."""
        if self.kept == self.caption:
            return ""
        return f"only the first {len(self.kept.split())} of {len(self.caption.split())} words fit"

    @property
    def mask_name(self) -> str:
        """Name of the mask in a picture: "soft mask", "hard mask × 0.5"."""
        return f"{self.kind} mask" + (f" × {self.strength:g}" if self.strength != 1 else "")

    @property
    def content_words(self) -> list[int]:
        """Indices of the words that are not function words (``soft_mask.words: content``)."""
        return [i for i, word in enumerate(self.words) if word not in FUNCTION_WORDS]


def explain(model: Any, images: Tensor, captions: Sequence[str]) -> list[Explanation]:
    """Explain pairs with the maps and the masks of training.

    Masks have the kind and strength of the model's ``soft_mask`` options, or those of the paper
    (``soft`` and 1) if it trains without masks. For the kind ``random``, it is the same draw at
    every call.

    Args:
        model: A model with a matching head, of this plugin or of LAVIS; its mode is restored.
        images: Processed images, (B, 3, H, W).
        captions: B processed captions.

    Returns:
        B explanations, on the CPU.

    Raises:
        UserError: A map or a score is NaN or infinite.
        ValueError: There are not as many captions as images.
    """
    captions, matcher = as_list(captions), matcher_of(model)
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images do not pair with {len(captions)} captions")
    with evaluating(matcher.model):
        return [
            _explain_one(matcher, image[None], caption)
            for image, caption in zip(images, captions, strict=True)
        ]


def _explain_one(matcher: Matcher, image: Tensor, caption: str) -> Explanation:
    found, mask = word_maps(matcher, image, [caption]), matcher.mask
    cams = found.maps[0].flatten(1)
    same = torch.zeros(len(cams), dtype=torch.long, device=cams.device)
    keep, logits = match_through(matcher, found.pairs, cams, mask.kind, mask.strength, rows=same)
    masked_scores = match_probability(logits)
    require_finite_scores("a heat map or its score", found.maps, found.score, masked_scores)
    return Explanation(
        caption=caption,
        words=words_of(matcher, caption),
        cams=found.maps[0].cpu(),
        masks=(1 - keep[:, 1:]).view_as(found.maps[0]).cpu(),
        score=found.score.item(),
        masked_scores=masked_scores.cpu(),
        kind=mask.kind,
        strength=mask.strength,
        kept=matcher.caption_tokenizer.truncate(caption),
    )


@torch.no_grad()
def match_through(
    matcher: Matcher,
    pairs: Pairs,
    cams: Tensor,
    kind: Kind,
    strength: float = 1.0,
    seed: int = 0,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Match captions with their images, each seen through the mask of a map.

    Args:
        cams: Maps, (n, patches), >= 0; a constant one hides nothing.
        kind, strength: As in the ``soft_mask`` options.
        seed: Of the masks of the kind ``random``, which are the same draw at every call.
        rows: The caption of each map, (n,), int64; None: all in turn.

    Returns:
        Factor for each image token, (n, 1 + patches), and the matching logits, (n, 2), float32.
    """
    generator = torch.Generator(cams.device).manual_seed(seed)
    keep = keep_factors(normalize(cams), kind, strength, generator)
    return keep, matcher.match(pairs, rows, keep).float()


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into its own."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def words_of(matcher: Matcher, text: str) -> list[str]:
    """The words of a processed text, as the model's tokenizer splits it."""
    tokenized = matcher.caption_tokenizer.tokenize([text])
    tokens = matcher.caption_tokenizer.tokenizer.convert_ids_to_tokens(tokenized.ids[0].tolist())
    words: dict[int, str] = {}
    for token, word in zip(tokens, tokenized.words[0].tolist(), strict=True):
        if word >= 0:
            words[word] = words.get(word, "") + token.removeprefix("##")
    return list(words.values())


def numbers_of(words: Sequence[str], phrase: Sequence[str]) -> list[int]:
    """Numbers of a phrase's words at every place where a text, given as words, has it.

    Raises:
        UserError: It has it nowhere.
    """
    if found := occurrences(phrase, words):
        return found
    name = " ".join(phrase)
    raise UserError(f"the cleaned caption lacks '{name}': {suggest(name, words)}")
