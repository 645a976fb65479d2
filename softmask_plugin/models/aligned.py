"""Models that compare images and texts: features for ITC, a head for ITM, retrieval scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from softmask_plugin.config.options import ModelOptions
from softmask_plugin.config.run_options import RerankOptions
from softmask_plugin.models.base import SoftMaskBase
from softmask_plugin.models.rerank import Reranker


class AlignedBase(SoftMaskBase):
    """Projections to a common space, temperature and matching head, on top of the encoders."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__(options)
        option = self.options
        self.vision_proj = torch.nn.Linear(option.vit.width, option.embed_dim)
        self.text_proj = torch.nn.Linear(option.bert.width, option.embed_dim)
        self.itm_head = torch.nn.Linear(option.bert.width, 2)
        self.temp = torch.nn.Parameter(torch.tensor(option.temp))

    @property
    def map_layer(self) -> int:
        """BERT layer whose cross-attention gives the maps of words."""
        return self.options.map_layer

    def match(self, cls: Tensor) -> Tensor:
        """Matching logits (N, 2) from the multi-modal [CLS] (N, width): [no match, match]."""
        return self.itm_head(cls)

    def compute_sim_matrix(
        self, data_loader: Any, task_cfg: DictConfig
    ) -> tuple[np.ndarray, np.ndarray]:
        """Score images against texts for LAVIS's ``retrieval`` task.

        Args:
            data_loader: over a retrieval data set with attributes ``text`` and ``image``.
            task_cfg: the ``run:`` section; of it ``RerankOptions`` are read.

        Returns:
            Scores (images, texts) and (texts, images).
        """
        return Reranker(self, RerankOptions.of(task_cfg)).scores(data_loader)
