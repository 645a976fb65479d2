"""``softmask_nlvr``: is a statement true of two images (NLVR2; ALBEF, arXiv 2107.07651, 5)?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from softmask_plugin.config.options import ModelOptions, NlvrOptions
from softmask_plugin.models.base import LossOutput, SoftMaskBase, shipped_types
from softmask_plugin.models.classification import SoftMaskClassification
from softmask_plugin.nn.bert import BertModel, BertShape
from softmask_plugin.nn.sampling import Draws
from softmask_plugin.registry import register


class TwoImageBase(SoftMaskBase):
    """Each fusion layer becomes two, one per image, which share their key and value projections."""

    def build_text_encoder(self, shape: BertShape) -> nn.Module:
        """Build a BERT with twice the fusion layers, tied in pairs."""
        bert = BertModel(replace(shape, layers=2 * shape.layers - shape.fusion_layer))
        layers = bert.fusion_layers
        for first, second in zip(layers[::2], layers[1::2], strict=True):
            first.crossattention.self.key = second.crossattention.self.key
            first.crossattention.self.value = second.crossattention.self.value
        return bert


@register("model", "softmask_nlvr")
class SoftMaskNlvr(TwoImageBase, SoftMaskClassification):
    """Sorts two images and a statement into false or true, with the state-dict keys of LAVIS's
    ``albef_nlvr``.

    For the soft targets, LAVIS fuses the momentum encoder's images with its online text encoder;
    this model uses the momentum text encoder, as ALBEF does.
    """

    OPTIONS = NlvrOptions
    PRETRAINED_MODEL_CONFIG_DICT = shipped_types("softmask_nlvr", "nlvr", "tiny")

    def images(self, samples: dict[str, Any]) -> Tensor:
        """Take ``image0``, then ``image1``, from the samples: (2B, 3, H, W)."""
        return torch.cat([samples["image0"], samples["image1"]])


@register("model", "softmask_nlvr_pretrain")
class SoftMaskNlvrPretrain(TwoImageBase):
    """Text assignment, ALBEF's pre-training for NLVR2: does a caption belong to the first of two
    images, to the second, or to neither?

    Trains on image-text pairs. It starts from a checkpoint of ``softmask_pretrain``, and
    ``softmask_nlvr`` starts from its checkpoints. It has no momentum model.
    """

    PRETRAINED_MODEL_CONFIG_DICT = shipped_types("softmask_nlvr_pretrain", "base", "tiny")

    def __init__(self, options: ModelOptions) -> None:
        super().__init__(options)
        self.ta_head = nn.Linear(options.bert.width, 3)

    def forward(self, samples: dict[str, Any]) -> LossOutput:
        """Compute the loss of one step.

        Args:
            samples: ``image`` (B, 3, H, W) and ``text_input`` (list of B captions); the wrong
                images of a caption come from the batch.
        """
        captions, size = self.tokenize(samples["text_input"]), len(samples["image"])
        draws = Draws(torch.initial_seed(), self.step_of(samples))
        first, second, label = assign(size, draws)
        states = self.visual_encoder(samples["image"])
        memory = self.bert.remember(states[first.to(self.device)], states[second.to(self.device)])
        text, cls_only = self.bert.encode(captions.ids, captions.packing), captions.packing.cls_only
        logits = self.ta_head(self.bert.fuse(text, memory, wanted=cls_only).cls).float()
        return LossOutput(loss=nn.functional.cross_entropy(logits, label.to(self.device)))


def assign(size: int, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Draw two images of the batch for each of B captions.

    Returns:
        Index of the first and of the second image, (B,) each, and the label, (B,): 0 if the first
        image is the caption's own, 1 if the second is, 2 if neither is. The other images are not
        the caption's own, except in a batch of one.
    """
    own, stream = torch.arange(size), draws.stream("assignment")
    label = torch.randint(3, (size,), generator=stream)
    steps = torch.randint(1, max(size, 2), (2, size), generator=stream)
    first, second = (own + steps) % size
    return torch.where(label == 0, own, first), torch.where(label == 1, own, second), label
