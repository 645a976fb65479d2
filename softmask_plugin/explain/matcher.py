"""What maps and explanations need of a model with a matching head, and the models that have it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softmask_plugin.config.options import SoftMaskOptions
from softmask_plugin.errors import UserError
from softmask_plugin.models.aligned import AlignedBase
from softmask_plugin.models.blip import starting_with
from softmask_plugin.nn.image_memory import ImageMemory, View
from softmask_plugin.nn.tokens import DecoderText, Packing
from softmask_plugin.soft_mask import grad_cam, mask_effect, word_map
from softmask_plugin.tokenization import Captions, CaptionTokenizer

Target = Callable[[Tensor], Tensor]  # matching logits (N, 2) -> the score to explain, (N,)


def match_logit(logits: Tensor) -> Tensor:
    """The logit of a match, s⁺ of the paper: (N, 2) -> (N,)."""
    return logits[:, 1]


def match_probability(logits: Tensor) -> Tensor:
    """The probability of a match: (N, 2) -> (N,)."""
    return logits.softmax(dim=-1)[:, 1]


@dataclass(frozen=True)
class Pairs:
    """B captions with their images, as a matcher encodes them.

    Attributes:
        captions: Their tokens, padded to T.
        texts, images: Opaque: the captions and the N images, encoded.
        side: Patches on each side of an image.
        owners: Index of each caption's image, (B,), int64; None: caption i has image i.
    """

    captions: Captions
    texts: Any
    images: Any
    side: int
    owners: Tensor | None = None

    def images_of(self, rows: Tensor) -> Tensor:
        """Index of the image of each of these captions."""
        return rows if self.owners is None else self.owners[rows]


class Matcher(ABC):
    """A model with a matching head, as maps and explanations use it.

    Attributes:
        model: The model itself.
        caption_tokenizer: Splits captions as the model does.
        image_size: Sides of its images, pixels.
        layer: Layer whose cross-attention gives the maps by default.
        score: What the maps show by default, see ``soft_mask.score``.
        mask: Kind and strength of the masks that it trains with, or else the paper's.
    """

    caption_tokenizer: CaptionTokenizer
    image_size: int
    layer: int
    score: str = "match"
    mask: Any = SoftMaskOptions()

    def __init__(self, model: Any) -> None:
        self.model = model

    def tokenize(self, captions: Sequence[str]) -> Captions:
        """Tokenize captions, onto the model's device."""
        return self.caption_tokenizer.tokenize(captions).to(self.model.device)

    @torch.no_grad()  # no map needs the graph of the encoders
    def encode(self, images: Tensor, captions: Captions, owners: Tensor | None = None) -> Pairs:
        """Encode processed images (N, 3, H, W) and B captions."""
        seen, side = self.see(images.to(self.model.device))
        own = None if owners is None else owners.to(self.model.device)
        return Pairs(captions, self.read(captions), seen, side, own)

    def hide(self, pairs: Pairs, hidden: Tensor, rows: Tensor) -> Pairs:
        """These captions (n,) with [MASK] in place of the ``hidden`` tokens, (n, T)."""
        mask_id = self.caption_tokenizer.tokenizer.mask_token_id
        ids, words = pairs.captions.ids[rows], pairs.captions.words[rows]
        packing = Packing.of(pairs.captions.mask[rows])
        captions = Captions(ids.masked_fill(hidden, mask_id), packing, words)
        with torch.no_grad():
            texts = self.read(captions)
        return replace(pairs, captions=captions, texts=texts, owners=pairs.images_of(rows))

    @abstractmethod
    def see(self, images: Tensor) -> tuple[Any, int]:
        """Encode images; returns them and their patches on each side."""

    @abstractmethod
    def read(self, captions: Captions) -> Any:
        """Encode captions without images."""

    @abstractmethod
    def match(self, pairs: Pairs, rows: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Match captions with their images.

        Args:
            rows: Which captions, (n,), int64; None: all in turn.
            keep: Factor for each of their images' tokens, (n, 1 + patches); None: all ones.

        Returns:
            Matching logits (n, 2): [no match, match].
        """

    @abstractmethod
    def token_maps(
        self, pairs: Pairs, target: Target, layer: int | None, plain: bool
    ) -> tuple[Tensor, Tensor]:
        """Where each token looks: the attention of a layer, weighted by its gradient or ``plain``.

        Returns:
            Matching logits (B, 2), and maps (B, T, patches), >= 0, float32, detached.
        """

    def maps(
        self, pairs: Pairs, real: Tensor, target: Target, layer: int | None, plain: bool
    ) -> tuple[Tensor, Tensor]:
        """Where each ``real`` word (B, W) looks: the mean over its tokens, (B, W, patches)."""
        logits, cam = self.token_maps(pairs, target, layer, plain)
        return logits, maps_of_words(cam, pairs, real)

    def similarity_maps(self, pairs: Pairs) -> Tensor:
        """How similar to each token the patches are: ``similarity_map``, (B, T, patches).

        Raises:
            UserError: The model compares no words with patches.
        """
        raise UserError(
            f"{type(self.model).__name__} compares no words with patches: choose another method, "
            "such as gradcam"
        )

    def predict(self, pairs: Pairs, wanted: Tensor, keep: Tensor) -> Tensor:
        """Vocabulary logits (M, vocabulary) of the ``wanted`` tokens, (B, T), through ``keep``.

        Raises:
            UserError: The model has no MLM head.
        """
        raise UserError(
            f"{type(self.model).__name__} predicts no masked words, so it has no score of a word's "
            "own: choose another method, such as gradcam"
        )


class Seen(NamedTuple):
    """Images of a model of this plugin: their states, (N, S, width), and keys and values."""

    states: Tensor
    memory: ImageMemory


class AlignedMatcher(Matcher):
    """A model of this plugin."""

    model: AlignedBase

    def __init__(self, model: AlignedBase) -> None:
        super().__init__(model)
        self.caption_tokenizer, self.image_size = model.caption_tokenizer, model.options.image_size
        option = model.options
        if (mask := getattr(option, "soft_mask", None)) is None:  # it only matches
            self.layer, self.score = option.map_layer, option.map_score
        else:
            self.layer, self.score = mask.layer, mask.score
            self.mask = mask if mask.enabled else self.mask

    def see(self, images: Tensor) -> tuple[Any, int]:
        """The images, as ``Seen``."""
        states = self.model.visual_encoder(images)
        return Seen(states, self.model.bert.remember(states)), self.model.visual_encoder.grid

    def read(self, captions: Captions) -> Any:
        """The captions' states."""
        return self.model.bert.encode(captions.ids, captions.packing)

    def match(self, pairs: Pairs, rows: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """As ``Matcher.match``."""
        texts, view = pairs.texts, View(images=pairs.owners, keep=keep)
        if rows is not None:
            texts = texts.take(rows, trim=True)
            view = View(images=pairs.images_of(rows), keep=keep)
        fused = self.model.bert.fuse(texts, pairs.images.memory, (view,), texts.packing.cls_only)
        return self.model.match(fused.cls)

    def token_maps(
        self, pairs: Pairs, target: Target, layer: int | None, plain: bool
    ) -> tuple[Tensor, Tensor]:
        """As ``Matcher.token_maps``; ValueError if the layer has no cross-attention."""
        layer = self.layer if layer is None else layer
        view, cls = View(images=pairs.owners), pairs.texts.packing.cls_only
        with torch.enable_grad():
            fused, attention = self.model.bert.fuse_with_attention(
                pairs.texts, pairs.images.memory, layer, cls, view
            )
            logits = self.model.match(fused.cls)
            score = target(logits)
        return logits.detach(), attention_maps(score, attention, pairs.side, plain)

    def similarity_maps(self, pairs: Pairs) -> Tensor:
        """As ``Matcher.similarity_maps``."""
        states = pairs.images.states
        return self.model.similarity_maps(
            states if pairs.owners is None else states[pairs.owners], pairs.texts
        )

    def predict(self, pairs: Pairs, wanted: Tensor, keep: Tensor) -> Tensor:
        """As ``Matcher.predict``."""
        if self.model.headless or not hasattr(self.model.text_encoder, "cls"):
            return super().predict(pairs, wanted, keep)
        view = View(images=pairs.owners, keep=keep)
        packing = Packing.of(wanted)
        fused = self.model.bert.fuse(pairs.texts, pairs.images.memory, (view,), packing)
        return self.model.text_encoder(fused.states)


class BlipMatcher(AlignedMatcher):
    """Our BLIP, which encodes a caption anew to compare it."""

    def similarity_maps(self, pairs: Pairs) -> Tensor:
        """As ``Matcher.similarity_maps``; UserError also if no training made words like patches."""
        if not self.model.options.local_weight:
            return Matcher.similarity_maps(self, pairs)
        captions = pairs.captions
        words = self.model.encode_captions(captions.ids, captions.packing)[1]
        return super().similarity_maps(replace(pairs, texts=words))


class BlipPretrainMatcher(BlipMatcher):
    """Our BLIP in pretraining: its decoder predicts each word from those before it."""

    def hide(self, pairs: Pairs, hidden: Tensor, rows: Tensor) -> Pairs:
        """These captions as they are: the decoder does not see the word that it predicts."""
        return super().hide(pairs, torch.zeros_like(hidden), rows)

    def predict(self, pairs: Pairs, wanted: Tensor, keep: Tensor) -> Tensor:
        """As ``Matcher.predict``."""
        captions, view = pairs.captions, View(images=pairs.owners, keep=keep)
        ids = starting_with(self.model.tokenizer.bos_token_id, captions.ids)
        predicting = Packing.of(wanted[:, 1:])
        text = DecoderText(ids, captions.packing, predicting, captions.ids[wanted])
        return self.model.text_decoder.decode(text, pairs.images.memory, view)


def maps_of_words(cam: Tensor, pairs: Pairs, real: Tensor) -> Tensor:
    """Mean over the tokens of each ``real`` word: (B, T, patches), (B, W) -> (B, W, patches)."""
    words = torch.arange(real.shape[1], device=real.device).expand_as(real)
    each = torch.vmap(word_map, in_dims=(None, None, 1), out_dims=1)
    return each(cam, pairs.captions.words, words) * real[:, :, None]


@torch.enable_grad()
def effect_maps(
    matcher: Matcher,
    pairs: Pairs,
    real: Tensor,
    score: Callable[[Pairs, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Hide each word of each caption in turn, and map what a score then owes to each patch.

    Args:
        real: True for the words to map, (B, W).
        score: Given the n captions without their words, which tokens these are (n, T), the n
            captions' rows among the B, and factors of image tokens (n, 1 + patches), all ones.

    Returns:
        ``mask_effect`` of the scores, (B, W, patches).
    """
    rows, words = real.nonzero(as_tuple=True)
    hidden = pairs.captions.words[rows] == words[:, None]
    keep = torch.ones(len(rows), 1 + pairs.side**2, device=real.device, requires_grad=True)
    effect = mask_effect(score(matcher.hide(pairs, hidden, rows), hidden, rows, keep), keep)
    return effect.new_zeros(*real.shape, pairs.side**2).index_put((rows, words), effect)


@torch.enable_grad()
def attention_maps(score: Tensor, attention: Tensor, side: int, plain: bool) -> Tensor:
    """Grad-CAM of a score (B,), or the ``plain`` attention's mean over heads: (B, H, T, keys) ->
    (B, T, patches)."""
    first = attention.shape[-1] - side**2  # behind [CLS], if that has a key
    if plain:
        return attention.detach()[..., first:].float().mean(dim=1)
    return grad_cam(score, attention, first)
