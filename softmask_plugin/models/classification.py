"""``softmask_classification``: sort pairs of image and text into classes, such as SNLI-VE's."""

from __future__ import annotations

from typing import Any

import torch
from lavis.models.albef_models.albef_outputs import AlbefOutputWithLogits
from torch import Tensor, nn

from softmask_plugin.config.options import ClassificationOptions
from softmask_plugin.errors import require_finite_scores
from softmask_plugin.losses import distilled_cross_entropy
from softmask_plugin.models.base import shipped_types
from softmask_plugin.models.distillation import DistilledBase
from softmask_plugin.nn.vision import Visible
from softmask_plugin.registry import register
from softmask_plugin.tokenization import Captions


@register("model", "softmask_classification")
class SoftMaskClassification(DistilledBase):
    """A two-layer head on the multi-modal [CLS], with the state-dict keys and losses of LAVIS's
    ``albef_classification``."""

    OPTIONS = ClassificationOptions
    HEADS = ("cls_head",)
    PRETRAINED_MODEL_CONFIG_DICT = shipped_types("softmask_classification", "ve", "small", "tiny")

    def __init__(self, options: ClassificationOptions) -> None:
        super().__init__(options)
        width = options.bert.width
        self.cls_head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, options.num_classes)
        )
        self.add_momentum("visual_encoder", "text_encoder", "cls_head")

    def forward(self, samples: dict[str, Any], is_train: bool = True) -> Any:
        """Compute the loss of one step (a scalar) and logits (B, classes); in training mode, also
        update the momentum model.

        Args:
            samples: The images that ``images`` takes, ``text_input`` (list of B sentences),
                ``label`` (B,), whole numbers, bool or a list, and ``epoch``, ``iters``,
                ``num_iters_per_epoch`` from LAVIS's tasks.
            is_train: False: return what ``predict`` does, as LAVIS's classes do.
        """
        if not is_train:
            return self.predict(samples)
        draws, alpha = self.progress(samples)
        images = self.visual_encoder.visible(self.images(samples), draws)
        captions = self.tokenize(samples["text_input"])
        logits, teacher = self.logits(images, captions), None
        self.update_momentum()
        if self.options.use_distill and alpha > 0:
            with torch.no_grad():
                teacher = self.logits(images, captions, "_m")
        loss = distilled_cross_entropy(logits, self.labels(samples), teacher, alpha)
        return AlbefOutputWithLogits(loss=loss, logits=logits)

    @torch.no_grad()
    def predict(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        """Logits (B, classes) as ``predictions`` and, if there is a ``label``, the labels as
        ``targets``, for LAVIS's task ``multimodal_classification``; UserError if a logit is NaN or
        infinite."""
        logits = self.logits(self.images(samples), self.tokenize(samples["text_input"]))
        require_finite_scores("a class's score", logits)
        targets = {"targets": self.labels(samples)} if "label" in samples else {}
        return {"predictions": logits, **targets}

    def images(self, samples: dict[str, Any]) -> Tensor:
        """Take ``image``, (B, 3, H, W), from the samples."""
        return samples["image"]

    def labels(self, samples: dict[str, Any]) -> Tensor:
        """Class of each pair, (B,); LAVIS after 1.0.2 gives a list."""
        labels = torch.as_tensor(samples["label"], device=self.device)
        return labels if labels.is_floating_point() else labels.long()  # bool is natural for NLVR2

    def logits(self, images: Tensor | Visible, captions: Captions, suffix: str = "") -> Tensor:
        """Logits (B, classes) of the model or, with suffix "_m", of its momentum copy."""
        fused = self.fuse(images, captions, captions.packing.cls_only, suffix)
        return self.part("cls_head", suffix)(fused.cls)
