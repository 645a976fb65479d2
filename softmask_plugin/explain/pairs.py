"""Why an image matches a caption: for each word, the heat map, the soft mask and what it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softmask_plugin.errors import require_finite_scores
from softmask_plugin.explain.maps import Pairs, map_words
from softmask_plugin.nn.image_memory import View
from softmask_plugin.soft_mask import Kind, keep_factors, normalize
from softmask_plugin.tokenization import FUNCTION_WORDS, Captions

if TYPE_CHECKING:
    from softmask_plugin.models.aligned import AlignedBase


@dataclass(frozen=True)
class Explanation:
    """What one caption's words refer to in one image.

    Attributes:
        caption: as given.
        words: its words, in order.
        cams: heat map of each word over the patch grid, (words, h, w), >= 0.
        masks: share of each patch that the word's mask hides, (words, h, w), in [0, 1].
        score: probability of a match.
        masked_scores: probability of a match when one word's mask is applied, (words,).
        kind, strength: of the masks, as ``soft_mask.kind`` and ``soft_mask.strength``.
        read: the caption as far as the model read it: to its end, unless it is too long.
    """

    caption: str
    words: list[str]
    cams: Tensor
    masks: Tensor
    score: float
    masked_scores: Tensor
    kind: Kind
    strength: float
    read: str

    @property
    def cut(self) -> str:
        """What to say of a caption that was not read to its end; "" of any other."""
        if self.read == self.caption:
            return ""
        read, given = len(self.read.split()), len(self.caption.split())
        return f"only the first {read} of {given} words were read"

    @property
    def mask_name(self) -> str:
        """What a picture calls the mask: "soft mask", "hard mask × 0.5"."""
        return f"{self.kind} mask" + (f" × {self.strength:g}" if self.strength != 1 else "")

    @property
    def naming(self) -> list[int]:
        """Which words may name something in the image, to show where there is room for few.

        Of ``soft_mask.words`` that is ``content``; ``uniform`` picks function words as well.
        """
        return [i for i, word in enumerate(self.words) if word not in FUNCTION_WORDS]


def explain(model: AlignedBase, images: Tensor, captions: list[str]) -> list[Explanation]:
    """Explain pairs with the maps and the masks that training uses.

    Kind and strength of the mask are the model's ``soft_mask`` options; the paper's, ``soft`` and
    1, where these are off or the model has none. Of the kind ``random`` one draw is shown, the
    same at every call.

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
    kind, strength = _mask_of(model)
    keep, masked_scores = match_masked(model, pairs, cams, kind, strength)
    require_finite_scores("a heat map or its score", cams, found.score, masked_scores)
    return Explanation(
        caption=caption,
        words=_words(model, pairs.captions),
        cams=cams.cpu(),
        masks=(1 - keep[:, 1:]).view_as(cams).cpu(),
        score=found.score.item(),
        masked_scores=masked_scores.cpu(),
        kind=kind,
        strength=strength,
        read=model.reader.beginning(caption),
    )


@torch.no_grad()
def match_masked(
    model: AlignedBase, pair: Pairs, cams: Tensor, kind: Kind, strength: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Match one pair with the mask of each word in turn.

    Args:
        model: one with a matching head, in the mode that it is in.
        pair: an image and its caption, encoded.
        cams: heat map of each word, (words, h, w).
        kind, strength: of the masks; of the kind ``random`` one draw, the same at every call.

    Returns:
        The factor that each image token is multiplied by, (words, 1 + h * w), and the probability
        of a match, (words,), float32; on the model's device.
    """
    fixed = torch.Generator(cams.device).manual_seed(0)
    keep = keep_factors(normalize(cams.flatten(1)), kind, strength, fixed)
    same = torch.zeros(len(cams), dtype=torch.long, device=cams.device)
    view, copies = View(images=same, keep=keep), pair.text.take(same, trim=True)
    hidden = model.bert.fuse(copies, pair.memory, (view,), copies.packing.cls_only)
    return keep, model.match(hidden.cls).float().softmax(dim=-1)[:, 1]


def _mask_of(model: AlignedBase) -> tuple[Kind, float]:
    """Kind and strength of the mask that a model trains with, or else the paper's."""
    option = getattr(model.options, "soft_mask", None)
    return (option.kind, option.strength) if option and option.enabled else ("soft", 1.0)


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
