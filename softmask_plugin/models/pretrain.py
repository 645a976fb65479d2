"""``softmask_pretrain``: the pre-training of SoftMask++ (arXiv 2304.00719, Figure 2)."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from softmask_plugin.config.options import PretrainOptions
from softmask_plugin.losses import distilled_cross_entropy
from softmask_plugin.models.aligned import Features
from softmask_plugin.models.base import require_pairs, shipped_types
from softmask_plugin.models.contrastive import ContrastiveBase, ContrastiveOutput
from softmask_plugin.models.masking import SoftMask
from softmask_plugin.nn.image_memory import View
from softmask_plugin.nn.pairs import Pairs
from softmask_plugin.nn.sampling import Draws, mask_tokens
from softmask_plugin.nn.tokens import Packing, Tokens
from softmask_plugin.registry import register


class Text(NamedTuple):
    """The captions of a step. N = B if one masked caption serves all losses; otherwise N = 2B: the
    clean captions, then the masked ones for MLM."""

    ids: Tensor  # (N, T)
    changed: Tensor  # those for ITM with one word changed, if they can be, (B, T)
    packing: Packing  # of all N captions
    tokens: Packing  # of the B captions, clean or masked
    masked: Packing  # the tokens that MLM predicts
    scored: Packing  # the tokens that a positive pair's losses need: [CLS] and, if shared, masked
    words: Tensor  # word index of each token, (B, T); -1 where the soft mask may not pick. For the
    # word's own map it may only pick what [MASK] hides, for that of the match only the rest.
    targets: Tensor  # ids that MLM predicts, (masked tokens,)

    def to(self, device: torch.device) -> Text:
        """Copy from the host to a device, without waiting for it."""
        parts: Any = (cast(Any, part).to(device, non_blocking=True) for part in self)
        return Text(*parts)

    def captions(self, masked: bool) -> tuple[Tensor, Packing]:
        """Ids and packing of all N captions, or without those that are ``masked`` for MLM alone."""
        return (self.ids, self.packing) if masked else (self.ids[: len(self.words)], self.tokens)

    def versions(self, encoded: Tokens) -> tuple[Tokens, Tokens]:
        """Split encoded captions: those for ITC and ITM, and those for MLM; the same if shared."""
        parts = encoded.split([self.tokens] * (len(encoded.packing.mask) // len(self.words)))
        return parts[0], parts[-1]


@register("model", "softmask_pretrain")
class SoftMaskPretrain(ContrastiveBase):
    """ALBEF's pre-training with a text-driven soft mask, focal ITC and shared masked captions.

    With ``soft_mask.enabled: false``, ``itc.gamma: 0`` and ``text.shared: false``, it computes the
    losses of LAVIS's ``albef_pretrain``. State-dict keys are the same.
    """

    OPTIONS = PretrainOptions
    PREDICTS_WORDS = True
    PRETRAINED_MODEL_CONFIG_DICT = shipped_types(
        "softmask_pretrain", "base", "grounded", "small", "tiny", "scenes_tiny"
    )

    def __init__(self, options: PretrainOptions) -> None:
        super().__init__(options)
        self.add_momentum("visual_encoder", "text_encoder", "vision_proj", "text_proj")

    def forward(self, samples: dict[str, Any]) -> ContrastiveOutput:
        """Compute a step's losses; in training mode, also update momentum encoders and queues.

        Args:
            samples: ``image`` (B, 3, H, W), ``text_input`` (list of B captions), and ``epoch``,
                ``iters``, ``num_iters_per_epoch`` from LAVIS's tasks.
        """
        (draws, alpha), option = self.progress(samples), self.options
        images = self.visual_encoder.visible(samples["image"], draws)
        text = self.tokenize_masked(samples["text_input"], draws)
        require_pairs(len(text.words), len(images))

        # Encode: each image once, each caption once, those for MLM where it needs them
        matches = draws.step >= self.first_match
        online = self.encode(images, *text.captions(masked=matches))
        momentum = self.encode_momentum(images, *text.captions(masked=matches and alpha > 0))
        caption, masked_caption = text.versions(online.text)
        online = online._replace(text=caption, words=caption)

        # Contrast
        loss_itc, similarity = self.contrast(online, momentum, alpha)
        loss_local = self.contrast_words(online)
        if not matches:
            return self.output(SoftMask(), itc=loss_itc, local=loss_local)
        memory = self.bert.remember(online.image)

        # Mask: what a word of the caption means to the match or, hidden, to its own prediction, or
        # what is like it
        pairs, mask, logits = Pairs(), SoftMask(), None
        if self.masks_at(draws.step) and option.soft_mask.score == "word":
            group = "positive" if option.text.shared else "words"
            wanted = text.scored if option.text.shared else text.masked

            def predict(view: View) -> Tensor:
                pairs.fused[group] = self.bert.fuse(masked_caption, memory, (view,), wanted)
                return self.word_logits(pairs.fused[group], text)

            logits, mask = self.draw_word_mask(
                predict, online.image, text.words, text.masked.index, text.targets, draws
            )
        elif self.masks_at(draws.step):
            mask = self.draw_mask(pairs, online, text.words, text.scored, memory, draws)

        # Match
        self.add_pairs(pairs, caption, text.changed, mask, text.scored, similarity, draws)
        mlm_with_mask = mask.keep is not None and option.soft_mask.in_mlm
        if not option.text.shared:
            pairs.add("words", masked_caption, wanted=text.masked)
            if mlm_with_mask:
                pairs.add("soft words", masked_caption, View(keep=mask.keep), text.masked)
        groups = pairs.fuse(self.bert, memory)
        is_changed = (text.changed != text.ids[: len(text.changed)]).any(dim=1)
        loss_itm, loss_soft = self.matching_losses(groups, similarity, is_changed)

        # Predict words
        teacher = self.momentum_words(momentum, text, alpha)
        if logits is None:
            logits = self.word_logits(groups.get("words", groups["positive"]), text)
        loss_mlm = distilled_cross_entropy(logits, text.targets, teacher, alpha)
        loss_mlm_soft = None
        if mlm_with_mask:
            logits = self.word_logits(groups.get("soft words", groups["soft"]), text)
            loss_mlm_soft = distilled_cross_entropy(logits, text.targets, teacher, alpha)

        return self.output(
            mask,
            itc=loss_itc,
            itm=loss_itm,
            mlm=loss_mlm,
            soft=loss_soft,
            mlm_soft=loss_mlm_soft,
            local=loss_local,
        )

    def tokenize_masked(self, captions: list[str], draws: Draws) -> Text:
        """Tokenize and mask captions on the host, where finding the masked positions is free."""
        option = self.options
        clean = self.caption_tokenizer.tokenize(captions)
        masked_ids, chosen = mask_tokens(
            clean.ids,
            self.caption_tokenizer.maskable(clean),
            self.tokenizer.mask_token_id,
            len(self.tokenizer),  # the embedding may have spare rows
            option.text.mask_prob,
            draws.stream("mlm"),
        )
        tokens, masked, scored = clean.packing, Packing.of(chosen), chosen.clone()
        scored[:, 0] = True
        shared, own = option.text.shared, option.soft_mask.score == "word"
        seen = masked_ids if shared else clean.ids
        words = self.caption_tokenizer.pickable(
            clean, clean.ids if own else seen, option.soft_mask.words == "content"
        )
        if own:
            words = words.masked_fill(masked_ids != self.tokenizer.mask_token_id, -1)
        return Text(
            ids=seen if shared else torch.cat([seen, masked_ids]),
            changed=self.change_words(clean, seen, draws),
            packing=tokens if shared else Packing.cat([tokens, tokens]),
            tokens=tokens,
            masked=masked,
            scored=Packing.of(scored) if shared else tokens.cls_only,
            words=words,
            targets=clean.ids.flatten()[masked.index],
        ).to(self.device)

    @torch.no_grad()
    def momentum_words(self, momentum: Features, text: Text, alpha: float) -> Tensor | None:
        """The momentum model's logits of the masked words, (words, vocabulary)."""
        if alpha == 0:
            return None
        bert, (_, caption) = self.text_encoder_m.bert, text.versions(momentum.text)
        fused = bert.fuse(caption, bert.remember(momentum.image), wanted=text.masked)
        return self.text_encoder_m(fused.states)

    def word_logits(self, fused: Tokens, text: Text) -> Tensor:
        """Logits of the masked words, (words, vocabulary)."""
        return self.text_encoder(fused.only(text.masked).states)
