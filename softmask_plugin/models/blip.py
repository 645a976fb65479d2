"""``softmask_blip_retrieval`` and ``softmask_blip_pretrain``: BLIP (arXiv 2201.12086) with masks.

What sets BLIP apart from ALBEF: all layers of its text encoder have cross-attention, which captions
alone skip, and a caption that meets an image starts with [ENC] in place of [CLS].
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lavis.common.dist_utils import is_dist_avail_and_initialized
from lavis.models.base_model import all_gather_with_grad, concat_all_gather
from torch import Tensor, nn
from transformers import BertTokenizerFast

from softmask_plugin.config.options import BlipPretrainOptions, BlipRetrievalOptions, ModelOptions
from softmask_plugin.losses import distilled_cross_entropy
from softmask_plugin.models.aligned import Features
from softmask_plugin.models.base import bert_of, require_pairs, shipped_types
from softmask_plugin.models.contrastive import ContrastiveBase, ContrastiveOutput, Similarity
from softmask_plugin.models.retrieval import SoftMaskRetrieval
from softmask_plugin.nn.bert import BertForMaskedLM, BertModel, BertShape
from softmask_plugin.nn.tokens import DecoderText, Packing, Tokens
from softmask_plugin.registry import register

# First tokens of a caption that the decoder writes, and of one that is matched with an image
DEC, ENC = "[DEC]", "[ENC]"


class BlipBert(BertModel):
    """BLIP's text encoder, with images (``encode``, ``fuse``) or without (``encode_alone``)."""

    def __init__(self, shape: BertShape, enc_id: int) -> None:
        super().__init__(shape)
        self.enc_id = enc_id

    def encode(self, ids: Tensor, packing: Packing) -> Tokens:
        """Embed captions, from their ids (N, T), for fusion."""
        return super().encode(starting_with(self.enc_id, ids), packing)

    def encode_alone(self, ids: Tensor, packing: Packing, wanted: Packing | None = None) -> Tokens:
        """States of captions without images, from their ids (N, T); ``wanted`` as in ``fuse``."""
        return self.fuse(super().encode(ids, packing), None, wanted=wanted)


class BlipBase(ContrastiveBase):
    """BLIP's encoders under the names of LAVIS's BLIP."""

    def build_tokenizer(self, options: ModelOptions) -> BertTokenizerFast:
        """Build the tokenizer, with two special tokens more than BERT's."""
        tokenizer: Any = super().build_tokenizer(options)
        tokenizer.add_special_tokens({"bos_token": DEC, "additional_special_tokens": [ENC]})
        tokenizer.enc_token_id = tokenizer.convert_tokens_to_ids(ENC)  # as LAVIS has it
        return tokenizer

    def build_text_encoder(self, shape: BertShape) -> nn.Module:
        """Build the text and multi-modal encoder."""
        return BlipBert(shape, self.tokenizer.enc_token_id)

    def encode_captions(
        self, ids: Tensor, packing: Packing, suffix: str = ""
    ) -> tuple[Tokens, Tokens, Tensor]:
        """As in the base class: their embeddings, the states of words if a loss needs them, and
        unit vectors."""
        bert, option = bert_of(self.part("text_encoder", suffix)), self.options
        needs_words = option.text_pool == "mean" or (option.local_weight > 0 and not suffix)
        words = bert.encode_alone(ids, packing, packing if needs_words else packing.cls_only)
        features = self.text_features(self.pooled(words), suffix)
        return bert.encode(ids, packing), words, features


@register("model", "softmask_blip_retrieval")
class SoftMaskBlipRetrieval(BlipBase, SoftMaskRetrieval):
    """ITC and ITM, in which pairs of the same image match each other.

    By default it computes the losses of LAVIS's ``blip_retrieval``, with its state-dict keys.
    """

    OPTIONS = BlipRetrievalOptions
    PRETRAINED_MODEL_CONFIG_DICT = shipped_types(
        "softmask_blip_retrieval", "coco", "flickr", "tiny"
    )

    def contrast(
        self, online: Features, momentum: Features, alpha: float, ids: Tensor | None = None
    ) -> tuple[Tensor, Similarity]:
        """As in the base class, but online features alone decide how hard negatives are, and with
        ``negative_all_rank`` all ranks' pairs are candidates."""
        loss, batch = super().contrast(online, momentum, alpha, ids)
        if not (self.options.negative_all_rank and is_dist_avail_and_initialized()):
            return loss, self.likeness(online, online.image_feat, online.text_feat, batch.same)
        images, texts, others = map(concat_all_gather, (online.image_feat, online.text_feat, ids))
        own = self.likeness(online, images, texts, ids[:, None] == others)  # type: ignore[index]
        states = all_gather_with_grad(online.image), self.gather_captions(online.text)
        return loss, Similarity(*own[:3], *states)

    @torch.no_grad()
    def likeness(self, online: Features, images: Tensor, texts: Tensor, same: Tensor) -> Similarity:
        """Logits of the batch against the unit vectors of candidates, (M, embed_dim) each."""
        with torch.autocast(images.device.type, enabled=False):
            i2t, t2i = online.image_feat @ texts.T, online.text_feat @ images.T
        return Similarity(i2t / self.temp, t2i / self.temp, same)

    def gather_captions(self, text: Tokens) -> Tokens:
        """The captions of all ranks."""
        room = self.options.max_txt_len - text.packing.mask.shape[1]  # ranks differ in length
        grid = nn.functional.pad(text.packing.pad(text.states), (0, 0, 0, room))
        mask = nn.functional.pad(text.packing.mask, (0, room))
        mask = concat_all_gather(mask.byte()).bool()
        cells = torch.arange(mask.numel(), device=mask.device)
        return Tokens(all_gather_with_grad(grid).flatten(0, 1), Packing(mask, cells))


