"""LAVIS's own models with a matching head, tiny and with random weights."""

from __future__ import annotations

import softmask_plugin  # noqa: F401  (first: it makes `import lavis` work)

# isort: split
from typing import Any

import torch
from lavis.models.albef_models import AlbefBase
from lavis.models.albef_models.albef_pretrain import AlbefPretrain
from lavis.models.albef_models.albef_retrieval import AlbefRetrieval
from lavis.models.blip2_models.blip2 import Blip2Base, LayerNorm
from lavis.models.blip2_models.blip2_image_text_matching import Blip2ITM
from lavis.models.blip2_models.Qformer import BertLMHeadModel
from lavis.models.blip_models.blip import BlipBase
from lavis.models.blip_models.blip_image_text_matching import BlipITM
from lavis.models.blip_models.blip_retrieval import BlipRetrieval
from lavis.models.eva_vit import VisionTransformer as EvaVit
from lavis.models.med import BertForMaskedLM, XBertEncoder
from lavis.models.vit import VisionTransformerEncoder
from transformers import BertConfig, BertTokenizer

from softmask_plugin.vocabulary import SCENES_VOCABULARY

LAVIS = (BlipITM, BlipRetrieval, AlbefRetrieval, AlbefPretrain, Blip2ITM)


def lavis_model(cls: Any, monkeypatch: Any, image: int = 32, patch: int = 8, heads: int = 4) -> Any:
    """One of ``LAVIS`` with five BERT layers, built by its own ``__init__``, in evaluation mode."""

    def tokenizer(self: Any) -> BertTokenizer:
        """LAVIS's ``init_tokenizer`` with our vocabulary."""
        made = BertTokenizer(str(SCENES_VOCABULARY))
        if issubclass(self, AlbefBase):
            return made
        made.add_special_tokens({"bos_token": "[DEC]"})
        if issubclass(self, BlipBase):
            made.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
            made.enc_token_id = made.additional_special_tokens_ids[0]
        return made

    torch.manual_seed(0)
    for base in (AlbefBase, BlipBase, Blip2Base):
        monkeypatch.setattr(base, "init_tokenizer", classmethod(tokenizer))
    width = 8 * heads
    config = BertConfig(
        vocab_size=len(tokenizer(cls)),
        hidden_size=width,
        num_hidden_layers=5,
        num_attention_heads=heads,
        intermediate_size=64,
        max_position_embeddings=40,
        encoder_width=48,
        add_cross_attention=True,
        add_type_embeddings=False,
        initializer_range=0.2,
        **({"fusion_layer": 2} if issubclass(cls, AlbefBase) else {}),
    )
    if cls is Blip2ITM:
        config.cross_attention_freq, config.query_length = 2, 6
        vit = EvaVit(image, patch, embed_dim=48, depth=2, num_heads=3, use_mean_pooling=False)
        queries = torch.nn.Parameter(torch.randn(1, 6, width))
        monkeypatch.setattr(cls, "init_vision_encoder", lambda *_: (vit, LayerNorm(48)))
        monkeypatch.setattr(cls, "init_Qformer", lambda *_: (BertLMHeadModel(config), queries))
        return shake(cls(img_size=image), 0.7).eval()
    vit = VisionTransformerEncoder(image, patch, embed_dim=48, depth=2, num_heads=3)
    vit.vision_width = 48
    pretrain = cls is AlbefPretrain
    text = BertForMaskedLM(config) if pretrain else XBertEncoder(config, add_pooling_layer=False)
    queue = {} if cls is BlipITM else {"queue_size": 0}
    return shake(cls(vit, text, **queue), 1.5).eval()


def shake(model: Any, gain: float) -> Any:
    """Scale weights so that words and patches matter, but not wildly."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "visual" not in name:
                parameter.mul_(gain)
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
