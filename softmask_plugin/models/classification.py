"""``softmask_classification``: image and text into classes, such as SNLI-VE's three."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from softmask_plugin.config.options import ClassificationOptions
from softmask_plugin.config.paths import shipped
from softmask_plugin.errors import require_finite_scores
from softmask_plugin.losses import distilled_cross_entropy
from softmask_plugin.models.distillation import DistilledBase
from softmask_plugin.nn.tokens import Packing
from softmask_plugin.registry import register


@dataclass
class ClassificationOutput(ModelOutput):
    """Loss of a step (a scalar) and logits (B, classes)."""

    loss: Tensor | None = None
    logits: Tensor | None = None


@register("model", "softmask_classification")
class SoftMaskClassification(DistilledBase):
    """Two-layer head on the multi-modal [CLS], with the state-dict keys and the losses of LAVIS's
    ``albef_classification``."""

    OPTIONS = ClassificationOptions
    PRETRAINED_MODEL_CONFIG_DICT = {
        name: shipped(f"models/softmask_classification_{name}.yaml") for name in ("ve", "tiny")
    }

    def __init__(self, options: ClassificationOptions) -> None:
        super().__init__(options)
        width = options.bert.width
        self.cls_head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, options.num_classes)
        )
        self.add_momentum("visual_encoder", "text_encoder", "cls_head")

    def forward(self, samples: dict[str, Any]) -> ClassificationOutput:
        """Loss of one step; in training mode also moves the momentum model.

        Args:
            samples: the images that ``images`` names, ``text_input`` list of B sentences, ``label``
                (B,) int64, and, as LAVIS's tasks give them, ``epoch``, ``iters``,
                ``num_iters_per_epoch``.
        """
        images, text = self.images(samples), self.read(samples["text_input"])
        logits, taught, alpha = self.logits(images, text), None, 0.0
        if self.options.use_distill:
            _, alpha = self.progress(samples)
            self.move_momentum()
            with torch.no_grad():
                taught = self.logits(images, text, "_m")
        loss = distilled_cross_entropy(logits, samples["label"], taught, alpha)
        return ClassificationOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def predict(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        """Logits (B, classes) as ``predictions`` and labels as ``targets``, for LAVIS's task
        ``multimodal_classification``.

        Raises:
            UserError: a logit is NaN or infinite.
        """
        logits = self.logits(self.images(samples), self.read(samples["text_input"]))
        require_finite_scores("a class's score", logits)
        return {"predictions": logits, "targets": samples["label"]}

    def images(self, samples: dict[str, Any]) -> Tensor:
        """What to look at: ``image``, (B, 3, H, W)."""
        return samples["image"]

    def logits(self, images: Tensor, text: tuple[Tensor, Packing], suffix: str = "") -> Tensor:
        """Logits (B, classes) of the model, or with "_m" of its momentum copy."""
        fused = self.fuse(images, text, text[1].cls_only, suffix)
        return self.part("cls_head", suffix)(fused.cls)
