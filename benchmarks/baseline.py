"""LAVIS's own classes of the same shape and with the same weights: what all is compared to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import softmask_plugin  # noqa: F401  (first: it makes `import lavis` work)

# isort: split
import torch
from lavis.models.albef_models import AlbefBase
from lavis.models.albef_models.albef_classification import AlbefClassification
from lavis.models.albef_models.albef_feature_extractor import AlbefFeatureExtractor
from lavis.models.albef_models.albef_nlvr import AlbefNLVR
from lavis.models.albef_models.albef_pretrain import AlbefPretrain
from lavis.models.albef_models.albef_retrieval import AlbefRetrieval
from lavis.models.albef_models.albef_vqa import AlbefVQA
from lavis.models.med import BertForMaskedLM, BertLMHeadModel, BertModel, XBertEncoder
from lavis.models.vit import VisionTransformerEncoder
from transformers import BertConfig

from softmask_plugin.models.layouts import adapt
from softmask_plugin.nn.bert import BertShape

Model = TypeVar("Model", bound=torch.nn.Module)


def albef_pretrain(model: Any) -> AlbefPretrain:
    """LAVIS's ``albef_pretrain`` with the weights and the tokenizer of a ``softmask_pretrain``."""
    option = model.options
    with tokenizer_of(model):
        twin = AlbefPretrain(
            *encoders(model, BertForMaskedLM),
            queue_size=option.queue_size,
            embed_dim=option.embed_dim,
            mlm_mask_prob=option.text.mask_prob,
            temp=option.temp,
            momentum=option.momentum,
            alpha=option.alpha,
            max_txt_len=option.max_txt_len,
        )
    return same_weights(twin, model)


def albef_retrieval(model: Any) -> AlbefRetrieval:
    """LAVIS's ``albef_retrieval`` with the weights of a model with features and a matching head,
    and its settings, where it has any for training."""
    option = vars(model.options)
    settings = ("queue_size", "embed_dim", "temp", "momentum", "alpha", "max_txt_len")
    with tokenizer_of(model):
        twin = AlbefRetrieval(
            *encoders(model, XBertEncoder),
            **{"queue_size": 0, **{key: option[key] for key in settings if key in option}},
        )
    return same_weights(twin, model)


def albef_classification(model: Any, cls: Any = AlbefClassification, encoder: Any = XBertEncoder):
    """LAVIS's ``albef_classification`` with the weights of a ``softmask_classification``."""
    option = model.options
    with tokenizer_of(model):
        twin = cls(
            *encoders(model, encoder),
            num_classes=option.num_classes,
            momentum=option.momentum,
            alpha=option.alpha,
            use_distill=option.use_distill,
            max_txt_len=option.max_txt_len,
        )
    return same_weights(twin, model)


def albef_nlvr(model: Any) -> AlbefNLVR:
    """LAVIS's ``albef_nlvr`` with the weights of a ``softmask_nlvr`` of six fusion layers."""
    return albef_classification(model, AlbefNLVR, BertModel)


def albef_vqa(model: Any) -> AlbefVQA:
    """LAVIS's ``albef_vqa`` with the weights of a ``softmask_vqa``."""
    option = model.options
    with tokenizer_of(model):
        twin = AlbefVQA(
            *encoders(model, XBertEncoder),
            BertLMHeadModel(bert_config(model.text_decoder.shape)),
            use_distill=option.use_distill,
            momentum=option.momentum,
            alpha=option.alpha,
            max_txt_len=option.max_txt_len,
        )
    return same_weights(twin, model)


def albef_feature_extractor(model: Any) -> AlbefFeatureExtractor:
    """LAVIS's ``albef_feature_extractor`` with the weights of a ``softmask_feature_extractor``."""
    option = model.options
    with tokenizer_of(model):
        twin = AlbefFeatureExtractor(
            *encoders(model, BertForMaskedLM), option.embed_dim, option.max_txt_len
        )
    return same_weights(twin, model)


def encoders(model: Any, text: Any) -> tuple[VisionTransformerEncoder, torch.nn.Module]:
    """LAVIS's image encoder and text encoder of the class ``text``, of the model's shape."""
    option = model.options
    vision = VisionTransformerEncoder(
        img_size=option.image_size,
        patch_size=option.vit.patch_size,
        embed_dim=option.vit.width,
        depth=option.vit.depth,
        num_heads=option.vit.heads,
    )
    vision.vision_width = option.vit.width
    pooler = {} if text is BertForMaskedLM else {"add_pooling_layer": False}
    return vision, text(bert_config(model.bert.shape), **pooler)


def bert_config(shape: BertShape) -> BertConfig:
    """LAVIS's description of a text encoder or decoder."""
    return BertConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.max_positions,
        hidden_dropout_prob=shape.dropout,
        attention_probs_dropout_prob=shape.attention_dropout,
        layer_norm_eps=shape.norm_eps,
        encoder_width=shape.image_width,
        fusion_layer=shape.fusion_layer,
        add_cross_attention=True,
        add_type_embeddings=False,
    )


def same_weights(twin: Model, model: Any) -> Model:
    """Copy the model's weights to LAVIS's class, which must have a place for each of its own."""
    own = twin.state_dict()
    state = adapt(model.state_dict(), own, model.bert.shape.fusion_layer)
    known = {key.replace("_m.", ".", 1) for key in state}
    fixed = {key for key in own if key.endswith(("position_ids", "_queue", "queue_ptr"))}
    if missing := {key for key in own if key.replace("_m.", ".", 1) not in known} - fixed:
        raise KeyError(f"LAVIS's model has tensors that ours lacks: {sorted(missing)}")
    twin.load_state_dict({key: state[key] for key in own.keys() & state.keys()}, strict=False)
    return twin


@contextmanager
def tokenizer_of(model: Any) -> Iterator[None]:
    """Let LAVIS's models take the model's tokenizer: their own is on a hub."""
    given = AlbefBase.__dict__["init_tokenizer"]
    AlbefBase.init_tokenizer = classmethod(lambda cls: model.tokenizer)
    try:
        yield
    finally:
        AlbefBase.init_tokenizer = given
