"""What the models that learn by contrast share: momentum encoders, queues, ITC, hard negatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lavis.common.dist_utils import is_dist_avail_and_initialized
from lavis.models.base_model import concat_all_gather
from torch import Tensor, nn

from softmask_plugin.models.base import SoftMaskBase
from softmask_plugin.nn.momentum import MomentumPairs, momentum_copy
from softmask_plugin.nn.queue import enqueue_, random_queue
from softmask_plugin.nn.sampling import Draws, sample_negatives
from softmask_plugin.nn.tokens import Layout, Tokens
from softmask_plugin.options import PretrainOptions
from softmask_plugin.registry import get_loss_class


class Features(NamedTuple):
    """What the online or the momentum encoders make of a batch."""

    image: Tensor  # image states, (B, S, width)
    text: Tokens  # of N >= B captions: those for ITC come first
    image_feat: Tensor  # unit vectors, (B, embed_dim), float32
    text_feat: Tensor  # unit vectors, (B, embed_dim), float32


class ContrastiveBase(SoftMaskBase):
    """Encoders, their momentum copies and the feature queues of ALBEF (arXiv 2107.07651, 3.2)."""

    def __init__(self, options: PretrainOptions) -> None:
        super().__init__(options)
        self.visual_encoder_m = momentum_copy(self.visual_encoder)
        self.text_encoder_m = momentum_copy(self.text_encoder)
        self.vision_proj_m = momentum_copy(self.vision_proj)
        self.text_proj_m = momentum_copy(self.text_proj)
        self.momentum = MomentumPairs(
            [
                (self.visual_encoder, self.visual_encoder_m),
                (self.text_encoder, self.text_encoder_m),
                (self.vision_proj, self.vision_proj_m),
                (self.text_proj, self.text_proj_m),
            ]
        )
        self.register_buffer("image_queue", random_queue(options.embed_dim, options.queue_size))
        self.register_buffer("text_queue", random_queue(options.embed_dim, options.queue_size))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        # Reading queue_ptr would wait for the device, so the host counts along.
        self.pointer: int | None = None
        self.register_load_state_dict_post_hook(forget_pointer)
        self.itc_loss = get_loss_class(options.itc.loss)(options.itc.gamma)
        self.calls = 0  # counts steps for training loops that give no `iters`
        self.ranks_agree = False
        # Equal on every rank once made so; DDP would broadcast them again at each step.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_buffers(remove_duplicate=False)
        ]

    def load_encoders(self) -> None:
        """As the base class does; the momentum encoders then start as copies."""
        super().load_encoders()
        self.momentum.copy()

    def progress(self, samples: dict[str, Any]) -> tuple[int, float]:
        """Index of the step in the run, and the weight of the momentum model's soft targets."""
        if "iters" not in samples:
            self.calls += 1
            return self.calls - 1, self.options.alpha
        per_epoch = samples["num_iters_per_epoch"]
        step = samples["epoch"] * per_epoch + samples["iters"]
        ramp = self.options.alpha_epochs * per_epoch
        return step, self.options.alpha * (min(1.0, step / ramp) if ramp > 0 else 1.0)

    def encode(self, images: Tensor, ids: Tensor, layout: Layout) -> Features:
        """Online features: images (B, 3, H, W), captions (N, T), the first B of them for ITC."""
        return _encode(
            images,
            ids,
            layout,
            self.visual_encoder,
            self.bert.encode,
            self.vision_proj,
            self.text_proj,
        )

    @torch.no_grad()
    def encode_slowly(self, images: Tensor, ids: Tensor, layout: Layout) -> Features:
        """Momentum features, after the momentum encoders took their step."""
        if self.training:
            self.agree_across_ranks()
            self.momentum.update(self.options.momentum)
        return _encode(
            images,
            ids,
            layout,
            self.visual_encoder_m,
            self.text_encoder_m.bert.encode,
            self.vision_proj_m,
            self.text_proj_m,
        )

    def contrast(
        self, online: Features, slow: Features, alpha: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ITC loss against batch and queue, and the similarities within the batch, (B, B) each."""
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        size = len(online.image_feat)
        with torch.autocast(online.image_feat.device.type, enabled=False):  # logits need the digits
            # These copies are what autograd keeps, so the queues may change in place.
            texts = torch.cat([slow.text_feat.T, self.text_queue], dim=1)
            images = torch.cat([slow.image_feat.T, self.image_queue], dim=1)
            sim_i2t = online.image_feat @ texts / self.temp
            sim_t2i = online.text_feat @ images / self.temp
            with torch.no_grad():
                targets_i2t = _mixed_targets(slow.image_feat, texts, self.temp, alpha)
                targets_t2i = _mixed_targets(slow.text_feat, images, self.temp, alpha)
            loss = self.itc_loss(sim_i2t, sim_t2i, targets_i2t, targets_t2i)
        if self.training:
            self.enqueue(slow.image_feat, slow.text_feat)
        return loss, sim_i2t[:, :size].detach(), sim_t2i[:, :size].detach()

    def negatives(self, sim_i2t: Tensor, sim_t2i: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """A hard negative image for each caption, and a hard negative caption for each image."""
        stream = draws.stream("negatives", sim_i2t.device)
        positives = torch.eye(len(sim_i2t), dtype=torch.bool, device=sim_i2t.device)
        images = sample_negatives(sim_t2i, positives, stream)
        return images, sample_negatives(sim_i2t, positives, stream)

    def matching_loss(self, positives: Tokens, *negatives: Tokens) -> Tensor:
        """ITM: cross-entropy of the multi-modal [CLS] of matching pairs and of others."""
        cls = [group.cls for group in (positives, *negatives)]
        logits = self.match(torch.cat(cls))
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        labels[: len(cls[0])] = 1
        return F.cross_entropy(logits.float(), labels)

    @torch.no_grad()
    def enqueue(self, image_feat: Tensor, text_feat: Tensor) -> None:
        """Put the features of all ranks into the queues."""
        if self.pointer is None:
            self.pointer = int(self.queue_ptr)
        queues = (self.image_queue, self.text_queue)
        features = [concat_all_gather(feat) for feat in (image_feat, text_feat)]
        self.pointer = enqueue_(queues, features, self.pointer)
        self.queue_ptr.fill_(self.pointer)

    @torch.no_grad()
    def agree_across_ranks(self) -> None:
        """Once: make momentum encoders and queues those of rank 0, as DDP does with parameters.

        LAVIS seeds each rank differently, so they start out different.
        """
        if not self.ranks_agree and is_dist_avail_and_initialized():
            for buffer in self.buffers():
                torch.distributed.broadcast(buffer, src=0)
        self.ranks_agree = True


def forget_pointer(model: nn.Module, _: Any) -> None:
    """After loading weights, the host's count of the queue's position is void."""
    model.pointer = None  # type: ignore[assignment]


def _encode(
    images: Tensor,
    ids: Tensor,
    layout: Layout,
    vision: Callable[[Tensor], Tensor],
    encode_text: Callable[[Tensor, Layout], Tokens],
    vision_proj: nn.Module,
    text_proj: nn.Module,
) -> Features:
    image, text = vision(images), encode_text(ids, layout)
    image_feat = F.normalize(vision_proj(image[:, 0]).float(), dim=-1)
    text_feat = F.normalize(text_proj(text.cls[: len(images)]).float(), dim=-1)
    return Features(image, text, image_feat, text_feat)


def _mixed_targets(feat: Tensor, bank: Tensor, temp: Tensor, alpha: float) -> Tensor:
    """One-hot targets mixed with the momentum model's: (B, width), (width, C) -> (B, C)."""
    one_hot = torch.zeros(len(feat), bank.shape[1], device=feat.device)
    one_hot.fill_diagonal_(1 - alpha)
    if alpha == 0:
        return one_hot
    return one_hot.add_((feat @ bank / temp).softmax(dim=1), alpha=alpha)
