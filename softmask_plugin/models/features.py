"""``softmask_feature_extractor``: features of images, texts and pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lavis.models.albef_models.albef_outputs import AlbefOutputFeatures

from softmask_plugin.config.options import MatchingOptions
from softmask_plugin.errors import UserError, require_finite_scores, suggest
from softmask_plugin.models.aligned import AlignedBase
from softmask_plugin.models.base import require_pairs, shipped_types
from softmask_plugin.registry import register

MODES = ("multimodal", "image", "text")


@register("model", "softmask_feature_extractor")
class SoftMaskFeatureExtractor(AlignedBase):
    """Called as LAVIS's ``albef_feature_extractor``, with its state-dict keys and those of the
    matching head."""

    OPTIONS = MatchingOptions
    PREDICTS_WORDS = True
    PRETRAINED_MODEL_CONFIG_DICT = shipped_types(
        "softmask_feature_extractor", "base", "small", "tiny", "scenes_tiny"
    )

    @torch.no_grad()
    def extract_features(
        self, samples: dict[str, Any], mode: str | Sequence[str] = "multimodal"
    ) -> AlbefOutputFeatures:
        """Compute features of every token, the first of which is [CLS].

        Args:
            samples: ``image`` (B, 3, H, W) and ``text_input`` (list of N texts; N = B for
                "multimodal"), as the mode needs.
            mode: Any of "image", "text" and "multimodal", which includes the other two.

        Returns:
            ``image_embeds`` (B, 1 + patches, width), ``text_embeds`` and ``multimodal_embeds``
            (N, T, width), and unit vectors ``image_embeds_proj`` and ``text_embeds_proj``
            (..., embed_dim); None if not asked for, zero for padding. ITC compares the first unit
            vectors; with ``text_pool: mean`` a text's first is that of its mean.

        Raises:
            UserError: Unknown mode, no image or text, for "multimodal" not one text for each image,
                or a NaN or infinite feature.
        """
        modes = [mode] if isinstance(mode, str) else list(mode)
        for each in modes:
            if each not in MODES:
                raise UserError(f"mode is '{each}': {suggest(each, MODES)}")
        features, both = {}, "multimodal" in modes
        if both or "image" in modes:
            image = self.visual_encoder(self._needed(samples, "image", modes))
            features["image_embeds"] = image
            features["image_embeds_proj"] = self.image_features(image)
        if both or "text" in modes:
            captions = self.tokenize(self._needed(samples, "text_input", modes))
            text, pad = self.bert.encode(captions.ids, captions.packing), captions.packing.pad
            features["text_embeds"] = pad(text.states)
            projected = pad(self.text_features(text.states))
            projected[:, 0] = self.text_features(self.pooled(text))
            features["text_embeds_proj"] = projected
        if both:
            require_pairs(len(captions.ids), len(image))
            fused = self.bert.fuse(text, self.bert.remember(image))
            features["multimodal_embeds"] = pad(fused.states)
        require_finite_scores("a feature", *features.values())
        return AlbefOutputFeatures(**features)

    def _needed(self, samples: dict[str, Any], key: str, modes: list[str]) -> Any:
        if samples.get(key) is None:
            raise UserError(f"samples['{key}'] is missing: mode {', '.join(modes)} needs it")
        return samples[key]
