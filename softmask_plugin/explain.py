"""Why an image matches a caption: for each word, the heat map, the soft mask and what it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softmask_plugin.nn.image_memory import View
from softmask_plugin.nn.tokens import Layout
from softmask_plugin.soft_mask import grad_cam, keep_factors, normalize, word_map

if TYPE_CHECKING:
    from softmask_plugin.models.base import SoftMaskBase


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


def explain(model: SoftMaskBase, images: Tensor, captions: list[str]) -> list[Explanation]:
    """Explain pairs with the maps that training uses.

    Args:
        model: any of this plugin's models; its mode is left as it was.
        images: processed images, (B, 3, H, W).
        captions: processed captions, B of them.

    Returns:
        One explanation per pair, on the CPU.
    """
    was_training = model.training
    model.eval()
    try:
        return [
            _explain_one(model, image[None].to(model.device), caption)
            for image, caption in zip(images, captions, strict=True)
        ]
    finally:
        model.train(was_training)


def _explain_one(model: SoftMaskBase, image: Tensor, caption: str) -> Explanation:
    clean = model.reader.read([caption])
    ids, layout = clean.ids.to(model.device), Layout.of(clean.mask).to(model.device)
    word_ids = clean.words.to(model.device)
    count = int(word_ids.max()) + 1
    with torch.enable_grad():
        memory = model.bert.remember(model.visual_encoder(image))
        text = model.bert.encode(ids, layout)
        fused, attention = model.bert.fuse_with_attention(
            text, memory, model.options.soft_mask.layer, layout.cls_only
        )
        logits = model.match(fused.cls)
        cam = grad_cam(logits[:, 1], attention)
    with torch.no_grad():
        each = torch.arange(count, device=model.device)
        cams = word_map(cam.expand(count, -1, -1), word_ids.expand(count, -1), each)
        masks = normalize(cams)
        same = torch.zeros_like(each)
        view, copies = View(images=same, keep=keep_factors(masks)), text.take(same, trim=True)
        hidden = model.bert.fuse(copies, memory, (view,), copies.layout.cls_only)
        masked_scores = model.match(hidden.cls).float().softmax(dim=-1)[:, 1]
    grid = (count, model.visual_encoder.grid, model.visual_encoder.grid)
    return Explanation(
        caption=caption,
        words=_words(model, ids[0].tolist(), word_ids[0].tolist()),
        cams=cams.reshape(grid).cpu(),
        masks=masks.reshape(grid).cpu(),
        score=logits.float().softmax(dim=-1)[0, 1].item(),
        masked_scores=masked_scores.cpu(),
    )


def _words(model: SoftMaskBase, ids: list[int], word_ids: list[int]) -> list[str]:
    words: dict[int, str] = {}
    for token, word in zip(model.tokenizer.convert_ids_to_tokens(ids), word_ids, strict=True):
        if word >= 0:
            words[word] = words.get(word, "") + token.removeprefix("##")
    return list(words.values())
