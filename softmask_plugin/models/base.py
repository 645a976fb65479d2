"""What every SoftMask++ model shares: encoders built from options, weights, retrieval scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lavis.models.base_model import BaseModel
from omegaconf import DictConfig
from torch import Tensor

from softmask_plugin.models import weights
from softmask_plugin.models.rerank import Reranker, RerankOptions
from softmask_plugin.nn.bert import BertForMaskedLM, BertShape
from softmask_plugin.nn.vision import VisionTransformer
from softmask_plugin.options import PretrainOptions, read_options
from softmask_plugin.tokenization import CaptionReader, build_tokenizer


class SoftMaskBase(BaseModel):
    """Image encoder, BERT cut in two, projections and the matching head, under LAVIS's names."""

    PRETRAINED_MODEL_CONFIG_DICT: dict[str, str] = {}

    def __init__(self, options: PretrainOptions) -> None:
        super().__init__()
        self.options = options
        self.tokenizer = build_tokenizer(options.tokenizer, options.bert.vocab_size or 8192)
        self.reader = CaptionReader(self.tokenizer, options.max_txt_len)
        self.visual_encoder = build_vision(options)
        self.text_encoder = BertForMaskedLM(bert_shape(options, len(self.tokenizer)))
        self.vision_proj = torch.nn.Linear(options.vit.width, options.embed_dim)
        self.text_proj = torch.nn.Linear(options.bert.width, options.embed_dim)
        self.itm_head = torch.nn.Linear(options.bert.width, 2)
        self.temp = torch.nn.Parameter(torch.tensor(options.temp), requires_grad=options.learn_temp)

    @property
    def bert(self) -> Any:
        """The encoder whose ``encode``, ``remember`` and ``fuse`` make up a forward pass."""
        return self.text_encoder.bert

    @classmethod
    def from_config(cls, cfg: DictConfig) -> SoftMaskBase:
        """Build the model from the ``model:`` section of a YAML, and load the weights it names.

        Raises:
            UserError: an unknown key, a wrong value, or weights that cannot be had.
        """
        options = read_options(PretrainOptions, cfg)
        model = cls(options)
        source = options.finetuned if options.load_finetuned else None
        if source is None and options.load_pretrained:
            source = options.pretrained
        if source is not None:
            model.load_from_pretrained(source)
        else:
            model.load_encoders()
        return model

    def load_encoders(self) -> None:
        """Start the encoders from their own pre-training, where the options name any."""
        weights.initialise(self, self.options.vit_weights, self.options.bert_weights)

    def load_from_pretrained(self, url_or_filename: str, **_: Any) -> None:
        """Load a checkpoint of this model or of ALBEF; says in one line what did not match."""
        weights.load(self, url_or_filename)

    load_checkpoint = load_from_pretrained

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


def build_vision(options: PretrainOptions) -> VisionTransformer:
    """The image encoder that ``options`` describe."""
    vit = options.vit
    return VisionTransformer(
        image_size=options.image_size,
        patch_size=vit.patch_size,
        width=vit.width,
        depth=vit.depth,
        heads=vit.heads,
        mlp_ratio=vit.mlp_ratio,
        drop_path=options.vit_drop_path_rate,
        norm_eps=options.vit_layer_norm_epsilon,
        checkpointing=options.vit_grad_ckpt,
    )


def bert_shape(options: PretrainOptions, tokens: int) -> BertShape:
    """The shape of the text and multi-modal encoder; it has room for every token."""
    bert = options.bert
    return BertShape(
        vocab_size=max(bert.vocab_size or tokens, tokens),
        width=bert.width,
        layers=bert.layers,
        heads=bert.heads,
        intermediate=bert.intermediate,
        fusion_layer=bert.fusion_layer,
        image_width=options.vit.width,
        max_positions=bert.max_positions,
        dropout=bert.dropout,
        attention_dropout=bert.attention_dropout,
    )
