"""LAVIS's own classes of the same shape and with the same weights: what everything is timed by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import softmask_plugin  # noqa: F401  (first: it makes `import lavis` work)

# isort: split
import torch
from lavis.models.albef_models import AlbefBase
from lavis.models.albef_models.albef_pretrain import AlbefPretrain
from lavis.models.med import BertForMaskedLM, XBertEncoder
from lavis.models.vit import VisionTransformerEncoder
from transformers import BertConfig

from softmask_plugin.models.pretrain import SoftMaskPretrain


def albef_pretrain(model: SoftMaskPretrain) -> AlbefPretrain:
    """LAVIS's ``albef_pretrain`` with the weights and the tokenizer of ``model``."""
    option, shape = model.options, model.text_encoder.shape
    vision = VisionTransformerEncoder(
        img_size=option.image_size,
        patch_size=option.vit.patch_size,
        embed_dim=option.vit.width,
        depth=option.vit.depth,
        num_heads=option.vit.heads,
    )
    vision.vision_width = option.vit.width
    text = BertForMaskedLM(
        BertConfig(
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
    )
    given = AlbefBase.__dict__["init_tokenizer"]
    AlbefBase.init_tokenizer = classmethod(lambda cls: model.tokenizer)  # its own is on a hub
    try:
        twin = AlbefPretrain(
            vision,
            text,
            queue_size=option.queue_size,
            embed_dim=option.embed_dim,
            mlm_mask_prob=option.text.mask_prob,
            temp=option.temp,
            momentum=option.momentum,
            alpha=option.alpha,
            max_txt_len=option.max_txt_len,
        )
    finally:
        AlbefBase.init_tokenizer = given
    twin.load_state_dict(model.state_dict())
    return twin


def albef_retrieval(model: Any) -> SimpleNamespace:
    """What LAVIS's ``compute_sim_matrix`` calls, with the weights of ``model``."""
    twin = albef_pretrain(model).eval()
    text = XBertEncoder(twin.text_encoder.config, add_pooling_layer=False).eval()
    text.load_state_dict(
        {
            key.removeprefix("bert."): tensor
            for key, tensor in model.text_encoder.state_dict().items()
            if key.startswith("bert.")
        },
        strict=False,  # its position ids are fixed numbers
    )
    return SimpleNamespace(
        tokenizer=model.tokenizer,
        device=torch.device("cpu"),
        text_encoder=text,
        visual_encoder=twin.visual_encoder,
        text_proj=twin.text_proj,
        vision_proj=twin.vision_proj,
        itm_head=twin.itm_head,
    )
