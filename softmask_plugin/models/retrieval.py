"""``softmask_retrieval``: fine-tuning for image-text retrieval (ALBEF, arXiv 2107.07651, 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from softmask_plugin.config.options import RetrievalOptions
from softmask_plugin.config.paths import shipped
from softmask_plugin.models.contrastive import ContrastiveBase
from softmask_plugin.nn.sampling import Draws
from softmask_plugin.nn.tokens import Packing
from softmask_plugin.registry import register


@dataclass
class RetrievalOutput(ModelOutput):
    """Losses of a step (scalars), and what the mask did, see ``PretrainOutput``; ``loss_soft``,
    ``keep`` and ``word`` are None where the soft mask is off."""

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_soft: Tensor | None = None
    keep: Tensor | None = None
    word: Tensor | None = None


@register("model", "softmask_retrieval")
class SoftMaskRetrieval(ContrastiveBase):
    """ITC and ITM in which pairs of the same image match each other.

    By default it computes the losses of LAVIS's ``albef_retrieval``, with its state-dict keys. The
    soft mask and the focal loss are options (``soft_mask.enabled``, ``itc.gamma``).
    """

    OPTIONS = RetrievalOptions
    PRETRAINED_MODEL_CONFIG_DICT = {
        name: shipped(f"models/softmask_retrieval_{name}.yaml")
        for name in ("coco", "flickr", "tiny", "scenes_tiny")
    }

    def __init__(self, options: RetrievalOptions) -> None:
        super().__init__(options)
        self.register_buffer("idx_queue", torch.full((1, options.queue_size), NO_IMAGE))
        self.add_momentum("visual_encoder", "text_encoder", "vision_proj", "text_proj")

    def forward(self, samples: dict[str, Any]) -> RetrievalOutput:
        """Losses of one step; in training mode also moves the momentum encoders and the queues.

        Args:
            samples: ``image`` (B, 3, H, W), ``text_input`` list of B captions, ``image_id`` (B,)
                int64, and, as LAVIS's tasks give them, ``epoch``, ``iters``,
                ``num_iters_per_epoch``.
        """
        images, option = samples["image"], self.options
        ids = torch.as_tensor(samples["image_id"], device=self.device)
        step, alpha = self.progress(samples)
        clean = self.reader.read(samples["text_input"])
        words = self.reader.pickable(clean, clean.ids, option.soft_mask.words == "content")
        packing = Packing.of(clean.mask).to(self.device)
        tokens, words = clean.ids.to(self.device), words.to(self.device)

        online = self.encode(images, tokens, packing)
        slow = self.encode_slowly(images, tokens, packing)
        loss_itc, similarity = self.contrast(online, slow, alpha, ids)

        draws, memory = Draws(torch.initial_seed(), step), self.bert.remember(online.image)
        pairs, hidden = self.pair_up(
            online.text, memory, words, packing.cls_only, similarity, draws, step
        )
        fused = pairs.fuse(self.bert, memory)
        loss_itm, loss_soft = self.matching_losses(fused, similarity)

        loss = option.itc.weight * loss_itc + option.itm_weight * loss_itm
        if loss_soft is not None:
            loss = loss + option.soft_mask.weight * option.itm_weight * loss_soft
        return RetrievalOutput(
            loss=loss,
            loss_itc=loss_itc,
            loss_itm=loss_itm,
            loss_soft=loss_soft,
            keep=hidden.keep,
            word=hidden.word,
        )


NO_IMAGE = -100  # what the queue of image ids holds at first, as LAVIS's does
