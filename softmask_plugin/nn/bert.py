"""ALBEF's text and multi-modal encoder: one BERT, cut in two, with LAVIS's state-dict keys.

Layers below ``fusion_layer`` encode text; those from it on also attend to an image, whose keys and
values come from an ``ImageMemory`` list and are shared by every pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask_plugin.nn.image_memory import LayerMemory, View
from softmask_plugin.nn.tokens import Layout, Tokens
from softmask_plugin.nn.vision import initial_std

ImageMemory = list[LayerMemory]


@dataclass(frozen=True)
class BertShape:
    """Shape of the text and multi-modal encoder; the defaults are BERT-base's."""

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
    causal: bool = False  # a decoder: a token attends to those before it only


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

    def encode(self, ids: Tensor, layout: Layout) -> Tokens:
        """Encode captions alone: ids (N, T) int64 and where their tokens are."""
        tokens = Tokens(self.embeddings(ids, layout), layout)
        for layer in self.encoder.layer[: self.shape.fusion_layer]:
            tokens = layer.transform(layer.attention.attend_self(tokens, layout))
        return tokens

    def remember(self, *image_states: Tensor, mask: Tensor | None = None) -> ImageMemory:
        """Project image states (B, S, image width) to each fusion layer's keys and values.

        Of several images per caption, the fusion layers look at one after the other in turn.
        ``mask``, (B, S), is True for the states that count (None: all).
        """
        images = itertools.cycle(image_states)
        return [
            layer.crossattention.remember(states, mask)
            for layer, states in zip(self.fusion_layers, images, strict=False)
        ]

    def fuse(
        self,
        tokens: Tokens,
        memory: ImageMemory,
        views: Sequence[View] = (View(),),
        wanted: Layout | None = None,
    ) -> Tokens:
        """Fuse captions with images.

        Args:
            tokens: of all N captions, those of each view in turn.
            memory: keys and values of the images, from ``remember``.
            views: which image each caption looks at, and through which mask.
            wanted: the tokens that will be read; the last layer computes no others. None: all.

        Returns:
            Multi-modal states of the wanted tokens.
        """
        last = self.fusion_layers[-1]
        for layer, layer_memory in zip(self.fusion_layers, memory, strict=True):
            layout = wanted if wanted is not None and layer is last else tokens.layout
            tokens = layer.attention.attend_self(tokens, layout)
            tokens = layer.transform(layer.crossattention.look(tokens, layer_memory, views))
        return tokens

    def fuse_with_attention(
        self, tokens: Tokens, memory: ImageMemory, layer_index: int, wanted: Layout | None = None
    ) -> tuple[Tokens, Tensor]:
        """As ``fuse`` for matching pairs, with one layer's cross-attention probabilities.

        Args:
            layer_index: BERT layer, in [fusion_layer, layers); of the last one, only the
                probabilities of ``wanted`` tokens mean anything.

        Returns:
            States of the wanted tokens, and that layer's probabilities (N, H, T, S) as a graph
            node; those of padding mean nothing.

        Raises:
            ValueError: the layer has no cross-attention.
        """
        split = layer_index - self.shape.fusion_layer
        if not 0 <= split < len(memory):
            raise ValueError(
                f"layer {layer_index} has no cross-attention: "
                f"choose one from {self.shape.fusion_layer} to {self.shape.layers - 1}"
            )
        last, probabilities = self.fusion_layers[-1], None
        for i, (layer, layer_memory) in enumerate(zip(self.fusion_layers, memory, strict=True)):
            layout = wanted if wanted is not None and layer is last else tokens.layout
            tokens = layer.attention.attend_self(tokens, layout)
            if i == split:
                tokens, probabilities = layer.crossattention.look_and_show(tokens, layer_memory)
            else:
                tokens = layer.crossattention.look(tokens, layer_memory)
            tokens = layer.transform(tokens)
        return tokens, cast(Tensor, probabilities)

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

    def forward(self, ids: Tensor, layout: Layout) -> Tensor:
        """Embed the ids (N, T) of a layout's tokens as states (M, width)."""
        words = self.word_embeddings(ids.flatten()[layout.index])
        positions = self.position_embeddings(layout.index % ids.shape[1])
        return self.dropout(self.LayerNorm(words + positions))


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

    def transform(self, tokens: Tokens) -> Tokens:
        """Feed-forward half of the layer."""
        states = self.output(F.gelu(self.intermediate.dense(tokens.states)), tokens.states)
        return Tokens(states, tokens.layout)


