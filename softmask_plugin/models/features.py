"""``softmask_feature_extractor``: features of images, texts and pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lavis.models.albef_models.albef_outputs import AlbefOutputFeatures
from torch import Tensor

from softmask_plugin.config.options import MatchingOptions
from softmask_plugin.config.paths import shipped
from softmask_plugin.errors import UserError, require_finite_scores, suggest
from softmask_plugin.models.aligned import AlignedBase
from softmask_plugin.registry import register

MODES = ("multimodal", "image", "text")


@register("model", "softmask_feature_extractor")
class SoftMaskFeatureExtractor(AlignedBase):
    """Called as LAVIS's ``albef_feature_extractor`` is, with its state-dict keys and the matching
    head's."""

    OPTIONS = MatchingOptions
    PREDICTS_WORDS = True
    PRETRAINED_MODEL_CONFIG_DICT = {
        name: shipped(f"models/softmask_feature_extractor_{name}.yaml")
        for name in ("base", "tiny", "scenes_tiny")
    }

    @torch.no_grad()
    def extract_features(
        self, samples: dict[str, Any], mode: str | Sequence[str] = "multimodal"
    ) -> AlbefOutputFeatures:
        """Features of each token; the first is [CLS], whose projections ITC compares.

        Args:
            samples: ``image`` (B, 3, H, W) and ``text_input``, a list of N texts (N = B for
                "multimodal"); those that the mode needs.
            mode: any of "image", "text" and "multimodal" (which gives the other two as well).

        Returns:
            ``image_embeds`` (B, 1 + patches, width), ``text_embeds`` and ``multimodal_embeds``
            (N, T, width), and unit vectors ``image_embeds_proj`` and ``text_embeds_proj``
            (..., embed_dim), None where not asked for. All are zero for padding.

        Raises:
            UserError: an unknown mode, the image or the text is missing, or a feature is NaN or
                infinite.
        """
        modes = [mode] if isinstance(mode, str) else list(mode)
        for each in modes:
            if each not in MODES:
                raise UserError(f"mode is '{each}': {suggest(each, MODES)}")
        features, both = {}, "multimodal" in modes
        if both or "image" in modes:
            image = self.visual_encoder(self._needed(samples, "image", modes))
            features["image_embeds"] = image
            features["image_embeds_proj"] = unit(self.vision_proj(image))
        if both or "text" in modes:
            ids, packing = self.read(self._needed(samples, "text_input", modes))
            text = self.bert.encode(ids, packing)
            features["text_embeds"] = packing.pad(text.states)
            features["text_embeds_proj"] = packing.pad(unit(self.text_proj(text.states)))
        if both:
            fused = self.bert.fuse(text, self.bert.remember(image))
            features["multimodal_embeds"] = packing.pad(fused.states)
        require_finite_scores("a feature", *features.values())
        return AlbefOutputFeatures(**features)

    def _needed(self, samples: dict[str, Any], key: str, modes: list[str]) -> Any:
        if samples.get(key) is None:
            raise UserError(f"samples['{key}'] is missing: mode {', '.join(modes)} needs it")
        return samples[key]


def unit(features: Tensor) -> Tensor:
    """Vectors of length 1."""
    return F.normalize(features.float(), dim=-1)
