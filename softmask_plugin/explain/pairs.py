"""Explain pairs: for each word, the heat map, the soft mask and its effect on the match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softmask_plugin.config.options import SoftMaskOptions
from softmask_plugin.errors import require_finite_scores
from softmask_plugin.explain.maps import WordMaps, word_maps
from softmask_plugin.nn.image_memory import ImageMemory, View
from softmask_plugin.nn.tokens import Tokens
from softmask_plugin.soft_mask import Kind, keep_factors, normalize
from softmask_plugin.tokenization import FUNCTION_WORDS, as_list

if TYPE_CHECKING:
    from softmask_plugin.models.aligned import AlignedBase


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


def explain(model: AlignedBase, images: Tensor, captions: Sequence[str]) -> list[Explanation]:
    """Explain pairs with the maps and the masks of training.

    Masks have the kind and strength of the model's ``soft_mask`` options, or those of the paper
    (``soft`` and 1) if it trains without masks. For the kind ``random``, it is the same draw at
    every call.

    Args:
        model: A model with a matching head; its mode is restored.
        images: Processed images, (B, 3, H, W).
        captions: B processed captions.

    Returns:
        B explanations, on the CPU.

    Raises:
        UserError: A map or a score is NaN or infinite.
    """
    was_training = model.training
    model.eval()
    try:
        return [
            _explain_one(model, image[None], caption)
            for image, caption in zip(images, as_list(captions), strict=True)
        ]
    finally:
        model.train(was_training)


def _explain_one(model: AlignedBase, image: Tensor, caption: str) -> Explanation:
    found = word_maps(model, image, [caption])
    mask: Any = getattr(model.options, "soft_mask", None)
    if mask is None or not mask.enabled:
        mask = SoftMaskOptions()
    keep, masked_scores = match_masked(model, found, mask.kind, mask.strength)
    require_finite_scores("a heat map or its score", found.maps, found.score, masked_scores)
    return Explanation(
        caption=caption,
        words=words_of(model, caption),
        cams=found.maps[0].cpu(),
        masks=(1 - keep[:, 1:]).view_as(found.maps[0]).cpu(),
        score=found.score.item(),
        masked_scores=masked_scores.cpu(),
        kind=mask.kind,
        strength=mask.strength,
        kept=model.caption_tokenizer.truncate(caption),
    )


@torch.no_grad()
def match_masked(
    model: AlignedBase, pair: WordMaps, kind: Kind, strength: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Match one pair again, with the mask of each word in turn.

    Masks of the kind ``random`` are the same draw at every call.

    Returns:
        Factor for each image token, (words, 1 + h * w), and the probability of a match, (words,),
        float32; on the model's device.
    """
    cams = pair.maps[0].flatten(1)
    same = torch.zeros(len(cams), dtype=torch.long, device=cams.device)
    copies = pair.text.take(same, trim=True)
    keep, logits = match_through(model, pair.memory, copies, same, cams, kind, strength)
    return keep, logits.softmax(dim=-1)[:, 1]


@torch.no_grad()
def match_through(
    model: AlignedBase,
    memory: ImageMemory,
    texts: Tokens,
    images: Tensor,
    cams: Tensor,
    kind: Kind,
    strength: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Match N texts with images, each seen through the mask of a map.

    Args:
        model, memory, texts: A model with a matching head, images and texts as it encodes them.
        images: Index of each text's image, (N,), int64.
        cams: Maps, (N, patches), >= 0; a constant one hides nothing.
        kind, strength: As in the ``soft_mask`` options.
        seed: Of the masks of the kind ``random``.

    Returns:
        Factor for each image token, (N, 1 + patches), and the matching logits, (N, 2), float32.
    """
    generator = torch.Generator(cams.device).manual_seed(seed)
    keep = keep_factors(normalize(cams), kind, strength, generator)
    view = View(images=images, keep=keep)
    fused = model.bert.fuse(texts, memory, (view,), texts.packing.cls_only)
    return keep, model.match(fused.cls).float()


def words_of(model: AlignedBase, text: str) -> list[str]:
    """The words of a processed text, as the model's tokenizer splits it."""
    tokenized = model.caption_tokenizer.tokenize([text])
    tokens = model.tokenizer.convert_ids_to_tokens(tokenized.ids[0].tolist())
    words: dict[int, str] = {}
    for token, word in zip(tokens, tokenized.words[0].tolist(), strict=True):
        if word >= 0:
            words[word] = words.get(word, "") + token.removeprefix("##")
    return list(words.values())
