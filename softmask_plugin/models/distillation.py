"""Momentum distillation: a momentum copy of the model teaches it (ALBEF, arXiv 2107.07651, 3.3)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lavis.common.dist_utils import is_dist_avail_and_initialized
from torch import Tensor

from softmask_plugin.models.base import SoftMaskBase, bert_of, require_pairs
from softmask_plugin.nn.momentum import MomentumPairs, momentum_copy
from softmask_plugin.nn.sampling import Draws
from softmask_plugin.nn.tokens import Packing, Tokens
from softmask_plugin.nn.vision import Visible
from softmask_plugin.tokenization import Captions


class MomentumDistillation(SoftMaskBase):
    """Keeps a momentum copy ``<name>_m`` of some modules, and the weight of its soft targets.

    Attributes:
        paced: Whether a runner calls ``advance`` after each optimizer step, or ``retract`` if it
            skips the step. If so, momentum copies and queues change once per optimizer step, even
            with accumulated gradients. If not (LAVIS's runners), they change in every forward pass
            of training, as in LAVIS's ALBEF. Either way step t sees the same values if the copies
            start equal to the online modules; otherwise the first forward pass moves unpaced ones
            once more.
    """

    paced = False

    def add_momentum(self, *names: str) -> None:
        """Copy these modules. Call it last in ``__init__``, after all buffers are registered."""
        for name in names:
            setattr(self, f"{name}_m", momentum_copy(getattr(self, name)))
        pairs = [(getattr(self, name), getattr(self, f"{name}_m")) for name in names]
        self.momentum = MomentumPairs(pairs)
        self.ranks_agree = False
        # Once equal, they stay equal on all ranks; DDP would broadcast them at every step.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_buffers(remove_duplicate=False)
        ]

    def load_encoders(self) -> None:
        """As in the base class; the momentum encoders then start as copies."""
        super().load_encoders()
        self.momentum.restart()

    def progress(self, samples: dict[str, Any]) -> tuple[Draws, float]:
        """The draws of the step, and the weight alpha of the soft targets."""
        step, alpha = self.step_of(samples), self.options.alpha
        ramp = self.options.alpha_epochs * samples.get("num_iters_per_epoch", 0)
        draws = Draws(torch.initial_seed(), step)
        return draws, alpha * (min(1.0, step / ramp) if ramp > 0 else 1.0)

    def advance(self) -> None:
        """After an optimizer step: update what changes once per step (see ``paced``)."""
        self.momentum.update(self.options.momentum)

    def retract(self) -> None:
        """Instead of an optimizer step: drop what the forward passes left for it."""

    def update_momentum(self) -> None:
        """In training mode, update the momentum copies unless a runner does (see ``paced``)."""
        if self.training:
            self.agree_across_ranks()
            if not self.paced:
                self.momentum.update(self.options.momentum)

    @torch.no_grad()
    def agree_across_ranks(self) -> None:
        """Once, copy rank 0's momentum encoders and queues to all ranks, as DDP copies parameters:
        LAVIS seeds each rank differently."""
        if not self.ranks_agree and is_dist_avail_and_initialized():
            for buffer in self.buffers():
                torch.distributed.broadcast(buffer, src=0)
        self.ranks_agree = True


class DistilledBase(MomentumDistillation):
    """Fine-tuned models that fuse images with text, and learn from labels."""

    IMAGES: ClassVar[int] = 1  # of each text

    def add_momentum(self, *names: str) -> None:
        """As in the base class; copies nothing if ``use_distill`` is false."""
        super().add_momentum(*(names if self.options.use_distill else ()))

    def fuse(
        self, images: Tensor | Visible, captions: Captions, wanted: Packing | None, suffix: str = ""
    ) -> Tokens:
        """Multi-modal states of the ``wanted`` tokens (None: all) of B captions; with suffix "_m",
        those of the momentum model.

        Images are B, or 2B for two per caption, all first ones first, as the image encoder takes
        them. UserError if they are any other number.
        """
        bert = bert_of(self.part("text_encoder", suffix))
        require_pairs(len(captions.ids), len(images), self.IMAGES)
        states = self.part("visual_encoder", suffix)(images)
        memory = bert.remember(*states.split(len(captions.ids)))
        return bert.fuse(bert.encode(captions.ids, captions.packing), memory, wanted=wanted)
