"""``softmask_retrieval``: fine-tuning for image-text retrieval (ALBEF, arXiv 2107.07651, 5)."""

from __future__ import annotations

from typing import Any

import torch

from softmask_plugin.config.options import RetrievalOptions
from softmask_plugin.models.base import require_pairs, shipped_types
from softmask_plugin.models.contrastive import ContrastiveBase, ContrastiveOutput
from softmask_plugin.registry import register

NO_IMAGE = -100  # initial content of the queue of image ids, as in LAVIS


@register("model", "softmask_retrieval")
class SoftMaskRetrieval(ContrastiveBase):
    """ITC and ITM, in which pairs of the same image match each other.

    By default it computes the losses of LAVIS's ``albef_retrieval``, with its state-dict keys. The
    soft mask and the focal loss are options (``soft_mask.enabled``, ``itc.gamma``).
    """

    OPTIONS = RetrievalOptions
    PRETRAINED_MODEL_CONFIG_DICT = shipped_types(
        "softmask_retrieval", "coco", "flickr", "small", "tiny", "scenes_tiny"
    )

    def __init__(self, options: RetrievalOptions) -> None:
        super().__init__(options)
        self.register_buffer("idx_queue", torch.full((1, options.queue_size), NO_IMAGE))
        self.add_momentum("visual_encoder", "text_encoder", "vision_proj", "text_proj")

    def forward(self, samples: dict[str, Any]) -> ContrastiveOutput:
        """Compute a step's losses; in training mode, also update momentum encoders and queues.

        Args:
            samples: ``image`` (B, 3, H, W), ``text_input`` (list of B captions), ``image_id`` (B,)
                int64, and ``epoch``, ``iters``, ``num_iters_per_epoch`` from LAVIS's tasks.
        """
        ids = torch.as_tensor(samples["image_id"], device=self.device)
        draws, alpha = self.progress(samples)
        images = self.visual_encoder.visible(samples["image"], draws)
        clean = self.caption_tokenizer.tokenize(samples["text_input"])
        require_pairs(len(clean.ids), len(images))
        text, changed = self.as_matched(clean, draws)

        online = self.encode(images, text.ids, text.packing)
        momentum = self.encode_momentum(images, text.ids, text.packing)
        loss_itc, similarity = self.contrast(online, momentum, alpha, ids)
        loss_local = self.contrast_words(online)

        memory = self.bert.remember(online.image)
        mask, loss_itm, loss_soft = self.match_clean(
            online, text, changed, memory, similarity, draws
        )
        return self.output(mask, itc=loss_itc, itm=loss_itm, soft=loss_soft, local=loss_local)
