"""ALBEF's text and multi-modal encoder: one BERT, cut in two, with LAVIS's state-dict keys.

Layers below ``fusion_layer`` encode text; those from it on also attend to an image, whose keys and
values come from an ``ImageMemory`` list and are shared by every pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask_plugin.nn.image_memory import LayerMemory, View
from softmask_plugin.nn.vision import initial_std

ImageMemory = list[LayerMemory]


@dataclass(frozen=True)
class BertShape:
    """Size of the text and multi-modal encoder; the defaults are BERT-base's."""

    vocab_size: int = 30522
    width: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072
    fusion_layer: int = 6
    image_width: int = 768
    max_positions: int = 512
    dropout: float = 0.1
    attention_dropout: float = 0.1
    norm_eps: float = 1e-12
    pad_token_id: int = 0


class BertForMaskedLM(nn.Module):
    """The encoder ``bert`` and the MLM head ``cls``, whose output matrix is the word embedding."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.shape = shape
        self.bert = BertModel(shape)
        self.cls = MlmHead(shape)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits of token states: (N, width) -> (N, vocabulary)."""
        return self.cls.predictions(hidden)


class BertModel(nn.Module):
    """Text encoder (``encode``), image projection (``remember``) and fusion (``fuse``)."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.shape = shape
        self.embeddings = Embeddings(shape)
        self.encoder: Any = nn.Module()  # container for LAVIS's key, as some below
        self.encoder.layer = nn.ModuleList(
            Layer(shape, has_cross_attention=i >= shape.fusion_layer) for i in range(shape.layers)
        )
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=initial_std(shape.width))
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode captions alone: ids (N, T) int64, mask (N, T) bool -> states (N, T, width)."""
        states = self.embeddings(ids)
        for layer in self.encoder.layer[: self.shape.fusion_layer]:
            states = layer.transform(layer.attend_text(states, mask))
        return states

    def remember(self, image_states: Tensor) -> ImageMemory:
        """Project image states (B, S, image width) to each fusion layer's keys and values."""
        return [
            layer.crossattention.remember(image_states)
            for layer in self.encoder.layer[self.shape.fusion_layer :]
        ]

    def fuse(
        self, states: Tensor, mask: Tensor, memory: ImageMemory, views: Sequence[View] = (View(),)
    ) -> Tensor:
        """Fuse captions with images.

        Args:
            states: text states of all pairs, (N, T, width), the pairs of each view in turn.
            mask: True where a token is no padding, (N, T).
            memory: keys and values of the images, from ``remember``.
            views: which image each caption looks at, and through which mask.

        Returns:
            Multi-modal states, (N, T, width).
        """
        for layer, layer_memory in zip(self.fusion_layers, memory, strict=True):
            states = layer.attend_text(states, mask)
            states = layer.transform(layer.crossattention.look(states, layer_memory, views))
        return states

    def fuse_with_attention(
        self, states: Tensor, mask: Tensor, memory: ImageMemory, layer_index: int
    ) -> tuple[Tensor, Tensor]:
        """As ``fuse`` for matching pairs, with one layer's cross-attention probabilities.

        Args:
            layer_index: BERT layer, in [fusion_layer, layers).

        Returns:
            States (N, T, width), and that layer's probabilities (N, H, T, S) as a graph node.
        """
        probabilities = None
        wanted = layer_index - self.shape.fusion_layer
        for i, (layer, layer_memory) in enumerate(zip(self.fusion_layers, memory, strict=True)):
            states = layer.attend_text(states, mask)
            if i == wanted:
                states, probabilities = layer.crossattention.look_and_show(states, layer_memory)
            else:
                states = layer.crossattention.look(states, layer_memory, (View(),))
            states = layer.transform(states)
        if probabilities is None:
            raise ValueError(
                f"layer {layer_index} has no cross-attention: "
                f"choose one from {self.shape.fusion_layer} to {self.shape.layers - 1}"
            )
        return states, probabilities

    @property
    def fusion_layers(self) -> Sequence[Layer]:
        """The layers with cross-attention."""
        return self.encoder.layer[self.shape.fusion_layer :]


class Embeddings(nn.Module):
    """Word plus position embeddings; ALBEF has no token types."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(
            shape.vocab_size, shape.width, padding_idx=shape.pad_token_id
        )
        self.position_embeddings = nn.Embedding(shape.max_positions, shape.width)
        self.LayerNorm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.dropout = nn.Dropout(shape.dropout)
        # Part of LAVIS's checkpoints, kept so that keys match to the last one.
        self.register_buffer("position_ids", torch.arange(shape.max_positions).expand(1, -1))

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ids (N, T) as states (N, T, width)."""
        positions = self.position_embeddings.weight[: ids.shape[1]]
        return self.dropout(self.LayerNorm(self.word_embeddings(ids) + positions))


