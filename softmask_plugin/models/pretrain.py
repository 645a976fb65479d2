"""``softmask_pretrain``: the pre-training of SoftMask++ (arXiv 2304.00719, Figure 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from softmask_plugin.models.contrastive import ContrastiveBase
from softmask_plugin.nn.bert import ImageMemory
from softmask_plugin.nn.image_memory import View
from softmask_plugin.nn.pairs import Pairs
from softmask_plugin.nn.sampling import Draws, mask_tokens
from softmask_plugin.nn.tokens import Layout, Tokens
from softmask_plugin.paths import shipped
from softmask_plugin.registry import register
from softmask_plugin.soft_mask import (
    Kind,
    WordChoice,
    grad_cam,
    keep_factors,
    normalize,
    pick_words,
    word_map,
)


@dataclass
class PretrainOutput(ModelOutput):
    """Losses of a step (scalars; None where an innovation is off) and what the mask did.

    ``keep`` is the factor of each image token, (B, 1 + patches); ``word`` the index of the picked
    word in each caption, (B,), -1 where there was none to pick.
    """

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_mlm: Tensor | None = None
    loss_soft: Tensor | None = None
    loss_mlm_soft: Tensor | None = None
    keep: Tensor | None = None
    word: Tensor | None = None


class Text(NamedTuple):
    """The captions of a step on the device. N = B where one masked caption serves all losses;
    otherwise N = 2B, the clean captions first, the masked ones for MLM after them."""

    ids: Tensor  # (N, T)
    layout: Layout  # their tokens
    tokens: Layout  # of a caption, clean or masked, in a grid (B, T)
    masked: Layout  # those that MLM predicts
    scored: Layout  # those that the losses read of a positive pair: [CLS], and if shared the masked
    words: Tensor  # word index per token, -1 where the soft mask may not pick, (B, T)
    targets: Tensor  # what MLM is to predict, (masked tokens,)

    def to(self, device: torch.device) -> Text:
        """Move to a device."""
        parts: Any = (cast(Any, part).to(device, non_blocking=True) for part in self)
        return Text(*parts)

    def versions(self, encoded: Tokens) -> tuple[Tokens, Tokens]:
        """The captions for ITC and ITM, and those for MLM: the same ones where they are shared."""
        parts = encoded.split([self.tokens] * (len(self.ids) // len(self.words)))
        return parts[0], parts[-1]


@register("model", "softmask_pretrain")
class SoftMaskPretrain(ContrastiveBase):
    """ALBEF pre-training with a text-driven soft mask, focal ITC and shared masked captions.

    With ``soft_mask.enabled: false``, ``itc.gamma: 0`` and ``text.shared: false`` it computes
    the losses of LAVIS's ``albef_pretrain``; state-dict keys are the same.
    """

    PRETRAINED_MODEL_CONFIG_DICT = {
        "base": shipped("models/softmask_pretrain_base.yaml"),
        "tiny": shipped("models/softmask_pretrain_tiny.yaml"),
    }

    def forward(self, samples: dict[str, Any]) -> PretrainOutput:
        """Losses of one step; in training mode also moves the momentum encoders and the queues.

        Args:
            samples: ``image`` (B, 3, H, W), ``text_input`` list of B captions, and, as LAVIS's
                tasks give them, ``epoch``, ``iters``, ``num_iters_per_epoch``.
        """
        images, option = samples["image"], self.options.soft_mask
        step, alpha = self.progress(samples)
        draws = Draws(torch.initial_seed(), step)
        text = self.read(samples["text_input"], draws)
        size = len(images)

        # Encode: each image once, each caption once
        online = self.encode(images, text.ids, text.layout)
        slow = self.encode_slowly(images, text.ids, text.layout)
        memory = self.bert.remember(online.image)
        caption, masked_caption = text.versions(online.text)

        # Contrast
        loss_itc, sim_i2t, sim_t2i = self.contrast(online, slow, alpha)

        # Soft-mask: positives go first, since the mask is drawn from their score
        pairs, fused, keep, word = Pairs(), {}, None, None
        if option.enabled and step >= option.start_iter:
            fused["positive"], keep, word = self.hide_a_word(caption, text, memory, draws)
            pairs.add("soft", caption, View(keep=keep), text.scored if option.in_mlm else None)
        else:
            pairs.add("positive", caption, wanted=text.scored)
        if size > 1:  # a batch of one has no negatives
            image, other = self.negatives(sim_i2t, sim_t2i, draws)
            pairs.add("negative image", caption, View(images=image))
            pairs.add("negative text", caption.take(other))
            if keep is not None and option.negatives:
                pairs.add("soft negative", caption.take(other), View(keep=keep))
        if not self.options.text.shared:
            pairs.add("words", masked_caption, wanted=text.masked)
        if not self.options.text.shared and keep is not None and option.in_mlm:
            pairs.add("soft words", masked_caption, View(keep=keep), text.masked)
        fused |= pairs.fuse(self.bert, memory)

        # Match
        loss_itm, loss_soft = self.matching_loss(fused["positive"], *named("negative", fused)), None
        if keep is not None:
            loss_soft = self.matching_loss(fused["soft"], *named("soft negative", fused))

        # Predict words
        soft_words = self.distilled_words(slow, text, alpha)
        words = fused.get("words", fused["positive"])
        loss_mlm, loss_mlm_soft = self.word_loss(words, text, soft_words, alpha), None
        if keep is not None and option.in_mlm:
            words = fused.get("soft words", fused["soft"])
            loss_mlm_soft = self.word_loss(words, text, soft_words, alpha)

        loss = self.weighted_sum(loss_itc, loss_itm, loss_mlm, loss_soft, loss_mlm_soft)
        return PretrainOutput(
            loss=loss,
            loss_itc=loss_itc,
            loss_itm=loss_itm,
            loss_mlm=loss_mlm,
            loss_soft=loss_soft,
            loss_mlm_soft=loss_mlm_soft,
            keep=keep,
            word=word,
        )

    def weighted_sum(
        self, itc: Tensor, itm: Tensor, mlm: Tensor, soft: Tensor | None, mlm_soft: Tensor | None
    ) -> Tensor:
        """The loss to minimise, from the terms as they are reported."""
        option = self.options
        loss = option.itc.weight * itc + option.itm_weight * itm + option.mlm_weight * mlm
        if soft is not None:
            loss = loss + option.soft_mask.weight * option.itm_weight * soft
        if mlm_soft is not None:
            loss = loss + option.soft_mask.weight * option.mlm_weight * mlm_soft
        return loss

    def read(self, captions: list[str], draws: Draws) -> Text:
        """Tokenize and mask captions on the host, where finding the masked positions is free."""
        option = self.options
        clean = self.reader.read(captions)
        masked_ids, chosen = mask_tokens(
            clean.ids,
            self.reader.maskable(clean),
            self.tokenizer.mask_token_id,
            len(self.tokenizer),  # the embedding may have rows to spare
            option.text.mask_prob,
            draws.stream("mlm"),
        )
        tokens, masked, scored = Layout.of(clean.mask), Layout.of(chosen), chosen.clone()
        scored[:, 0] = True
        shared = option.text.shared
        seen = masked_ids if shared else clean.ids
        return Text(
            ids=seen if shared else torch.cat([seen, masked_ids]),
            layout=tokens if shared else Layout.cat([tokens, tokens]),
            tokens=tokens,
            masked=masked,
            scored=Layout.of(scored) if shared else tokens.cls_only,
            words=self.reader.pickable(clean, seen, option.soft_mask.words == "content"),
            targets=clean.ids.flatten()[masked.index],
        ).to(self.device)

    def hide_a_word(
        self, caption: Tokens, text: Text, memory: ImageMemory, draws: Draws
    ) -> tuple[Tokens, Tensor, Tensor]:
        """Fuse the positive pairs, pick a word of each caption, and hide what it refers to.

        Returns:
            Multi-modal states of the positive pairs' scored tokens, the factors of the image tokens
            (B, S), and the picked words (B,).
        """
        option, device = self.options.soft_mask, text.words.device
        # The options are checked, but OmegaConf has no Literal type for them.
        choice, kind = cast(WordChoice, option.words), cast(Kind, option.kind)
        with torch.enable_grad():  # the map is a gradient, under no_grad as well
            fused, attention = self.bert.fuse_with_attention(
                caption, memory, option.layer, text.scored
            )
            cam = grad_cam(self.match(fused.cls)[:, 1], attention)
        word = pick_words(cam, text.words, choice, draws.stream("word", device))
        hidden = normalize(word_map(cam, text.words, word))
        patches = draws.stream("patches", device)
        return fused, keep_factors(hidden, kind, option.strength, patches), word

    @torch.no_grad()
    def distilled_words(self, slow: Any, text: Text, alpha: float) -> Tensor | None:
        """The momentum model's distributions of the masked words, (words, vocabulary)."""
        if alpha == 0:
            return None
        bert, (_, caption) = self.text_encoder_m.bert, text.versions(slow.text)
        fused = bert.fuse(caption, bert.remember(slow.image), wanted=text.masked)
        return self.text_encoder_m(fused.states).float().softmax(dim=-1)

    def word_loss(
        self, fused: Tokens, text: Text, soft_words: Tensor | None, alpha: float
    ) -> Tensor:
        """MLM of the masked words, mixed with distillation; 0 where nothing was masked."""
        logits = self.text_encoder(fused.only(text.masked).states).float()
        if len(logits) == 0:
            return logits.sum()
        loss = F.cross_entropy(logits, text.targets)
        if soft_words is None:
            return loss
        return (1 - alpha) * loss + alpha * F.cross_entropy(logits, soft_words)


def named(prefix: str, groups: dict[str, Tokens]) -> list[Tokens]:
    """The groups whose name starts with ``prefix``."""
    return [group for name, group in groups.items() if name.startswith(prefix)]
