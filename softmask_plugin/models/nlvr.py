"""``softmask_nlvr``: is a statement true of two images (NLVR2; ALBEF, arXiv 2107.07651, 5)?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lavis.models.albef_models.albef_outputs import AlbefOutput
from torch import Tensor, nn

from softmask_plugin.config.options import AlignedOptions, NlvrOptions
from softmask_plugin.models.base import SoftMaskBase, require_pairs, shipped_types
from softmask_plugin.models.classification import SoftMaskClassification
from softmask_plugin.nn.bert import BertModel, BertShape
from softmask_plugin.nn.momentum import momentum_copy
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

    IMAGES = 2
    OPTIONS = NlvrOptions
    PRETRAINED_MODEL_CONFIG_DICT = shipped_types("softmask_nlvr", "nlvr", "small", "tiny")

    def images(self, samples: dict[str, Any]) -> Tensor:
        """Take ``image0``, then ``image1``, from the samples: (2B, 3, H, W)."""
        return torch.cat([samples["image0"], samples["image1"]])


@register("model", "softmask_nlvr_pretrain")
class SoftMaskNlvrPretrain(TwoImageBase):
    """Text assignment, ALBEF's pre-training for NLVR2: does a caption belong to the first of two
    images, to the second, or to neither?

    Trains on image-text pairs. It starts from a checkpoint of ``softmask_pretrain``, and
    ``softmask_nlvr`` starts from its checkpoints. It has no momentum model. As in the original
    ALBEF, other images are drawn by their similarity to the caption's own, which is that of ITC.
    """

    OPTIONS = AlignedOptions
    PRETRAINED_MODEL_CONFIG_DICT = shipped_types("softmask_nlvr_pretrain", "base", "small", "tiny")

    def __init__(self, options: AlignedOptions) -> None:
        super().__init__(options)
        self.vision_proj = momentum_copy(nn.Linear(options.vit.width, options.embed_dim))
        self.ta_head = nn.Linear(options.bert.width, 3)

    def forward(self, samples: dict[str, Any]) -> AlbefOutput:
        """Compute the loss of one step from ``image`` (B, 3, H, W) and ``text_input`` (list of B
        captions); the wrong images of a caption come from the batch."""
        draws = Draws(torch.initial_seed(), self.step_of(samples))
        captions = self.tokenize(samples["text_input"])
        require_pairs(len(captions.ids), len(samples["image"]))
        states = self.visual_encoder(self.visual_encoder.visible(samples["image"], draws))
        features = nn.functional.normalize(self.vision_proj(states[:, 0].detach()).float(), dim=-1)
        first, second, label = assign(features @ features.T / self.options.temp, draws)
        memory = self.bert.remember(states[first], states[second])
        text, cls_only = self.bert.encode(captions.ids, captions.packing), captions.packing.cls_only
        logits = self.ta_head(self.bert.fuse(text, memory, wanted=cls_only).cls).float()
        return AlbefOutput(loss=nn.functional.cross_entropy(logits, label))


def assign(similarity: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Draw two images of the batch for each of B captions.

    Args:
        similarity: Logits of the similarity of images, (B, B). Other images are drawn in proportion
            to the softmax of the row of the caption's own.
        draws: Random streams of the step.

    Returns:
        Index of the first and of the second image, (B,) each, and the label, (B,): 0 if the first
        image is the caption's own, 1 if the second is, 2 if neither is. The other images are not
        the caption's own, except in a batch of one, and two different ones from a batch of three.
    """
    size, device = len(similarity), similarity.device
    own, stream = torch.arange(size, device=device), draws.stream("assignment", device)
    label = torch.randint(3, (size,), generator=stream, device=device)
    # The largest of logits plus Gumbel noise are draws without replacement
    noise = -torch.empty(size, size, device=device).exponential_(generator=stream).log()
    scores = (similarity + noise).fill_diagonal_(-torch.inf)
    others = scores.topk(min(2, max(size - 1, 1)), dim=1).indices
    one, another = others[:, 0], others[:, -1]
    first = torch.where(label == 0, own, one)
    second = torch.where(label == 1, own, torch.where(label == 0, one, another))
    return first, second, label
