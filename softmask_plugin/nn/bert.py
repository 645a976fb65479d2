"""ALBEF's text and multi-modal encoder: one BERT, cut in two, with LAVIS's state-dict keys.

Layers below ``fusion_layer`` encode text. The others also attend to an image, whose keys and values
come from an ``ImageMemory`` that every pass shares; without one they encode text too, as in BLIP.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask_plugin.errors import UserError
from softmask_plugin.nn.attention import attend
from softmask_plugin.nn.dropout import Dropout
from softmask_plugin.nn.image_memory import ImageMemory, LayerMemory, View
from softmask_plugin.nn.tokens import DecoderText, Packing, Tokens
from softmask_plugin.nn.vision import initial_std


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
    causal: bool = False  # a decoder: tokens attend only to themselves and those before
    image_cls: bool = True  # cross-attention's keys include the image's [CLS]


def require_cross_attention(layer: int, layers: Sequence[int]) -> None:
    """Raise ValueError unless a layer is one of those with cross-attention."""
    if layer not in layers:
        raise ValueError(
            f"layer {layer} has no cross-attention: choose one from {layers[0]} to {layers[-1]}"
        )


class Bert(nn.Module):
    """Base of both BERTs: a clear error where LAVIS looks for ``base_model``."""

    @property
    def base_model(self) -> Any:
        """Only an error: LAVIS's ``compute_gradcam`` looks here for its own cross-attention."""
        raise UserError(
            "LAVIS's compute_gradcam does not know this BERT: use softmask_plugin.explain "
            "(explain_image for one pair, word_maps for a batch)"
        )


class BertForMaskedLM(Bert):
    """The encoder ``bert`` and the MLM head ``cls``, whose output matrix is the word embedding."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.shape = shape
        self.bert = BertModel(shape)
        self.cls: Any = nn.Module()  # a container for LAVIS's key, like others below
        self.cls.predictions = MlmHead(shape)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def forward(self, states: Tensor) -> Tensor:
        """Vocabulary logits of token states: (N, width) -> (N, vocabulary)."""
        return self.cls.predictions(states)

    def decode(self, text: DecoderText, memory: ImageMemory, view: View = View()) -> Tensor:
        """Vocabulary logits (M, vocabulary) of next tokens; ``view``: what each text sees."""
        tokens = self.bert.encode(text.ids, text.packing)
        return self(self.bert.fuse(tokens, memory, (view,), text.predicting).states)


class BertModel(Bert):
    """Text encoder (``encode``), image projection (``remember``) and fusion (``fuse``)."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.shape = shape
        self.embeddings = Embeddings(shape)
        self.encoder: Any = nn.Module()
        self.encoder.layer = nn.ModuleList(
            Layer(shape, has_cross_attention=i >= shape.fusion_layer) for i in range(shape.layers)
        )
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=initial_std(shape.width))
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def encode(self, ids: Tensor, packing: Packing) -> Tokens:
        """Encode captions without images, from their ids (N, T), int64."""
        tokens = Tokens(self.embeddings(ids, packing), packing)
        for layer in self.encoder.layer[: self.shape.fusion_layer]:
            tokens = layer.transform(layer.attention.attend_self(tokens, packing))
        return tokens

    def remember(self, *image_states: Tensor, mask: Tensor | None = None) -> ImageMemory:
        """Project image states to each fusion layer's keys and values.

        Args:
            image_states: (B, S, image width). Given several, the fusion layers take turns: with
                two, every other layer attends to the second.
            mask: True for the states that count, (B, S); None: all.

        Without ``image_cls``, each image's first state gets no key.
        """
        first = 1 - self.first_patch
        mask = None if mask is None else mask[:, first:]
        images = itertools.cycle(states[:, first:] for states in image_states)
        return [
            layer.crossattention.remember(states, mask)
            for layer, states in zip(self.fusion_layers, images, strict=False)
        ]

    def fuse(
        self,
        tokens: Tokens,
        memory: ImageMemory | None,
        views: Sequence[View] = (View(),),
        wanted: Packing | None = None,
    ) -> Tokens:
        """Fuse captions with images, and return the multi-modal states of the wanted tokens.

        Args:
            tokens: All N captions, those of the first view first.
            memory: Keys and values of the images, from ``remember``. None: no images, so these
                layers skip cross-attention.
            views: Which image each caption attends to, and through which mask.
            wanted: The tokens to return; the last layer computes no others. None: all.
        """
        return self._fuse(tokens, memory, views, wanted)[0]

    def fuse_with_attention(
        self,
        tokens: Tokens,
        memory: ImageMemory,
        layer_index: int,
        wanted: Packing | None = None,
        view: View = View(),
    ) -> tuple[Tokens, Tensor]:
        """Fuse captions with images, and return one layer's cross-attention probabilities too.

        These are (N, H, T, keys), before dropout, and in the graph. Those of padding are
        meaningless, and in the last layer those of all but the wanted tokens.

        Raises:
            ValueError: The layer has no cross-attention.
        """
        require_cross_attention(layer_index, range(self.shape.fusion_layer, self.shape.layers))
        fused, probabilities = self._fuse(tokens, memory, (view,), wanted, layer_index)
        return fused, cast(Tensor, probabilities)

    def _fuse(
        self,
        tokens: Tokens,
        memory: ImageMemory | None,
        views: Sequence[View],
        wanted: Packing | None,
        layer_index: int | None = None,
    ) -> tuple[Tokens, Tensor | None]:
        probabilities, last = None, self.shape.layers - 1
        each: Sequence[LayerMemory | None] = memory or [None] * len(self.fusion_layers)
        layers = zip(self.fusion_layers, each, strict=True)
        for i, (layer, layer_memory) in enumerate(layers, start=self.shape.fusion_layer):
            packing = wanted if wanted is not None and i == last else tokens.packing
            tokens, cross = layer.attention.attend_self(tokens, packing), layer.crossattention
            if layer_memory is not None and i == layer_index:
                tokens, probabilities = cross.attend_with_probabilities(
                    tokens, layer_memory, views[0]
                )
            elif layer_memory is not None:
                tokens = cross.attend_image(tokens, layer_memory, views)
            tokens = layer.transform(tokens)
        return tokens, probabilities

    @property
    def first_patch(self) -> int:
        """Key of an image's first patch: 1 behind [CLS], 0 if that has no key."""
        return int(self.shape.image_cls)

    @property
    def fusion_layers(self) -> Sequence[Layer]:
        """Layers with cross-attention."""
        return self.encoder.layer[self.shape.fusion_layer :]


