"""What the models that learn by contrast share: queues, ITC, hard negatives, the soft mask, ITM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from lavis.models.base_model import concat_all_gather
from torch import Tensor, nn

from softmask_plugin.config.options import ContrastOptions
from softmask_plugin.models.aligned import AlignedBase
from softmask_plugin.models.base import bert_of
from softmask_plugin.models.distillation import MomentumDistillation
from softmask_plugin.nn.image_memory import ImageMemory, View
from softmask_plugin.nn.pairs import Pairs
from softmask_plugin.nn.queue import enqueue_, random_queue
from softmask_plugin.nn.sampling import Draws, sample_negatives
from softmask_plugin.nn.tokens import Packing, Tokens
from softmask_plugin.registry import get_loss_class
from softmask_plugin.soft_mask import (
    Kind,
    WordChoice,
    grad_cam,
    keep_factors,
    normalize,
    pick_words,
    word_map,
)


class Features(NamedTuple):
    """What the online or the momentum encoders make of a batch."""

    image: Tensor  # image states, (B, S, width)
    text: Tokens  # of N >= B captions: those for ITC come first
    image_feat: Tensor  # unit vectors, (B, embed_dim), float32
    text_feat: Tensor  # unit vectors, (B, embed_dim), float32


class Similarity(NamedTuple):
    """Logits within a batch, (B, B) each, and which pairs match, bool."""

    i2t: Tensor
    t2i: Tensor
    same: Tensor


class Hidden(NamedTuple):
    """What the soft mask did: factor of each image token, (B, S), and the picked word of each
    caption, (B,), -1 where there was none to pick; None while the mask is off."""

    keep: Tensor | None = None
    word: Tensor | None = None


class ContrastiveBase(AlignedBase, MomentumDistillation):
    """Encoders, their momentum copies and the feature queues of ALBEF (arXiv 2107.07651, 3.2)."""

    def __init__(self, options: ContrastOptions) -> None:
        super().__init__(options)
        if not options.learn_temp:  # a frozen parameter would be left out of LAVIS's checkpoints
            fixed = self.temp.detach()
            del self.temp
            self.register_buffer("temp", fixed)
        self.register_buffer("image_queue", random_queue(options.embed_dim, options.queue_size))
        self.register_buffer("text_queue", random_queue(options.embed_dim, options.queue_size))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        # Reading queue_ptr would wait for the device, so the host counts along.
        self.pointer: int | None = None
        self.fresh: list[Mapping[str, Tensor]] = []  # features of the step that is not over yet
        self.register_load_state_dict_post_hook(forget_pointer)
        self.itc_loss = get_loss_class(options.itc.loss)(options.itc.gamma)

    @property
    def map_layer(self) -> int:
        """BERT layer whose cross-attention gives the maps of words."""
        return self.options.soft_mask.layer

    def encode(self, images: Tensor, ids: Tensor, packing: Packing) -> Features:
        """Online features: images (B, 3, H, W), captions (N, T), the first B of them for ITC."""
        return self._encode(images, ids, packing, "")

    @torch.no_grad()
    def encode_slowly(self, images: Tensor, ids: Tensor, packing: Packing) -> Features:
        """Momentum features, after the momentum encoders took their step (see ``paced``)."""
        self.move_momentum()
        return self._encode(images, ids, packing, "_m")

    def _encode(self, images: Tensor, ids: Tensor, packing: Packing, suffix: str) -> Features:
        names = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
        vision, text_encoder, vision_proj, text_proj = (self.part(name, suffix) for name in names)
        image, text = vision(images), bert_of(text_encoder).encode(ids, packing)
        image_feat = F.normalize(vision_proj(image[:, 0]).float(), dim=-1)
        text_feat = F.normalize(text_proj(text.cls[: len(images)]).float(), dim=-1)
        return Features(image, text, image_feat, text_feat)

    # ---- ITC

    def contrast(
        self, online: Features, slow: Features, alpha: float, ids: Tensor | None = None
    ) -> tuple[Tensor, Similarity]:
        """ITC loss against batch and queue.

        Args:
            online, slow: features of the batch.
            alpha: weight of the momentum model's soft targets.
            ids: image of each pair, (B,), where pairs of one image match each other (which needs an
                ``idx_queue``); None: each pair matches itself alone.
        """
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
            positives = self.positives(len(online.image_feat), ids)
        size = len(online.image_feat)
        with torch.autocast(online.image_feat.device.type, enabled=False):  # logits need the digits
            # These copies are what autograd keeps, so the queues may change in place.
            texts = torch.cat([slow.text_feat.T, self.text_queue], dim=1)
            images = torch.cat([slow.image_feat.T, self.image_queue], dim=1)
            sim_i2t = online.image_feat @ texts / self.temp
            sim_t2i = online.text_feat @ images / self.temp
            with torch.no_grad():
                targets_i2t = _mixed_targets(positives, slow.image_feat, texts, self.temp, alpha)
                targets_t2i = _mixed_targets(positives, slow.text_feat, images, self.temp, alpha)
            loss = self.itc_loss(sim_i2t, sim_t2i, targets_i2t, targets_t2i)
        if self.training:
            fresh = {"image_queue": slow.image_feat, "text_queue": slow.text_feat}
            self.fresh.append(fresh if ids is None else {**fresh, "idx_queue": ids[:, None]})
            if not self.paced:
                self.enqueue_fresh()
        i2t, t2i = sim_i2t[:, :size].detach(), sim_t2i[:, :size].detach()
        return loss, Similarity(i2t, t2i, positives[:, :size])

    def positives(self, size: int, ids: Tensor | None) -> Tensor:
        """Which entries of batch and queue each pair matches, bool (B, B + queue)."""
        if ids is not None:
            return ids[:, None] == torch.cat([ids, self.idx_queue[0]])
        return torch.eye(
            size, size + self.image_queue.shape[1], dtype=torch.bool, device=self.device
        )

    def advance(self) -> None:
        """After an optimizer step: also put the step's features into the queues."""
        self.enqueue_fresh()
        super().advance()

    def retract(self) -> None:
        """In place of an optimizer step: its features do not enter the queues."""
        self.fresh.clear()

    def enqueue_fresh(self) -> None:
        """Put the features of the forward passes since the last time into the queues."""
        rows = {name: torch.cat([each[name] for each in self.fresh]) for name in self.fresh[0]}
        self.fresh.clear()
        self.enqueue(rows)

    @torch.no_grad()
    def enqueue(self, rows: Mapping[str, Tensor]) -> None:
        """Put rows (n, width) of all ranks into the queues of these names."""
        if self.pointer is None:
            self.pointer = int(self.queue_ptr)
        queues = [getattr(self, name) for name in rows]
        everyone = [concat_all_gather(each) for each in rows.values()]
        self.pointer = enqueue_(queues, everyone, self.pointer)
        self.queue_ptr.fill_(self.pointer)

    # ---- Soft mask and ITM

    def pair_up(
        self,
        caption: Tokens,
        memory: ImageMemory,
        words: Tensor,
        scored: Packing,
        similarity: Similarity,
        draws: Draws,
        step: int,
    ) -> tuple[Pairs, Hidden]:
        """Positive and negative pairs and, where the soft mask is on, masked ones, to be fused.

        Args:
            caption: text states of B captions.
            memory: of their images.
            words: word index per token, -1 where the soft mask may not pick, (B, T).
            scored: the tokens of a positive pair that the losses read.
            similarity: what hard negatives are drawn by.
            draws: random streams of the step.
            step: index of the step in the run.

        Returns:
            Groups "positive", "negative image", "negative text", "soft" and "soft negative", those
            that there are; and what was hidden.
        """
        option, pairs, hidden = self.options.soft_mask, Pairs(), Hidden()
        if option.enabled and step >= option.start_iter:
            # Positives go first, since the mask is drawn from their score
            fused, hidden = self.hide_a_word(caption, words, scored, memory, draws)
            pairs.add_fused("positive", fused)
            wanted = scored if option.in_mlm else None
            pairs.add("soft", caption, View(keep=hidden.keep), wanted)
        else:
            pairs.add("positive", caption, wanted=scored)
        if len(words) > 1:  # a batch of one has no negatives
            image, other = self.negatives(similarity, draws)
            pairs.add("negative image", caption, View(images=image))
            pairs.add("negative text", caption.take(other))
            if hidden.keep is not None and option.negatives:
                pairs.add("soft negative", caption.take(other), View(keep=hidden.keep))
        return pairs, hidden

    def negatives(self, similarity: Similarity, draws: Draws) -> tuple[Tensor, Tensor]:
        """A hard negative image for each caption, and a hard negative caption for each image."""
        i2t, t2i, same = similarity
        stream = draws.stream("negatives", same.device)
        return sample_negatives(t2i, same, stream), sample_negatives(i2t, same, stream)

    def hide_a_word(
        self, caption: Tokens, words: Tensor, scored: Packing, memory: ImageMemory, draws: Draws
    ) -> tuple[Tokens, Hidden]:
        """Fuse the positive pairs, pick a word of each caption, and hide what it refers to.

        Returns:
            Multi-modal states of the positive pairs' scored tokens, and what was hidden.
        """
        option, device = self.options.soft_mask, words.device
        # The options are checked, but OmegaConf has no Literal type for them.
        choice, kind = cast(WordChoice, option.words), cast(Kind, option.kind)
        with torch.enable_grad():  # the map is a gradient, under no_grad as well
            fused, attention = self.bert.fuse_with_attention(
                caption, memory, self.map_layer, scored
            )
            cam = grad_cam(self.match(fused.cls)[:, 1], attention)
        word = pick_words(cam, words, choice, draws.stream("word", device))
        hidden = normalize(word_map(cam, words, word))
        patches = draws.stream("patches", device)
        return fused, Hidden(keep_factors(hidden, kind, option.strength, patches), word)

    def matching_losses(
        self, fused: dict[str, Tokens], similarity: Similarity
    ) -> tuple[Tensor, Tensor | None]:
        """ITM of the plain pairs, and that of the masked ones; None where the mask is off."""
        # Where all images of a batch are one, there is no negative: what was drawn does not count.
        exists = ~similarity.same.all(dim=1)
        itm = self.matching_loss(fused["positive"], named("negative", fused), exists)
        if "soft" not in fused:
            return itm, None
        return itm, self.matching_loss(fused["soft"], named("soft negative", fused), exists)

    def matching_loss(self, positives: Tokens, negatives: list[Tokens], exists: Tensor) -> Tensor:
        """Cross-entropy of the multi-modal [CLS] of matching pairs and of others that exist."""
        logits = self.match(torch.cat([group.cls for group in (positives, *negatives)]))
        label = torch.where(exists, 0, IGNORED)
        labels = torch.cat([torch.ones_like(label), *(label for _ in negatives)])
        return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED)


IGNORED = -100  # the label that cross_entropy leaves out


def forget_pointer(model: nn.Module, _: Any) -> None:
    """After loading weights, the host's count of the queue's position is void."""
    model.pointer = None  # type: ignore[assignment]


def named(prefix: str, groups: dict[str, Tokens]) -> list[Tokens]:
    """The groups whose name starts with ``prefix``."""
    return [group for name, group in groups.items() if name.startswith(prefix)]


def _mixed_targets(
    positives: Tensor, feat: Tensor, bank: Tensor, temp: Tensor, alpha: float
) -> Tensor:
    """Equal shares for the positives (B, C), mixed with the momentum model's softmax of its
    features (B, width) against the bank (width, C): (B, C)."""
    hard = positives * ((1 - alpha) / positives.sum(dim=1, keepdim=True))
    if alpha == 0:
        return hard
    return hard.add_((feat @ bank / temp).softmax(dim=1), alpha=alpha)
