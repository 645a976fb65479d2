"""LAVIS's own models with a matching head, of any size and without a network."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from lavis.models.albef_models import AlbefBase
from lavis.models.albef_models.albef_pretrain import AlbefPretrain
from lavis.models.albef_models.albef_retrieval import AlbefRetrieval
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.blip2_image_text_matching import Blip2ITM
from lavis.models.blip2_models.Qformer import BertLMHeadModel
from lavis.models.blip_models.blip import BlipBase
from lavis.models.blip_models.blip_image_text_matching import BlipITM
from lavis.models.blip_models.blip_retrieval import BlipRetrieval
from lavis.models.med import BertForMaskedLM, XBertEncoder
from transformers import BertConfig, BertTokenizer

from softmask_plugin.vocabulary import SCENES_VOCABULARY

LAVIS = (BlipITM, BlipRetrieval, AlbefRetrieval, AlbefPretrain, Blip2ITM)
QUERIES = 6


def lavis_model(cls: Any, vision: Any, config: BertConfig) -> Any:
    """One of ``LAVIS``, built by its own ``__init__`` with the vocabulary of scenes.

    Args:
        vision: An image encoder of LAVIS.
        config: Of the text encoder; its ``fusion_layer`` counts for ALBEF alone.
    """
    tokenizer = BertTokenizer(str(SCENES_VOCABULARY))
    if not issubclass(cls, AlbefBase):
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        config = BertConfig(**{k: v for k, v in config.to_dict().items() if k != "fusion_layer"})
    if issubclass(cls, BlipBase):
        tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        tokenizer.enc_token_id = tokenizer.additional_special_tokens_ids[0]
    config.vocab_size, config.encoder_width = len(tokenizer), vision.num_features
    vision.vision_width = vision.num_features
    with patch.object(cls, "init_tokenizer", lambda *_: tokenizer):
        if cls is not Blip2ITM:
            pretrain = cls is AlbefPretrain
            text = BertForMaskedLM(config) if pretrain else XBertEncoder(config, False)
            return cls(vision, text, **({} if cls is BlipITM else {"queue_size": 0}))
        config.cross_attention_freq, config.query_length = 2, QUERIES
        queries = torch.nn.Parameter(torch.randn(1, QUERIES, config.hidden_size))
        qformer = BertLMHeadModel(config)
        norm = LayerNorm(vision.num_features)
        with (
            patch.object(cls, "init_vision_encoder", lambda *_: (vision, norm)),
            patch.object(cls, "init_Qformer", lambda *_: (qformer, queries)),
        ):
            return cls()
