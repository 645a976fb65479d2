"""LAVIS's own classes with the shape and weights of ours, to compare with."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from lavis.models.albef_models.albef_classification import AlbefClassification
from lavis.models.albef_models.albef_feature_extractor import AlbefFeatureExtractor
from lavis.models.albef_models.albef_nlvr import AlbefNLVR
from lavis.models.albef_models.albef_pretrain import AlbefPretrain
from lavis.models.albef_models.albef_retrieval import AlbefRetrieval
from lavis.models.albef_models.albef_vqa import AlbefVQA
from lavis.models.blip_models.blip_pretrain import BlipPretrain
from lavis.models.blip_models.blip_retrieval import BlipRetrieval
from lavis.models.med import (
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    XBertEncoder,
    XBertLMHeadDecoder,
)
from lavis.models.vit import VisionTransformerEncoder
from transformers import BertConfig

from softmask_plugin.models.checkpoint_keys import adapt
from softmask_plugin.nn.bert import BertShape

Model = TypeVar("Model", bound=torch.nn.Module)


def albef_pretrain(model: Any) -> AlbefPretrain:
    """LAVIS's ``albef_pretrain`` with the weights of a ``softmask_pretrain``."""
    return twin(AlbefPretrain, model, BertForMaskedLM, mlm_mask_prob=model.options.text.mask_prob)


def albef_retrieval(model: Any) -> AlbefRetrieval:
    """LAVIS's ``albef_retrieval`` with the weights of a model with features and a matching head."""
    return twin(AlbefRetrieval, model, XBertEncoder, queue_size=0)


def albef_classification(model: Any) -> AlbefClassification:
    """LAVIS's ``albef_classification`` with the weights of a ``softmask_classification``."""
    return twin(AlbefClassification, model, XBertEncoder)


def albef_nlvr(model: Any) -> AlbefNLVR:
    """LAVIS's ``albef_nlvr`` with the weights of a ``softmask_nlvr`` of six fusion layers."""
    return twin(AlbefNLVR, model, BertModel)


def albef_vqa(model: Any) -> AlbefVQA:
    """LAVIS's ``albef_vqa`` with the weights of a ``softmask_vqa``."""
    decoder = BertLMHeadModel(bert_config(model.text_decoder.shape))
    return twin(AlbefVQA, model, XBertEncoder, text_decoder=decoder)


def albef_feature_extractor(model: Any) -> AlbefFeatureExtractor:
    """LAVIS's ``albef_feature_extractor`` with the weights of a ``softmask_feature_extractor``."""
    return twin(AlbefFeatureExtractor, model, BertForMaskedLM)


def blip_retrieval(model: Any) -> BlipRetrieval:
    """LAVIS's ``blip_retrieval`` with the weights of a model of BLIP's shape."""
    return twin(BlipRetrieval, model, XBertEncoder)


def blip_pretrain(model: Any) -> BlipPretrain:
    """LAVIS's ``blip_pretrain`` with the weights of a ``softmask_blip_pretrain``."""
    decoder = XBertLMHeadDecoder(bert_config(model.bert.shape))
    with redirect_stdout(io.StringIO()):  # LAVIS prints what it ties
        return twin(BlipPretrain, model, XBertEncoder, text_decoder=decoder)


def twin(cls: Callable[..., Model], model: Any, text: Any, **given: Any) -> Model:
    """LAVIS's class ``cls`` with the model's shape, tokenizer, weights and settings.

    Args:
        cls: One of LAVIS's ALBEF or BLIP classes.
        model: Our model.
        text: LAVIS's class of the text encoder.
        given: Arguments without an option of the model; options take precedence.
    """
    takes, option = inspect.signature(cls).parameters, vars(model.options)
    settings = {key: option[key] for key in takes if key in option}
    with patch.object(cls, "init_tokenizer", lambda _: model.tokenizer):  # or it would download one
        made = cls(*encoders(model, text), **{**given, **settings})
    return same_weights(made, model)


def encoders(model: Any, text: Any) -> tuple[VisionTransformerEncoder, torch.nn.Module]:
    """LAVIS's image encoder and its text encoder ``text`` in the model's shape."""
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
    """LAVIS's configuration of a text encoder or decoder."""
    # Without the attribute, all layers look at the image: BLIP's BERT
    first = {"fusion_layer": shape.fusion_layer} if shape.fusion_layer else {}
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
        add_cross_attention=True,
        add_type_embeddings=False,
        **first,
    )


def same_weights(made: Model, model: Any) -> Model:
    """Copy the model's weights to LAVIS's class; KeyError if that has other tensors."""
    own = made.state_dict()
    state = adapt(model.state_dict(), own, model.options.bert)
    known = {key.replace("_m.", ".", 1) for key in state}
    fixed = {key for key in own if key.endswith(("position_ids", "_queue", "queue_ptr"))}
    if missing := {key for key in own if key.replace("_m.", ".", 1) not in known} - fixed:
        raise KeyError(f"LAVIS's model has tensors that ours lacks: {sorted(missing)}")
    made.load_state_dict({key: state[key] for key in own.keys() & state.keys()}, strict=False)
    return made