class Layer(nn.Module):
    """Post-norm BERT layer: self-attention, cross-attention where it has one, feed-forward."""

    def __init__(self, shape: BertShape, has_cross_attention: bool) -> None:
        super().__init__()
        self.attention = Attention(shape, shape.width)
        if has_cross_attention:
            self.crossattention = Attention(shape, shape.image_width)
        self.intermediate: Any = nn.Module()
        self.intermediate.dense = nn.Linear(shape.width, shape.intermediate)
        self.output = AddNorm(shape, shape.intermediate)

    def attend_text(self, states: Tensor, mask: Tensor) -> Tensor:
        """Self-attention among the tokens that ``mask`` (N, T) marks."""
        return self.attention.attend_self(states, mask)

    def transform(self, states: Tensor) -> Tensor:
        """Feed-forward half of the layer."""
        return self.output(F.gelu(self.intermediate.dense(states)), states)


class Attention(nn.Module):
    """Multi-head attention of text to itself or to an image, then residual and layer norm."""

    def __init__(self, shape: BertShape, source_width: int) -> None:
        super().__init__()
        self.heads, self.dropout = shape.heads, shape.attention_dropout
        self.self: Any = nn.Module()  # LAVIS's key for the three projections
        self.self.query = nn.Linear(shape.width, shape.width)
        self.self.key = nn.Linear(source_width, shape.width)
        self.self.value = nn.Linear(source_width, shape.width)
        self.output = AddNorm(shape, shape.width)

    def attend_self(self, states: Tensor, mask: Tensor) -> Tensor:
        """Text states (N, T, width) attend to the tokens that ``mask`` (N, T) marks."""
        query, key, value = (
            self.split(projection(states))
            for projection in (self.self.query, self.self.key, self.self.value)
        )
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask[:, None, None, :], dropout_p=self.dropout_now
        )
        return self.output(merge(context), states)

    def remember(self, image_states: Tensor) -> LayerMemory:
        """Project image states (B, S, image width) to keys and values."""
        return LayerMemory(
            self.split(self.self.key(image_states)),
            self.split(self.self.value(image_states)),
            self.self.key.bias.view(self.heads, 1, -1),
            self.self.value.bias.view(self.heads, 1, -1),
        )

    def look(self, states: Tensor, memory: LayerMemory, views: Sequence[View]) -> Tensor:
        """Text states (N, T, width) attend to the images, each as its view shows them."""
        query = self.split(self.self.query(states))
        return self.output(merge(memory.attend(query, views, self.dropout_now)), states)

    def look_and_show(self, states: Tensor, memory: LayerMemory) -> tuple[Tensor, Tensor]:
        """As ``look`` for matching pairs, with the probabilities (N, H, T, S)."""
        query = self.split(self.self.query(states))
        context, probabilities = memory.attend_with_probabilities(query, View(), self.dropout_now)
        return self.output(merge(context), states), probabilities

    @property
    def dropout_now(self) -> float:
        """Chance of a probability to be dropped: 0 in evaluation mode."""
        return self.dropout if self.training else 0.0

    def split(self, x: Tensor) -> Tensor:
        """(N, L, width) -> (N, H, L, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def merge(context: Tensor) -> Tensor:
    """(N, H, L, d) -> (N, L, width)."""
    return context.transpose(1, 2).flatten(2)


class AddNorm(nn.Module):
    """Project, drop out, add the residual, normalise."""

    def __init__(self, shape: BertShape, in_width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_width, shape.width)
        self.LayerNorm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(N, T, in width) and its residual (N, T, width) -> (N, T, width)."""
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class MlmHead(nn.Module):
    """Container for LAVIS's key ``cls.predictions``."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.predictions = MlmPredictions(shape)


class MlmPredictions(nn.Module):
    """Transform, then project to the vocabulary."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.transform: Any = nn.Module()
        self.transform.dense = nn.Linear(shape.width, shape.width)
        self.transform.LayerNorm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.decoder = nn.Linear(shape.width, shape.vocab_size)
        self.bias = self.decoder.bias  # LAVIS's checkpoints hold it under both keys
        nn.init.normal_(self.transform.dense.weight, std=initial_std(shape.width))
        nn.init.zeros_(self.transform.dense.bias)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits: (N, width) -> (N, vocabulary)."""
        return self.decoder(self.transform.LayerNorm(F.gelu(self.transform.dense(hidden))))
