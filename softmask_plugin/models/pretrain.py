"""``softmask_pretrain``: the pre-training of SoftMask++ (arXiv 2304.00719, Figure 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from softmask_plugin.config.options import PretrainOptions
from softmask_plugin.config.paths import shipped
from softmask_plugin.losses import distilled_cross_entropy
from softmask_plugin.models.contrastive import ContrastiveBase, Features
from softmask_plugin.nn.image_memory import View
from softmask_plugin.nn.sampling import Draws, mask_tokens
from softmask_plugin.nn.tokens import Packing, Tokens
from softmask_plugin.registry import register


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
    packing: Packing  # their tokens
    tokens: Packing  # of a caption, clean or masked, in a grid (B, T)
    masked: Packing  # those that MLM predicts
    scored: (
        Packing  # those that the losses read of a positive pair: [CLS], and if shared the masked
    )
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

    OPTIONS = PretrainOptions
    PREDICTS_WORDS = True
    PRETRAINED_MODEL_CONFIG_DICT = {
        "base": shipped("models/softmask_pretrain_base.yaml"),
        "tiny": shipped("models/softmask_pretrain_tiny.yaml"),
        "scenes_tiny": shipped("models/softmask_pretrain_scenes_tiny.yaml"),
    }

    def __init__(self, options: PretrainOptions) -> None:
        super().__init__(options)
        self.add_momentum("visual_encoder", "text_encoder", "vision_proj", "text_proj")

    def forward(self, samples: dict[str, Any]) -> PretrainOutput:
        """Losses of one step; in training mode also moves the momentum encoders and the queues.

        Args:
            samples: ``image`` (B, 3, H, W), ``text_input`` list of B captions, and, as LAVIS's
                tasks give them, ``epoch``, ``iters``, ``num_iters_per_epoch``.
        """
        images, option = samples["image"], self.options
        step, alpha = self.progress(samples)
        draws = Draws(torch.initial_seed(), step)
        text = self.read_masked(samples["text_input"], draws)

        # Encode: each image once, each caption once
        online = self.encode(images, text.ids, text.packing)
        slow = self.encode_slowly(images, text.ids, text.packing)
        memory = self.bert.remember(online.image)
        caption, masked_caption = text.versions(online.text)

        # Contrast
        loss_itc, similarity = self.contrast(online, slow, alpha)

        # Soft-mask and match
        pairs, hidden = self.pair_up(
            caption, memory, text.words, text.scored, similarity, draws, step
        )
        masked_words = hidden.keep is not None and option.soft_mask.in_mlm
        if not option.text.shared:
            pairs.add("words", masked_caption, wanted=text.masked)
            if masked_words:
                pairs.add("soft words", masked_caption, View(keep=hidden.keep), text.masked)
        fused = pairs.fuse(self.bert, memory)
        loss_itm, loss_soft = self.matching_losses(fused, similarity)

        # Predict words
        taught = self.taught_words(slow, text, alpha)
        loss_mlm = self.word_loss(fused.get("words", fused["positive"]), text, taught, alpha)
        loss_mlm_soft = None
        if masked_words:
            words = fused.get("soft words", fused["soft"])
            loss_mlm_soft = self.word_loss(words, text, taught, alpha)

        loss = self.weighted_sum(loss_itc, loss_itm, loss_mlm, loss_soft, loss_mlm_soft)
        return PretrainOutput(
            loss=loss,
            loss_itc=loss_itc,
            loss_itm=loss_itm,
            loss_mlm=loss_mlm,
            loss_soft=loss_soft,
            loss_mlm_soft=loss_mlm_soft,
            keep=hidden.keep,
            word=hidden.word,
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

    def read_masked(self, captions: list[str], draws: Draws) -> Text:
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
        tokens, masked, scored = Packing.of(clean.mask), Packing.of(chosen), chosen.clone()
        scored[:, 0] = True
        shared = option.text.shared
        seen = masked_ids if shared else clean.ids
        return Text(
            ids=seen if shared else torch.cat([seen, masked_ids]),
            packing=tokens if shared else Packing.cat([tokens, tokens]),
            tokens=tokens,
            masked=masked,
            scored=Packing.of(scored) if shared else tokens.cls_only,
            words=self.reader.pickable(clean, seen, option.soft_mask.words == "content"),
            targets=clean.ids.flatten()[masked.index],
        ).to(self.device)

    @torch.no_grad()
    def taught_words(self, slow: Features, text: Text, alpha: float) -> Tensor | None:
        """The momentum model's logits of the masked words, (words, vocabulary)."""
        if alpha == 0:
            return None
        bert, (_, caption) = self.text_encoder_m.bert, text.versions(slow.text)
        fused = bert.fuse(caption, bert.remember(slow.image), wanted=text.masked)
        return self.text_encoder_m(fused.states)

    def word_loss(self, fused: Tokens, text: Text, taught: Tensor | None, alpha: float) -> Tensor:
        """MLM of the masked words, mixed with distillation; 0 where nothing was masked."""
        logits = self.text_encoder(fused.only(text.masked).states)
        if len(logits) == 0:
            return logits.float().sum()
        return distilled_cross_entropy(logits, text.targets, taught, alpha)
