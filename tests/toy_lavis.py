"""LAVIS's own models with a matching head, tiny and with random weights."""

from __future__ import annotations

from typing import Any

import torch
from lavis.models.albef_models import AlbefBase
from lavis.models.blip2_models.blip2_image_text_matching import Blip2ITM
from lavis.models.eva_vit import VisionTransformer as EvaVit
from lavis.models.vit import VisionTransformerEncoder
from transformers import BertConfig

from benchmarks.lavis_models import LAVIS, lavis_model

__all__ = ["LAVIS", "toy"]


def toy(cls: Any, image: int = 32, patch: int = 8, heads: int = 4, seed: int = 0) -> Any:
    """One of ``LAVIS`` with five BERT layers, in evaluation mode."""
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=8 * heads,
        num_hidden_layers=5,
        num_attention_heads=heads,
        intermediate_size=64,
        max_position_embeddings=40,
        add_cross_attention=True,
        add_type_embeddings=False,
        initializer_range=0.2,
        fusion_layer=2,
    )
    shape = {"img_size": image, "patch_size": patch, "embed_dim": 48, "depth": 2, "num_heads": 3}
    vit = EvaVit if cls is Blip2ITM else VisionTransformerEncoder
    model = lavis_model(cls, vit(**shape), config)
    with torch.no_grad():  # so that words and patches matter, but not wildly
        gain = 1.5 if issubclass(cls, AlbefBase) else 0.7
        draws = torch.Generator().manual_seed(seed)  # transformers' depend on its version
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1 and "visual" not in name:
                parameter.normal_(0, 0.2 * gain, generator=draws)
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))
    return model.eval()
