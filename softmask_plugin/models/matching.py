"""``softmask_image_text_matching``: how well does a text describe an image, and by which words?"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from softmask_plugin.config.options import MatchingOptions
from softmask_plugin.config.paths import shipped
from softmask_plugin.errors import UserError, require_finite_scores, suggest
from softmask_plugin.models.aligned import AlignedBase
from softmask_plugin.registry import register

HEADS = ("itm", "itc")


@register("model", "softmask_image_text_matching")
class SoftMaskImageTextMatching(AlignedBase):
    """Scores of pairs, called as LAVIS's ``blip_image_text_matching`` is; the maps of words are
    those of ``softmask_plugin.explain.maps`` and ``softmask_plugin.explain.pairs``."""

    OPTIONS = MatchingOptions
    PRETRAINED_MODEL_CONFIG_DICT = {
        name: shipped(f"models/softmask_image_text_matching_{name}.yaml")
        for name in ("base", "coco", "flickr", "tiny", "scenes_tiny")
    }

    def forward(self, samples: dict[str, Any], match_head: str = "itm") -> Tensor:
        """Score images and texts.

        Args:
            samples: ``image`` (B, 3, H, W) and ``text_input``, a list of N texts.
            match_head: ``itm`` for the matching logits of pair i, (B, 2), column 1 for a match
                (N = B); ``itc`` for the cosines of all images with all texts, (B, N).

        Raises:
            UserError: there is no such head, or a score is NaN or infinite.
        """
        if match_head not in HEADS:
            raise UserError(f"match_head is '{match_head}': {suggest(match_head, HEADS)}")
        ids, packing = self.read(samples["text_input"])
        image, text = self.visual_encoder(samples["image"]), self.bert.encode(ids, packing)
        if match_head == "itc":
            image_feat = F.normalize(self.vision_proj(image[:, 0]).float(), dim=-1)
            scores = image_feat @ F.normalize(self.text_proj(text.cls).float(), dim=-1).T
        else:
            fused = self.bert.fuse(text, self.bert.remember(image), wanted=packing.cls_only)
            scores = self.match(fused.cls)
        require_finite_scores("a matching score", scores)
        return scores