class Attention(nn.Module):
    """Multi-head attention of text to itself or to an image, then residual and layer norm."""

    def __init__(self, shape: BertShape, source_width: int) -> None:
        super().__init__()
        self.heads, self.dropout = shape.heads, shape.attention_dropout
        self.causal = shape.causal
        self.self: Any = nn.Module()  # LAVIS's key for the three projections
        self.self.query = nn.Linear(shape.width, shape.width)
        self.self.key = nn.Linear(source_width, shape.width)
        self.self.value = nn.Linear(source_width, shape.width)
        self.output = AddNorm(shape, shape.width)

    def attend_self(self, tokens: Tokens, wanted: Layout) -> Tokens:
        """The ``wanted`` tokens attend to all tokens of their caption."""
        queries = tokens.only(wanted)
        key, value = (
            self.split(tokens.layout.pad(projection(tokens.states)))
            for projection in (self.self.key, self.self.value)
        )
        context = F.scaled_dot_product_attention(
            self.query(queries),
            key,
            value,
            attn_mask=self.visible(tokens.layout, wanted),
            dropout_p=self.dropout_now,
        )
        return self.merge(context, queries)

    def visible(self, tokens: Layout, wanted: Layout) -> Tensor:
        """Which tokens each wanted one attends to, (N, 1, 1 or T wanted, T)."""
        mask = tokens.mask[:, None, None, :]
        if not self.causal:
            return mask
        earlier = mask.new_ones(wanted.mask.shape[1], tokens.mask.shape[1]).tril()
        return mask & earlier

    def remember(self, image_states: Tensor, mask: Tensor | None = None) -> LayerMemory:
        """Project image states (B, S, image width), those in ``mask``, to keys and values."""
        return LayerMemory(
            self.split(self.self.key(image_states)),
            self.split(self.self.value(image_states)),
            self.self.key.bias.view(self.heads, -1, 1),
            self.self.value.bias.view(self.heads, 1, -1),
            mask,
        )

    def look(
        self, tokens: Tokens, memory: LayerMemory, views: Sequence[View] = (View(),)
    ) -> Tokens:
        """Tokens attend to the images, each caption to its own as its view shows it."""
        return self.merge(memory.attend(self.query(tokens), views, self.dropout_now), tokens)

    def look_and_show(self, tokens: Tokens, memory: LayerMemory) -> tuple[Tokens, Tensor]:
        """As ``look`` for matching pairs, with the probabilities (N, H, T, S)."""
        context, probabilities = memory.read_with_probabilities(
            self.query(tokens), View(), self.dropout_now
        )
        return self.merge(context, tokens), probabilities

    def query(self, tokens: Tokens) -> Tensor:
        """Queries of the tokens as a grid, (N, H, T, d)."""
        return self.split(tokens.layout.pad(self.self.query(tokens.states)))

    def merge(self, context: Tensor, tokens: Tokens) -> Tokens:
        """Heads' output (N, H, T, d), projected and added to the tokens that asked for it."""
        packed = tokens.layout.pack(context.transpose(1, 2).flatten(2))
        return Tokens(self.output(packed, tokens.states), tokens.layout)

    @property
    def dropout_now(self) -> float:
        """Chance of a probability to be dropped: 0 in evaluation mode."""
        return self.dropout if self.training else 0.0

    def split(self, x: Tensor) -> Tensor:
        """(N, L, width) -> (N, H, L, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class AddNorm(nn.Module):
    """Project, drop out, add the residual, normalise."""

    def __init__(self, shape: BertShape, in_width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_width, shape.width)
        self.LayerNorm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(M, in width) and its residual (M, width) -> (M, width)."""
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