class Embeddings(nn.Module):
    """Word plus position embeddings; BERT's token type is part of the latter, see
    ``models.checkpoint_keys.fold_token_types``."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(
            shape.vocab_size, shape.width, padding_idx=shape.pad_token_id
        )
        self.position_embeddings = nn.Embedding(shape.max_positions, shape.width)
        self.LayerNorm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.dropout = Dropout(shape.dropout)
        # Unused, but a key of LAVIS's checkpoints.
        self.register_buffer("position_ids", torch.arange(shape.max_positions).expand(1, -1))

    def forward(self, ids: Tensor, packing: Packing) -> Tensor:
        """Embed ids (N, T) as packed states (M, width)."""
        words = self.word_embeddings(ids.flatten()[packing.index])
        positions = self.position_embeddings(packing.index % ids.shape[1])
        return self.dropout(self.LayerNorm(words + positions))


class Layer(nn.Module):
    """Post-norm BERT layer: self-attention, cross-attention in a fusion layer, feed-forward."""

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
        return Tokens(states, tokens.packing)


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

    def attend_self(self, tokens: Tokens, wanted: Packing) -> Tokens:
        """Let the ``wanted`` tokens attend to all tokens of their caption."""
        queries = tokens.only(wanted)
        key, value = (self.project(tokens, each) for each in (self.self.key, self.self.value))
        query = self.project(queries, self.self.query)
        mask = tokens.packing.mask[:, None, None, :]
        if self.causal:
            mask = mask & mask.new_ones(query.shape[2], key.shape[2]).tril()
        context = attend(query, key, value, mask, self.current_dropout)
        return self.merge_heads(context, queries)

    def remember(self, image_states: Tensor, mask: Tensor | None = None) -> LayerMemory:
        """Project image states (B, S, image width) to keys and values."""
        return LayerMemory(
            # Otherwise every view keeps a contiguous copy of its own for the backward pass
            self.split_heads(self.self.key(image_states)).contiguous(),
            self.split_heads(self.self.value(image_states)).contiguous(),
            self.self.key.bias.view(self.heads, -1, 1),
            self.self.value.bias.view(self.heads, 1, -1),
            None if mask is None else mask[:, None, None],
        )

    def attend_image(self, tokens: Tokens, memory: LayerMemory, views: Sequence[View]) -> Tokens:
        """Let the tokens of each caption attend to its image, as its view shows it."""
        queries = self.project(tokens, self.self.query)
        context = memory.attend(queries, views, self.current_dropout)
        return self.merge_heads(context, tokens)

    def attend_with_probabilities(
        self, tokens: Tokens, memory: LayerMemory, view: View
    ) -> tuple[Tokens, Tensor]:
        """As ``attend_image`` through one view; returns the probabilities (N, H, T, keys) too."""
        queries, dropout = self.project(tokens, self.self.query), self.current_dropout
        context, probabilities = memory.attend_with_probabilities(queries, view, dropout)
        return self.merge_heads(context, tokens), probabilities

    def project(self, tokens: Tokens, projection: nn.Module) -> Tensor:
        """Project tokens to a grid of queries, keys or values, (N, H, T, d)."""
        return self.split_heads(tokens.packing.pad(projection(tokens.states)))

    def merge_heads(self, context: Tensor, tokens: Tokens) -> Tokens:
        """Project the heads' output (N, H, T, d) and add it to the tokens."""
        packed = tokens.packing.pack(context.transpose(1, 2).flatten(2))
        return Tokens(self.output(packed, tokens.states), tokens.packing)

    @property
    def current_dropout(self) -> float:
        """Dropout rate of the probabilities: 0 in evaluation mode."""
        return self.dropout if self.training else 0.0

    def split_heads(self, x: Tensor) -> Tensor:
        """(N, L, width) -> (N, H, L, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class AddNorm(nn.Module):
    """Linear layer, dropout, residual, layer norm."""

    def __init__(self, shape: BertShape, in_width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_width, shape.width)
        self.LayerNorm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.dropout = Dropout(shape.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(M, in width) and its residual (M, width) -> (M, width)."""
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class MlmHead(nn.Module):
    """Transform, then project to the vocabulary."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        self.transform: Any = nn.Module()
        self.transform.dense = nn.Linear(shape.width, shape.width)
        self.transform.LayerNorm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.decoder = nn.Linear(shape.width, shape.vocab_size)
        self.bias = self.decoder.bias  # LAVIS's checkpoints have it under both keys
        nn.init.normal_(self.transform.dense.weight, std=initial_std(shape.width))
        nn.init.zeros_(self.transform.dense.bias)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Vocabulary logits: (N, width) -> (N, vocabulary)."""
        return self.decoder(self.transform.LayerNorm(F.gelu(self.transform.dense(states))))
