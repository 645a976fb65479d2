"""Why an image matches a caption: for each word, the heat map, the soft mask and what it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softmask_plugin.errors import require_finite_scores
from softmask_plugin.nn.image_memory import View
from softmask_plugin.soft_mask import keep_factors, normalize
from softmask_plugin.tokenization import Captions
from softmask_plugin.word_maps import Pairs, map_words

if TYPE_CHECKING:
    from softmask_plugin.models.aligned import AlignedBase


@dataclass(frozen=True)
class Explanation:
    """What one caption's words refer to in one image.

    Attributes:
        caption: as given.
        words: its words, in order.
        cams: heat map of each word over the patch grid, (words, h, w), >= 0.
        masks: share of each patch that the word's soft mask hides, (words, h, w), in [0, 1].
        score: probability of a match.
        masked_scores: probability of a match when one word's mask is applied, (words,).
    """

    caption: str
    words: list[str]
    cams: Tensor
    masks: Tensor
    score: float
    masked_scores: Tensor


def explain(model: AlignedBase, images: Tensor, captions: list[str]) -> list[Explanation]:
    """Explain pairs with the maps that training uses.

    Args:
        model: one with a matching head; its mode is left as it was.
        images: processed images, (B, 3, H, W).
        captions: processed captions, B of them.

    Returns:
        One explanation per pair, on the CPU.

    Raises:
        UserError: a map or a score is NaN or infinite.
    """
    was_training = model.training
    model.eval()
    try:
        return [
            _explain_one(model, image[None], caption)
            for image, caption in zip(images, captions, strict=True)
        ]
    finally:
        model.train(was_training)


def _explain_one(model: AlignedBase, image: Tensor, caption: str) -> Explanation:
    pairs = Pairs.encode(model, image, [caption])
    found = map_words(model, pairs)
    cams = found.maps[0]
    with torch.no_grad():
        masks = normalize(cams.flatten(1))
        same = torch.zeros(len(cams), dtype=torch.long, device=cams.device)
        view, copies = View(images=same, keep=keep_factors(masks)), pairs.text.take(same, trim=True)
        hidden = model.bert.fuse(copies, pairs.memory, (view,), copies.layout.cls_only)
        masked_scores = model.match(hidden.cls).float().softmax(dim=-1)[:, 1]
    require_finite_scores("a heat map or its score", cams, found.score, masked_scores)
    return Explanation(
        caption=caption,
        words=_words(model, pairs.captions),
        cams=cams.cpu(),
        masks=masks.view_as(cams).cpu(),
        score=found.score.item(),
        masked_scores=masked_scores.cpu(),
    )


def words_of(model: AlignedBase, text: str) -> list[str]:
    """The words of a processed text as the model reads them, in order."""
    return _words(model, model.reader.read([text]))


def _words(model: AlignedBase, caption: Captions) -> list[str]:
    ids, word_ids = caption.ids[0].tolist(), caption.words[0].tolist()
    words: dict[int, str] = {}
    for token, word in zip(model.tokenizer.convert_ids_to_tokens(ids), word_ids, strict=True):
        if word >= 0:
            words[word] = words.get(word, "") + token.removeprefix("##")
    return list(words.values())
