"""``softmask_nlvr``: is a statement true of two images (NLVR2; ALBEF, arXiv 2107.07651, 5)?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from softmask_plugin.config.options import ModelOptions, NlvrOptions
from softmask_plugin.config.paths import shipped
from softmask_plugin.models.base import SoftMaskBase
from softmask_plugin.models.classification import SoftMaskClassification
from softmask_plugin.nn.bert import BertModel, BertShape
from softmask_plugin.nn.sampling import Draws
from softmask_plugin.registry import register


class TwoImageBase(SoftMaskBase):
    """Each fusion layer becomes two, one per image, with the same keys and values' projections."""

    def build_text_encoder(self, shape: BertShape) -> nn.Module:
        """BERT with twice the fusion layers, each pair tied."""
        doubled = replace(shape, layers=2 * shape.layers - shape.fusion_layer)
        bert = BertModel(doubled)
        layers = bert.fusion_layers
        for first, second in zip(layers[::2], layers[1::2], strict=True):
            first.crossattention.self.key = second.crossattention.self.key
            first.crossattention.self.value = second.crossattention.self.value
        return bert


@register("model", "softmask_nlvr")
class SoftMaskNlvr(TwoImageBase, SoftMaskClassification):
    """Two images and a statement into false or true, with the state-dict keys of LAVIS's
    ``albef_nlvr``.

    LAVIS lets its online text encoder read the momentum encoder's images for the soft targets; here
    the momentum text encoder does, as in ALBEF.
    """

    OPTIONS = NlvrOptions
    PRETRAINED_MODEL_CONFIG_DICT = {
        name: shipped(f"models/softmask_nlvr_{name}.yaml") for name in ("nlvr", "tiny")
    }

    def images(self, samples: dict[str, Any]) -> Tensor:
        """What to look at: ``image0`` and then ``image1``, (2B, 3, H, W)."""
        return torch.cat([samples["image0"], samples["image1"]])


@dataclass
class AssignmentOutput(ModelOutput):
    """Loss of a step (a scalar)."""

    loss: Tensor | None = None


@register("model", "softmask_nlvr_pretrain")
class SoftMaskNlvrPretrain(TwoImageBase):
    """Text assignment, ALBEF's pretraining step for NLVR2: does a caption belong to the first of
    two images, to the second, or to none?

    Trains on image-text pairs, between ``softmask_pretrain``, whose checkpoints it reads, and
    ``softmask_nlvr``, which reads its own. It has no momentum model.
    """

    PRETRAINED_MODEL_CONFIG_DICT = {
        name: shipped(f"models/softmask_nlvr_pretrain_{name}.yaml") for name in ("base", "tiny")
    }

    def __init__(self, options: ModelOptions) -> None:
        super().__init__(options)
        self.ta_head = nn.Linear(options.bert.width, 3)

    def forward(self, samples: dict[str, Any]) -> AssignmentOutput:
        """Loss of one step.

        Args:
            samples: ``image`` (B, 3, H, W) and ``text_input`` list of B captions; the other images
                of the batch are what a caption does not belong to.
        """
        (ids, packing), size = self.read(samples["text_input"]), len(samples["image"])
        draws = Draws(torch.initial_seed(), self.step_of(samples))
        first, second, label = assign(size, draws)
        states = self.visual_encoder(samples["image"])
        memory = self.bert.remember(states[first.to(self.device)], states[second.to(self.device)])
        fused = self.bert.fuse(self.bert.encode(ids, packing), memory, wanted=packing.cls_only)
        logits = self.ta_head(fused.cls).float()
        return AssignmentOutput(loss=nn.functional.cross_entropy(logits, label.to(self.device)))


def assign(size: int, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Two images for each of B captions, and which of them the caption is of.

    Returns:
        Index of the first and of the second image, (B,) each, and the label, (B,): 0 where the
        first is the caption's own, 1 where the second is, 2 where neither is. The other images are
        any of the batch but the caption's own (which a batch of one has not).
    """
    own, stream = torch.arange(size), draws.stream("assignment")
    label = torch.randint(3, (size,), generator=stream)
    steps = torch.randint(1, max(size, 2), (2, size), generator=stream)
    first, second = (own + steps) % size
    return torch.where(label == 0, own, first), torch.where(label == 1, own, second), label
