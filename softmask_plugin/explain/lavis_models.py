"""LAVIS's own models with a matching head, as LAVIS builds them: ALBEF, BLIP and BLIP-2.

Attention is taken where LAVIS's modules hand it to dropout, by hooks that last for one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from math import isqrt
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.models.albef_models.albef_pretrain import AlbefPretrain
from lavis.models.albef_models.albef_retrieval import AlbefRetrieval
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from lavis.models.blip_models.blip_image_text_matching import BlipITM
from lavis.models.blip_models.blip_pretrain import BlipPretrain
from lavis.models.blip_models.blip_retrieval import BlipRetrieval
from torch import Tensor, nn
from transformers import BertTokenizerFast
from transformers.convert_slow_tokenizer import convert_slow_tokenizer

from softmask_plugin.errors import UserError
from softmask_plugin.explain.matcher import (
    AlignedMatcher,
    BlipMatcher,
    BlipPretrainMatcher,
    Matcher,
    Pairs,
    Target,
    attention_maps,
    effect_maps,
)
from softmask_plugin.models.aligned import AlignedBase
from softmask_plugin.models.base import bert_of
from softmask_plugin.models.blip import BlipBase, SoftMaskBlipPretrain
from softmask_plugin.nn.bert import require_cross_attention
from softmask_plugin.tokenization import Captions, CaptionTokenizer

ALBEF, BLIP = (AlbefPretrain, AlbefRetrieval), (BlipITM, BlipPretrain, BlipRetrieval)
WITH_HEAD = (AlignedBase, *ALBEF, *BLIP, Blip2Qformer)  # classes of all models to explain


class LavisMatcher(Matcher):
    """What these models share: images as states, captions as tokens, heads over [no, match]."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.caption_tokenizer = _caption_tokenizer(model.tokenizer, model.max_txt_len)
        self.image_size = _image_size(model.visual_encoder)

    def see(self, images: Tensor) -> tuple[Tensor, int]:
        """The images' states, (N, 1 + patches, width)."""
        states = self.model.visual_encoder(images)
        return states, isqrt(states.shape[1] - 1)

    def read(self, captions: Captions) -> Captions:
        """The tokens: no layer encodes text alone."""
        return captions

    def match(self, pairs: Pairs, rows: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """As ``Matcher.match``."""
        return self.logits(self.states(pairs, rows, keep))

    def states(self, pairs: Pairs, rows: Tensor | None = None, keep: Tensor | None = None) -> Any:
        """States of the last layer, (n, tokens, width)."""
        captions = pairs.captions
        if rows is None:
            rows = torch.arange(len(captions.ids), device=captions.ids.device)
        image = pairs.images[pairs.images_of(rows)]
        if keep is not None:
            image = image * keep[:, :, None]
        return self.fuse(captions.ids[rows], captions.mask[rows].long(), image)

    def fuse(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """States of the last layer from tokens (n, T) and image states."""
        raise NotImplementedError

    def logits(self, states: Tensor) -> Tensor:
        """Matching logits (n, 2) of the last layer's states."""
        raise NotImplementedError


class FusionMatcher(LavisMatcher):
    """ALBEF or BLIP: a BERT whose tokens attend to the image themselves."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.layers = bert_of(model.text_encoder).encoder.layer
        first = getattr(model.text_encoder.config, "fusion_layer", None)
        half, last = len(self.layers) // 2, len(self.layers) - 2
        # The defaults of ALBEF's authors and of LAVIS's compute_gradcam: 8 and 6 of 12
        self.layer = half if first is None else min(first + 2, last)

    def fuse(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """As ``LavisMatcher.fuse``."""
        if isinstance(self.model, BLIP):  # [ENC] in place of [CLS]
            ids = ids.index_fill(1, ids.new_zeros(1), self.model.tokenizer.enc_token_id)
        encode = bert_of(self.model.text_encoder)
        found = encode(ids, attention_mask=mask, encoder_hidden_states=image, return_dict=True)
        return found.last_hidden_state

    def logits(self, states: Tensor) -> Tensor:
        """As ``LavisMatcher.logits``."""
        return self.model.itm_head(states[:, 0])

    def token_maps(
        self, pairs: Pairs, target: Target, layer: int | None, plain: bool
    ) -> tuple[Tensor, Tensor]:
        """As ``Matcher.token_maps``: LAVIS's ``compute_gradcam``, for any size."""
        crossing = [i for i, each in enumerate(self.layers) if hasattr(each, "crossattention")]
        layer = self.layer if layer is None else layer
        require_cross_attention(layer, crossing)
        block = self.layers[layer]
        with torch.enable_grad(), attention_of(block.crossattention) as seen:
            logits = self.match(pairs)
            score = target(logits)
        return logits.detach(), attention_maps(score, seen[0], pairs.side, plain)

    def predict(self, pairs: Pairs, wanted: Tensor, keep: Tensor) -> Tensor:
        """As ``Matcher.predict``."""
        if not isinstance(self.model, AlbefPretrain):
            return super().predict(pairs, wanted, keep)
        return self.model.text_encoder.cls(self.states(pairs, keep=keep)[wanted])


class QformerMatcher(LavisMatcher):
    """BLIP-2: queries look at the image, and words meet them in self-attention.

    So no attention leads from a word to a patch. The plain map sums over queries q and layers::

        attention[w,i] = sum_q (sum_l self_l[q,w]) (sum_l cross_l[q,i])          mean over heads

    It finds what the queries look at, whatever the word. Weighing both factors by gradients, after
    Chefer et al. (arXiv 2103.15679), did not change that on scenes. Words differ in what they add
    to the match, and patches in what they give to that. So ::

        gradcam[w,i] = relu( d (s(m v, t) - s(m v, t - w)) / dm_i ) at m = 1

    is Grad-CAM at the image's features v, through all layers and queries, of what the match gains
    by word w: the score s of the caption t less that with [MASK] in place of w.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.layers = model.Qformer.bert.encoder.layer

    def see(self, images: Tensor) -> tuple[Tensor, int]:
        """As ``LavisMatcher.see``, normalised."""
        with self.model.maybe_autocast():
            states = self.model.ln_vision(self.model.visual_encoder(images))
        return states.float(), isqrt(states.shape[1] - 1)

    def fuse(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """States of the queries."""
        queries = self.model.query_tokens.expand(len(ids), -1, -1)
        found = self.model.Qformer.bert(
            ids,
            query_embeds=queries,
            attention_mask=torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1),
            encoder_hidden_states=image,
            return_dict=True,
        )
        return found.last_hidden_state[:, : queries.shape[1]]

    def logits(self, states: Tensor) -> Tensor:
        """The mean over the queries."""
        return self.model.itm_head(states).mean(dim=1)

    def maps(
        self, pairs: Pairs, real: Tensor, target: Target, layer: int | None, plain: bool
    ) -> tuple[Tensor, Tensor]:
        """As ``Matcher.maps``, with the equations above."""
        if layer is not None:
            raise UserError("a word map of BLIP-2 comes from all layers: leave out the layer")
        if plain:
            return super().maps(pairs, real, target, layer, plain)

        def added(without: Pairs, _: Tensor, rows: Tensor, keep: Tensor) -> Tensor:
            whole, less = self.match(pairs, rows, keep), self.match(without, None, keep)
            return target(whole) - target(less)

        with torch.no_grad():
            logits = self.match(pairs)
        return logits, effect_maps(self, pairs, real, added)

    def token_maps(
        self, pairs: Pairs, target: Target, layer: int | None, plain: bool
    ) -> tuple[Tensor, Tensor]:
        """The plain maps of tokens."""
        crossing = [each.crossattention for each in self.layers if each.has_cross_attention]
        shared = [each.attention for each in self.layers]
        with torch.no_grad(), attention_of(*shared) as own, attention_of(*crossing) as seen:
            logits = self.match(pairs)
        count = seen[0].shape[2]  # queries, which come before the caption
        reads = torch.stack([each.mean(dim=1)[:, :count, count:] for each in own]).sum(dim=0)
        looks = torch.stack([each.mean(dim=1)[:, :, 1:] for each in seen]).sum(dim=0)
        return logits, (reads.mT @ looks).float()


@contextmanager
def attention_of(*modules: Any) -> Iterator[list[Tensor]]:
    """Collect the probabilities (B, H, T, keys) of LAVIS's attention modules, in the graph, after
    softmax and before dropout, in the order of the pass."""
    found: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() and not inputs[0].requires_grad:  # all weights are frozen
            inputs[0].requires_grad_()
        found.append(inputs[0])

    with ExitStack() as hooks:
        for each in modules:
            hooks.enter_context(each.self.dropout.register_forward_pre_hook(keep))
        yield found


def matcher_of(model: Any) -> Matcher:
    """How to explain a model: one of this plugin, or of LAVIS as it is.

    Raises:
        UserError: It has no matching head that we know.
    """
    if isinstance(model, Matcher):
        return model
    model = getattr(model, "_orig_mod", model)  # behind torch.compile
    if isinstance(model, SoftMaskBlipPretrain):
        return BlipPretrainMatcher(model)
    if isinstance(model, BlipBase):
        return BlipMatcher(model)
    if isinstance(model, AlignedBase):
        return AlignedMatcher(model)
    if isinstance(model, Blip2Qformer):
        return QformerMatcher(model)
    if isinstance(model, ALBEF + BLIP):
        return FusionMatcher(model)
    raise UserError(
        f"a {type(model).__name__} cannot be explained: give one of the models with a "
        f"matching head, {', '.join(with_head())}"
    )


def with_head() -> dict[str, Any]:
    """Classes of the models with a matching head, by registered name."""
    classes = {name: registry.get_model_class(name) for name in registry.list_models()}
    return {name: each for name, each in classes.items() if issubclass(each, WITH_HEAD)}


@lru_cache(maxsize=1)
def _caption_tokenizer(tokenizer: Any, max_length: int) -> CaptionTokenizer:
    """LAVIS's tokenizer, which has no offsets, as a fast one that gives the same ids."""
    if not tokenizer.is_fast:
        tokenizer = BertTokenizerFast(tokenizer_object=convert_slow_tokenizer(tokenizer))
    return CaptionTokenizer(tokenizer, max_length)


def _image_size(encoder: Any) -> int:
    """Side of the images of any of LAVIS's image encoders."""
    for name in ("image_size", "input_resolution"):  # of EVA and of CLIP
        if isinstance(getattr(encoder, name, None), int):
            return getattr(encoder, name)
    return encoder.patch_embed.img_size[0]
