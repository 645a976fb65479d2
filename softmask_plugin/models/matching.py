"""``softmask_image_text_matching``: how well does a text describe an image, and by which words?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from softmask_plugin.config.options import MatchingOptions
from softmask_plugin.errors import UserError, require_finite_scores, suggest
from softmask_plugin.models.aligned import AlignedBase
from softmask_plugin.models.base import require_pairs, shipped_types
from softmask_plugin.registry import register

HEADS = ("itm", "itc")


@register("model", "softmask_image_text_matching")
class SoftMaskImageTextMatching(AlignedBase):
    """Scores pairs, called as LAVIS's ``blip_image_text_matching``. For the maps of words, see
    ``softmask_plugin.explain``."""

    OPTIONS = MatchingOptions
    PRETRAINED_MODEL_CONFIG_DICT = shipped_types(
        "softmask_image_text_matching", "base", "coco", "flickr", "small", "tiny", "scenes_tiny"
    )

    def forward(self, samples: dict[str, Any], match_head: str = "itm") -> Tensor:
        """Score images and texts.

        Args:
            samples: ``image`` (B, 3, H, W) and ``text_input`` (list of N texts).
            match_head: ``itm`` for the matching logits of pair i, (B, 2), column 1 for a match
                (N = B); ``itc`` for the cosines of all images with all texts, (B, N).

        Raises:
            UserError: Unknown head, not one text for each image, or a NaN or infinite score.
        """
        if match_head not in HEADS:
            raise UserError(f"match_head is '{match_head}': {suggest(match_head, HEADS)}")
        captions = self.tokenize(samples["text_input"])
        image = self.visual_encoder(samples["image"])
        text = self.bert.encode(captions.ids, captions.packing)
        if match_head == "itc":
            scores = self.image_features(image[:, 0]) @ self.text_features(self.pooled(text)).T
        else:
            require_pairs(len(captions.ids), len(image))
            memory, cls_only = self.bert.remember(image), captions.packing.cls_only
            scores = self.match(self.bert.fuse(text, memory, wanted=cls_only).cls)
        require_finite_scores("a matching score", scores)
        return scores
