"""Models that compare images and texts: features for ITC, a head for ITM, retrieval scores."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from softmask_plugin.config.options import MatchingOptions, ModelOptions
from softmask_plugin.files.checkpoint import Checkpoint
from softmask_plugin.models.base import SoftMaskBase, bert_of
from softmask_plugin.models.rerank import Reranker
from softmask_plugin.nn.tokens import Packing, Tokens
from softmask_plugin.soft_mask import similarity_map


class Features(NamedTuple):
    """A batch, encoded by the online or the momentum encoders."""

    image: Tensor  # image states, (B, S, width)
    text: Tokens  # of N >= B captions as fusion takes them, those for ITC first
    words: Tokens  # the states of their words without an image
    image_feat: Tensor  # unit vectors, (B, embed_dim), float32
    text_feat: Tensor  # unit vectors, (B, embed_dim), float32


class AlignedBase(SoftMaskBase):
    """The encoders with projections to a common space, a temperature and a matching head."""

    headless = False  # whether the weights lack the MLM head that the text encoder may have

    def __init__(self, options: ModelOptions) -> None:
        super().__init__(options)
        option = self.options
        self.vision_proj = torch.nn.Linear(option.vit.width, option.embed_dim)
        self.text_proj = torch.nn.Linear(option.bert.width, option.embed_dim)
        self.itm_head = torch.nn.Linear(option.bert.width, 2)
        self.temp = torch.nn.Parameter(torch.tensor(option.temp))

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Load an open checkpoint; without an MLM head in it, maps can only explain the match."""
        super().load_weights(checkpoint)
        predicts = any(".cls.predictions." in key for key in checkpoint.state)
        self.headless = isinstance(self.options, MatchingOptions) and not predicts
        if self.headless and self.options.map_score == "word":
            logging.warning("%s has no MLM head: word maps explain the match", checkpoint.path)
            self.options.map_score = "match"

    def image_features(self, states: Tensor, suffix: str = "") -> Tensor:
        """Unit vectors for ITC: image states (..., width) -> (..., embed_dim), float32."""
        return F.normalize(self.part("vision_proj", suffix)(states).float(), dim=-1)

    def text_features(self, states: Tensor, suffix: str = "") -> Tensor:
        """Unit vectors for ITC: text states (..., width) -> (..., embed_dim), float32."""
        return F.normalize(self.part("text_proj", suffix)(states).float(), dim=-1)

    def encode_captions(
        self, ids: Tensor, packing: Packing, suffix: str = ""
    ) -> tuple[Tokens, Tokens, Tensor]:
        """Encode N captions, from their ids (N, T): what ``fuse`` takes, the states of their words
        without an image, and unit vectors for ITC, (N, embed_dim), float32."""
        text = bert_of(self.part("text_encoder", suffix)).encode(ids, packing)
        return text, text, self.text_features(self.pooled(text), suffix)

    def pooled(self, text: Tokens) -> Tensor:
        """The state of each of N captions that ITC compares, (N, width); see ``text_pool``."""
        return text.mean if self.options.text_pool == "mean" else text.cls

    @torch.no_grad()
    def similarity_maps(self, image: Tensor, text: Tokens) -> Tensor:
        """Maps of the tokens of B captions by their similarity to the patches of image states
        (B, S, width): (B, T, P), float32."""
        words = text.packing.pad(self.text_features(text.states))
        with torch.autocast(image.device.type, enabled=False):
            return similarity_map(words, self.image_features(image[:, 1:]), self.temp)

    def match(self, cls: Tensor) -> Tensor:
        """Matching logits (N, 2) of multi-modal [CLS] states (N, width): [no match, match]."""
        with torch.autocast(cls.device.type, enabled=False):  # bf16 would tie close scores
            return self.itm_head(cls.to(self.itm_head.weight.dtype))

    def compute_sim_matrix(
        self, data_loader: Any, task_cfg: DictConfig
    ) -> tuple[np.ndarray, np.ndarray]:
        """Score images against texts for LAVIS's ``retrieval`` task.

        Args:
            data_loader: Over a retrieval data set with attributes ``text`` and ``image``.
            task_cfg: The ``run:`` section.

        Returns:
            Scores (images, texts) and (texts, images).
        """
        return Reranker(self, task_cfg).scores(data_loader)
