"""What every SoftMask++ model shares: encoders built from options, and weights."""

from __future__ import annotations

from typing import Any, ClassVar

from lavis.models.base_model import BaseModel
from omegaconf import DictConfig
from torch import Tensor, nn

from softmask_plugin.config.options import ModelOptions, read_options
from softmask_plugin.errors import UserError
from softmask_plugin.models import weights
from softmask_plugin.nn.bert import BertForMaskedLM, BertModel, BertShape
from softmask_plugin.nn.tokens import Layout
from softmask_plugin.nn.vision import VisionTransformer
from softmask_plugin.tokenization import CaptionReader, build_tokenizer


class SoftMaskBase(BaseModel):
    """Image encoder and BERT cut in two, under the names that LAVIS's ALBEF gives them.

    A subclass names its ``OPTIONS``, the schema of its ``model:`` section, and says in
    ``PREDICTS_WORDS`` whether its text encoder has the MLM head, with which LAVIS's keys gain a
    ``bert.``.
    """

    PRETRAINED_MODEL_CONFIG_DICT: dict[str, str] = {}
    OPTIONS: ClassVar[type[ModelOptions]] = ModelOptions
    PREDICTS_WORDS: ClassVar[bool] = False

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.calls = 0  # counts steps for training loops that give no `iters`
        self.options: Any = options  # of the class that OPTIONS names
        self.tokenizer = build_tokenizer(options.tokenizer, options.bert.vocab_size or 8192)
        self.reader = CaptionReader(self.tokenizer, options.max_txt_len)
        self.visual_encoder = build_vision(options)
        self.text_encoder: Any = self.build_text_encoder(bert_shape(options, len(self.tokenizer)))

    @property
    def bert(self) -> BertModel:
        """The encoder whose ``encode``, ``remember`` and ``fuse`` make up a forward pass."""
        return bert_of(self.text_encoder)

    def build_text_encoder(self, shape: BertShape) -> nn.Module:
        """The text and multi-modal encoder of the shape that the options describe."""
        return BertForMaskedLM(shape) if self.PREDICTS_WORDS else BertModel(shape)

    @classmethod
    def from_config(cls, cfg: DictConfig) -> SoftMaskBase:
        """Build the model from the ``model:`` section of a YAML, and load the weights it names.

        Raises:
            UserError: an unknown key, a wrong value, or weights that cannot be had.
        """
        options = read_options(cls.OPTIONS, cfg)
        if options.load_finetuned and options.finetuned is None:
            raise UserError("model.load_finetuned is true, but model.finetuned names no checkpoint")
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
        """Load a checkpoint of this plugin or of ALBEF; says in one line what did not match."""
        option = self.options
        weights.load(self, url_or_filename, option.bert.fusion_layer, option.trust_checkpoint)

    load_checkpoint = load_from_pretrained

    def step_of(self, samples: dict[str, Any]) -> int:
        """Index of the step in the run, from what LAVIS's tasks tell."""
        if "iters" in samples:
            return samples["epoch"] * samples["num_iters_per_epoch"] + samples["iters"]
        self.calls += 1
        return self.calls - 1

    def read(self, captions: list[str]) -> tuple[Tensor, Layout]:
        """Tokenize: ids (N, T) and where the tokens are, on the device."""
        clean = self.reader.read(captions)
        return clean.ids.to(self.device), Layout.of(clean.mask).to(self.device)


def bert_of(text_encoder: nn.Module) -> Any:
    """The BERT of a text encoder with or without an MLM head."""
    return getattr(text_encoder, "bert", text_encoder)


def build_vision(options: ModelOptions) -> VisionTransformer:
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


def bert_shape(options: ModelOptions, tokens: int) -> BertShape:
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