@register("model", "softmask_blip_pretrain")
class SoftMaskBlipPretrain(BlipBase):
    """ITC, ITM and captioning with a text-driven soft mask and focal ITC.

    With ``soft_mask.enabled: false`` and ``itc.gamma: 0``, it computes the losses of LAVIS's
    ``blip_pretrain``. State-dict keys are the same.
    """

    OPTIONS = BlipPretrainOptions
    PRETRAINED_MODEL_CONFIG_DICT = shipped_types(
        "softmask_blip_pretrain", "base", "grounded", "tiny"
    )

    def __init__(self, options: BlipPretrainOptions) -> None:
        super().__init__(options)
        self.text_decoder = tied_decoder(self.bert)
        self.add_momentum("visual_encoder", "text_encoder", "vision_proj", "text_proj")

    def forward(self, samples: dict[str, Any]) -> ContrastiveOutput:
        """Compute a step's losses; in training mode, also update momentum encoders and queues.

        Args:
            samples: ``image`` (B, 3, H, W), ``text_input`` (list of B captions), and ``epoch``,
                ``iters``, ``num_iters_per_epoch`` from LAVIS's tasks.
        """
        draws, alpha = self.progress(samples)
        images = self.visual_encoder.visible(samples["image"], draws)
        clean = self.caption_tokenizer.tokenize(samples["text_input"])
        require_pairs(len(clean.ids), len(images))
        text, changed = self.as_matched(clean, draws)
        ids = starting_with(self.tokenizer.bos_token_id, clean.ids)
        written = DecoderText.of(ids, clean.mask, self.device)

        online = self.encode(images, text.ids, text.packing)
        momentum = self.encode_momentum(images, text.ids, text.packing)
        loss_itc, similarity = self.contrast(online, momentum, alpha)
        loss_local = self.contrast_words(online)
        memory = self.bert.remember(online.image)  # the decoder's as well

        mask, logits = None, None
        if self.masks_at(draws.step) and self.options.soft_mask.score == "word":
            predicted = written.predicting.cells_in(text.words.shape[1]) + 1
            logits, mask = self.draw_word_mask(
                lambda view: self.text_decoder.decode(written, memory, view),
                online.image,
                text.words,
                predicted,
                written.targets,
                draws,
            )
        mask, loss_itm, loss_soft = self.match_clean(
            online, text, changed, memory, similarity, draws, mask
        )
        if logits is None:
            logits = self.text_decoder.decode(written, memory)
        smoothing = self.options.label_smoothing
        loss_lm = distilled_cross_entropy(logits, written.targets, None, 0.0, smoothing)
        return self.output(
            mask, itc=loss_itc, itm=loss_itm, soft=loss_soft, local=loss_local, lm=loss_lm
        )

    def contrast(
        self, online: Features, momentum: Features, alpha: float, ids: Tensor | None = None
    ) -> tuple[Tensor, Similarity]:
        """As in the base class, but no pair of the batch is too easy to be drawn as a negative."""
        loss, (i2t, t2i, same, *_) = super().contrast(online, momentum, alpha, ids)
        i2t, t2i = ((each.softmax(dim=1) + 1e-4).log() for each in (i2t, t2i))
        return loss, Similarity(i2t, t2i, same)


def starting_with(token: int, ids: Tensor) -> Tensor:
    """Captions' ids (N, T) with another first token."""
    return torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], dim=1)


def tied_decoder(encoder: BertModel) -> BertForMaskedLM:
    """A decoder that shares all with an encoder but self-attention and the head."""
    decoder = BertForMaskedLM(replace(encoder.shape, causal=True))
    decoder.bert.embeddings = encoder.embeddings
    decoder.cls.predictions.decoder.weight = encoder.embeddings.word_embeddings.weight
    for own, shared in zip(decoder.bert.encoder.layer, encoder.encoder.layer, strict=True):
        own.crossattention = shared.crossattention
        own.intermediate, own.output = shared.intermediate, shared.output
    return decoder
