"""What the contrastive models share: queues, ITC, hard negatives, ITM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lavis.models.albef_models.albef_outputs import AlbefOutput
from lavis.models.base_model import concat_all_gather
from torch import Tensor, nn

from softmask_plugin.config.options import ContrastOptions
from softmask_plugin.losses import local_contrast, local_contrast_across
from softmask_plugin.models.aligned import Features
from softmask_plugin.models.distillation import MomentumDistillation
from softmask_plugin.models.masking import SoftMask, SoftMaskedBase
from softmask_plugin.nn.image_memory import ImageMemory, View
from softmask_plugin.nn.pairs import Pairs
from softmask_plugin.nn.queue import enqueue_, random_queue
from softmask_plugin.nn.sampling import Draws, sample_negatives
from softmask_plugin.nn.tokens import Packing, Tokens
from softmask_plugin.nn.vision import Visible
from softmask_plugin.registry import get_loss_class
from softmask_plugin.tokenization import Captions

IGNORED = -100  # the label that cross_entropy leaves out by default


@dataclass
class ContrastiveOutput(AlbefOutput):
    """Losses of a step (scalars, None if an innovation is off) and its soft mask (see SoftMask);
    ``loss`` is the weighted sum of the others."""

    loss_lm: Tensor | None = None
    loss_soft: Tensor | None = None
    loss_mlm_soft: Tensor | None = None
    loss_local: Tensor | None = None
    keep: Tensor | None = None
    word: Tensor | None = None


class Similarity(NamedTuple):
    """Logits of a batch against M candidates for negatives, (B, M) each, and which pairs match,
    bool. Candidates are the batch itself or, with their states, those of all ranks."""

    i2t: Tensor
    t2i: Tensor
    same: Tensor
    images: Tensor | None = None  # (M, S, width)
    texts: Tokens | None = None  # M captions as fusion takes them


class ContrastiveBase(SoftMaskedBase, MomentumDistillation):
    """ALBEF's encoders with their momentum copies and feature queues (arXiv 2107.07651, 3.2)."""

    def __init__(self, options: ContrastOptions) -> None:
        super().__init__(options)
        if not options.learn_temp:  # LAVIS's checkpoints would leave out a frozen parameter
            fixed = self.temp.detach()
            del self.temp
            self.register_buffer("temp", fixed)
        self.register_buffer("image_queue", random_queue(options.embed_dim, options.queue_size))
        self.register_buffer("text_queue", random_queue(options.embed_dim, options.queue_size))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        # A copy of queue_ptr on the host, which need not wait for the device
        self.pointer: int | None = None
        self.fresh: list[Mapping[str, Tensor]] = []  # features of the current step
        self.register_load_state_dict_post_hook(forget_pointer)
        self.itc_loss = get_loss_class(options.itc.loss)(options.itc.gamma)

    @property
    def first_match(self) -> int:
        """The first step with all losses, not ITC's alone."""
        return getattr(self.options, "itc_steps", 0)  # not every model has this option

    @torch.no_grad()
    def encode_momentum(self, images: Tensor | Visible, ids: Tensor, packing: Packing) -> Features:
        """Encode with the momentum encoders, once they are updated (see ``paced``)."""
        self.update_momentum()
        return self.encode(images, ids, packing, "_m")

    def encode(
        self, images: Tensor | Visible, ids: Tensor, packing: Packing, suffix: str = ""
    ) -> Features:
        """Encode B images, as the image encoder takes them, and captions (N, T), of which the first
        B are for ITC."""
        image = self.part("visual_encoder", suffix)(images)
        text, words, text_feat = self.encode_captions(ids, packing, suffix)
        image_feat = self.image_features(image[:, 0], suffix)
        return Features(image, text, words, image_feat, text_feat[: len(images)])

    # ---- ITC

    def contrast(
        self, online: Features, momentum: Features, alpha: float, ids: Tensor | None = None
    ) -> tuple[Tensor, Similarity]:
        """ITC loss against batch and queue.

        Args:
            online, momentum: Features of the batch.
            alpha: Weight of the momentum model's soft targets.
            ids: Image of each pair, (B,); pairs of the same image match each other, which needs an
                ``idx_queue``. None: each pair matches only itself.
        """
        size = len(online.image_feat)
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
            positives = self.positives(size, ids)
        with torch.autocast(online.image_feat.device.type, enabled=False):  # logits need the digits
            # Autograd keeps these copies, so the queues may change in place.
            texts = torch.cat([momentum.text_feat.T, self.text_queue], dim=1)
            images = torch.cat([momentum.image_feat.T, self.image_queue], dim=1)
            sim_i2t = online.image_feat @ texts / self.temp
            sim_t2i = online.text_feat @ images / self.temp
            targets_i2t = _mixed_targets(positives, momentum.image_feat, texts, self.temp, alpha)
            targets_t2i = _mixed_targets(positives, momentum.text_feat, images, self.temp, alpha)
            loss = self.itc_loss(sim_i2t, sim_t2i, targets_i2t, targets_t2i)
        if self.training and self.options.queue_size:
            fresh = {"image_queue": momentum.image_feat, "text_queue": momentum.text_feat}
            self.fresh.append(fresh if ids is None else {**fresh, "idx_queue": ids[:, None]})
            if not self.paced:
                self.enqueue_fresh()
        i2t, t2i = sim_i2t[:, :size].detach(), sim_t2i[:, :size].detach()
        return loss, Similarity(i2t, t2i, positives[:, :size])

    def positives(self, size: int, ids: Tensor | None) -> Tensor:
        """Which entries of batch and queue each pair matches, bool (B, B + queue)."""
        if ids is not None:
            return ids[:, None] == torch.cat([ids, self.idx_queue[0]])
        columns = size + self.image_queue.shape[1]
        return torch.eye(size, columns, dtype=torch.bool, device=self.device)

    def advance(self) -> None:
        """After an optimizer step: also put the step's features into the queues."""
        self.enqueue_fresh()
        super().advance()

    def retract(self) -> None:
        """Instead of an optimizer step: drop its features."""
        self.fresh.clear()

    @torch.no_grad()
    def enqueue_fresh(self) -> None:
        """Put the features of the current step, on all ranks, into the queues."""
        if not self.fresh:
            return
        if self.pointer is None:
            self.pointer = int(self.queue_ptr)
        queues = [getattr(self, name) for name in self.fresh[0]]
        rows = [torch.cat([each[name] for each in self.fresh]) for name in self.fresh[0]]
        self.fresh.clear()
        self.pointer = enqueue_(queues, [concat_all_gather(each) for each in rows], self.pointer)
        self.queue_ptr.fill_(self.pointer)

    def contrast_words(self, online: Features) -> Tensor | None:
        """Contrast each caption's tokens, but [CLS], with patches, as ``local_negatives`` says;
        None: ``local_weight`` is 0."""
        if not self.options.local_weight:
            return None
        words, packing = self.text_features(online.words.states), online.words.packing
        patches = self.image_features(online.image[:, 1:])
        with torch.autocast(patches.device.type, enabled=False):
            if self.options.local_negatives == "pair":
                grid = packing.pad(words)[:, 1:]
                return local_contrast(grid, patches, packing.mask[:, 1:], self.temp)
            columns = packing.mask.shape[1]
            rows, is_word = packing.index // columns, packing.index % columns > 0
            return local_contrast_across(words, patches, rows, is_word, self.temp)

    # ---- ITM

    def match_clean(
        self,
        online: Features,
        text: Captions,
        changed: Tensor,
        memory: ImageMemory,
        similarity: Similarity,
        draws: Draws,
        mask: SoftMask | None = None,
    ) -> tuple[SoftMask, Tensor, Tensor | None]:
        """Match captions that no loss masks, ``text`` and ``changed`` from ``as_matched``.

        Without a ``mask``, draw one if this step has one.

        Returns:
            The soft mask, and the losses of ``matching_losses``.
        """
        pairs, scored = Pairs(), text.packing.cls_only
        if mask is None and self.masks_at(draws.step):
            mask = self.draw_mask(pairs, online, text.words, scored, memory, draws)
        elif mask is None:
            mask = SoftMask()
        self.add_pairs(pairs, online.text, changed, mask, scored, similarity, draws)
        is_changed = (changed != text.ids).any(dim=1)
        groups = pairs.fuse(self.bert, memory)
        return mask, *self.matching_losses(groups, similarity, is_changed)

    def add_pairs(
        self,
        pairs: Pairs,
        caption: Tokens,
        changed: Tensor,
        mask: SoftMask,
        scored: Packing,
        similarity: Similarity,
        draws: Draws,
    ) -> None:
        """Add the pairs that ITM needs: "positive", "negative image", "negative text" and, with
        ``itm_words``, "negative words"; with a mask "soft" and, if masked images have negatives,
        "soft negative" and "soft negative words". A batch of one has only words as negatives.

        Args:
            caption: Text states of B captions.
            changed: Token ids of the captions with a word changed, (B, T).
            scored: The tokens of a positive pair that the losses need.
            similarity: Decides how hard negatives are drawn.
        """
        option, masked = self.options.soft_mask, View(keep=mask.keep)
        pairs.add("positive", caption, wanted=scored)
        if mask.keep is not None:
            pairs.add("soft", caption, masked, scored if option.in_mlm else None)
        if similarity.same.shape[1] > 1:
            image, other = self.negatives(similarity, draws)
            if similarity.images is None:
                pairs.add("negative image", caption, View(images=image))
            else:
                memory = self.bert.remember(similarity.images[image])
                fused = self.bert.fuse(caption, memory, wanted=caption.packing.cls_only)
                pairs.fused["negative image"] = fused
            wrong = (caption if similarity.texts is None else similarity.texts).take(other)
            pairs.add("negative text", wrong)
            if mask.keep is not None and option.negatives:
                pairs.add("soft negative", wrong, masked)
        if self.options.itm_words:
            words = self.bert.encode(changed, caption.packing)
            pairs.add("negative words", words)
            if mask.keep is not None and option.negatives:
                pairs.add("soft negative words", words, masked)

    def as_matched(self, clean: Captions, draws: Draws) -> tuple[Captions, Tensor]:
        """Captions that no loss masks, as ITM takes them, on the model's device: words that the
        soft mask may not pick have index -1. Also their ids with a word changed."""
        content_only = self.options.soft_mask.words == "content"
        words = self.caption_tokenizer.pickable(clean, clean.ids, content_only)
        changed = self.change_words(clean, clean.ids, draws)
        captions = replace(clean, words=words).to(self.device)
        return captions, changed.to(self.device, non_blocking=True)

    def change_words(self, captions: Captions, ids: Tensor, draws: Draws) -> Tensor:
        """The ids that ITM sees (B, T), with one word of each caption changed if it can be; as
        they are without ``itm_words``."""
        if not self.options.itm_words:
            return ids
        return self.caption_tokenizer.change_words(captions, ids, draws.stream("change"))

    def negatives(self, similarity: Similarity, draws: Draws) -> tuple[Tensor, Tensor]:
        """Draw a hard negative image for each caption, and a hard negative caption per image."""
        i2t, t2i, same, *_ = similarity
        stream, steps = draws.stream("negatives", same.device), self.options.itm_hard_steps
        hardness = min(1.0, (draws.step - self.first_match) / steps) if steps else 1.0
        image = sample_negatives(hardness * t2i, same, stream)
        return image, sample_negatives(hardness * i2t, same, stream)

    def matching_losses(
        self, fused: dict[str, Tokens], similarity: Similarity, changed: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """ITM of the unmasked pairs, and of the masked ones; None while the mask is off.

        Each is the mean cross-entropy of all its pairs, so with ``itm_words`` a positive has three
        negatives of the same weight. ``changed`` is True for captions that could be changed, (B,).
        """
        # If all pairs of a batch share an image, there are no negatives: what was drawn is ignored
        exists = ~similarity.same.all(dim=1)

        def loss(positive: str, negative: str) -> Tensor:
            labels, names = [torch.ones_like(exists, dtype=torch.long)], [positive]
            for name in fused:
                if name.startswith(negative):
                    found = changed if name.endswith("words") else exists
                    labels.append(torch.where(found, 0, IGNORED))
                    names.append(name)
            logits = self.match(torch.cat([fused[name].cls for name in names]))
            return F.cross_entropy(logits.float(), torch.cat(labels))

        soft = loss("soft", "soft negative") if "soft" in fused else None
        return loss("positive", "negative"), soft

    def output(self, mask: SoftMask, **losses: Tensor | None) -> ContrastiveOutput:
        """Sum the losses, ``itc`` to ``lm``, with their weights; None: not computed."""
        option = self.options
        weight = {
            "itc": option.itc.weight,
            "itm": option.itm_weight,
            "mlm": getattr(option, "mlm_weight", 0.0),  # not every model has this loss
            "lm": getattr(option, "lm_weight", 0.0),
            "local": option.local_weight,
        }
        weight["soft"] = option.soft_mask.weight * weight["itm"]
        weight["mlm_soft"] = option.soft_mask.weight * weight["mlm"]
        total: Any = sum(weight[name] * loss for name, loss in losses.items() if loss is not None)
        named = {f"loss_{name}": loss for name, loss in losses.items()}
        return ContrastiveOutput(loss=total, **named, **mask._asdict())


def forget_pointer(model: nn.Module, _: Any) -> None:
    """After loading weights, the host's copy of queue_ptr is out of date."""
    model.pointer = None  # type: ignore[assignment]


@torch.no_grad()
def _mixed_targets(
    positives: Tensor, feat: Tensor, bank: Tensor, temp: Tensor, alpha: float
) -> Tensor:
    """Targets (B, C): equal shares for the positives (B, C), mixed with the softmax of the momentum
    features (B, width) against the bank (width, C)."""
    hard = positives * ((1 - alpha) / positives.sum(dim=1, keepdim=True))
    if alpha == 0:
        return hard
    return hard.add_((feat @ bank / temp).softmax(dim=1), alpha=alpha)
