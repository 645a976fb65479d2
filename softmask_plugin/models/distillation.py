"""Momentum distillation (ALBEF, arXiv 2107.07651, 3.3): a slow copy of a model teaches it."""

from __future__ import annotations

from typing import Any

import torch
from lavis.common.dist_utils import is_dist_avail_and_initialized
from torch import Tensor, nn

from softmask_plugin.models.base import SoftMaskBase, bert_of
from softmask_plugin.nn.momentum import MomentumPairs, momentum_copy
from softmask_plugin.nn.tokens import Packing, Tokens


class MomentumDistillation(SoftMaskBase):
    """Keeps momentum copies ``<name>_m`` of some modules, and the weight of what they teach.

    Attributes:
        paced: whether a runner calls ``advance`` after each optimizer step that it takes, and
            ``retract`` in place of one that it skips. What moves once per step then moves there,
            however many batches were accumulated. Otherwise (LAVIS's runners) each forward pass
            in training moves it, as in LAVIS's ALBEF; the sequence of values is the same.
    """

    paced = False

    def add_momentum(self, *names: str) -> None:
        """Copy these modules. To be called last in ``__init__``, once all buffers are there."""
        for name in names:
            setattr(self, f"{name}_m", momentum_copy(getattr(self, name)))
        pairs = [(getattr(self, name), getattr(self, f"{name}_m")) for name in names]
        self.momentum = MomentumPairs(pairs)
        self.ranks_agree = False
        # Equal on every rank once made so; DDP would broadcast them again at each step.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_buffers(remove_duplicate=False)
        ]

    def part(self, name: str, suffix: str) -> nn.Module:
        """A module, or with "_m" its momentum copy."""
        return getattr(self, name + suffix)

    def load_encoders(self) -> None:
        """As the base class does; the momentum encoders then start as copies."""
        super().load_encoders()
        self.momentum.copy()

    def progress(self, samples: dict[str, Any]) -> tuple[int, float]:
        """Index of the step in the run, and the weight of the momentum model's soft targets."""
        step, alpha = self.step_of(samples), self.options.alpha
        ramp = self.options.alpha_epochs * samples.get("num_iters_per_epoch", 0)
        return step, alpha * (min(1.0, step / ramp) if ramp > 0 else 1.0)

    def advance(self) -> None:
        """After an optimizer step: move what moves once per step (see ``paced``)."""
        self.momentum.update(self.options.momentum)

    def retract(self) -> None:
        """In place of an optimizer step: forget what the forward passes left for it."""

    def move_momentum(self) -> None:
        """In training: let the momentum copies take their step towards the online modules."""
        if self.training:
            self.agree_across_ranks()
            if not self.paced:
                self.momentum.update(self.options.momentum)

    @torch.no_grad()
    def agree_across_ranks(self) -> None:
        """Once: make momentum encoders and queues those of rank 0, as DDP does with parameters.

        LAVIS seeds each rank differently, so they start out different.
        """
        if not self.ranks_agree and is_dist_avail_and_initialized():
            for buffer in self.buffers():
                torch.distributed.broadcast(buffer, src=0)
        self.ranks_agree = True


class DistilledBase(MomentumDistillation):
    """Fine-tuned models that read images and text together, and learn from labels."""

    def add_momentum(self, *names: str) -> None:
        """As the base class does; none with ``use_distill: false``."""
        super().add_momentum(*(names if self.options.use_distill else ()))

    def fuse(
        self, images: Tensor, text: tuple[Tensor, Packing], wanted: Packing | None, suffix: str = ""
    ) -> Tokens:
        """Multi-modal states of some tokens.

        Args:
            images: (B, 3, H, W); of two images per text (2B, 3, H, W), all first ones first.
            text: ids (B, T) and where their tokens are.
            wanted: the tokens that will be read; None: all.
            suffix: "_m" for the momentum model.
        """
        bert, (ids, packing) = bert_of(self.part("text_encoder", suffix)), text
        states = self.part("visual_encoder", suffix)(images)
        memory = bert.remember(*states.split(len(ids)))
        return bert.fuse(bert.encode(ids, packing), memory, wanted=wanted)
