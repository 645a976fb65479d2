"""What all models share: encoders built from the options, and their weights."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel
from omegaconf import DictConfig
from torch import nn
from transformers import BertTokenizerFast

from softmask_plugin.config.options import ModelOptions, read_options
from softmask_plugin.config.paths import shipped, whole_yaml
from softmask_plugin.config.values import comparable, flat
from softmask_plugin.errors import UserError, suggest
from softmask_plugin.files.checkpoint import HUB, Checkpoint, open_checkpoint
from softmask_plugin.models import weights
from softmask_plugin.nn.bert import BertForMaskedLM, BertModel, BertShape
from softmask_plugin.nn.vision import VisionTransformer
from softmask_plugin.tokenization import Captions, CaptionTokenizer
from softmask_plugin.vocabulary import build_tokenizer, vocabulary_of

# Options that no tensor shows, and that change what the weights compute
UNSEEN = ("bert.heads", "bert.image_cls", "vit.heads", "vit_layer_norm_epsilon", "text_pool")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def require_pairs(texts: int, images: int, each: int = 1) -> None:
    """Raise UserError unless there are ``each`` images for each text."""
    if images != each * texts:
        raise UserError(f"{images} images for {texts} text(s): each text takes {each}")


def shipped_types(arch: str, *types: str) -> dict[str, str]:
    """The YAML file of each type of a model, for LAVIS's ``PRETRAINED_MODEL_CONFIG_DICT``."""
    return {name: shipped(f"models/{arch}_{name}.yaml") for name in types}


class SoftMaskBase(BaseModel):
    """An image encoder and a BERT cut in two, under the names of LAVIS's ALBEF.

    A subclass sets ``OPTIONS``, the schema of its ``model:`` section, ``PREDICTS_WORDS``: whether
    its text encoder has the MLM head, which adds ``bert.`` to LAVIS's keys, and ``HEADS``: the
    modules that evaluation needs trained, beside the encoders.

    Attributes:
        new_heads: Those of ``HEADS`` that the last checkpoint lacked or had in another shape.
        trained_with: Configuration of the last checkpoint's run, by dotted key.
    """

    PRETRAINED_MODEL_CONFIG_DICT: dict[str, str] = {}
    OPTIONS: ClassVar[type[ModelOptions]] = ModelOptions
    PREDICTS_WORDS: ClassVar[bool] = False
    HEADS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.new_heads: list[str] = []
        self.trained_with: dict[str, Any] = {}
        self.calls = 0  # counts steps in training loops without `iters`
        self.asked_sep_token = options.sep_token  # None: follow the checkpoints that are loaded
        sep_token = options.sep_token is not False
        self.options: Any = replace(options, sep_token=sep_token)  # an instance of OPTIONS
        self.tokenizer = self.build_tokenizer(options)
        self.caption_tokenizer = CaptionTokenizer(self.tokenizer, options.max_txt_len, sep_token)
        self.visual_encoder = VisionTransformer(
            image_size=options.image_size,
            **vars(options.vit),
            drop_path=options.vit_drop_path_rate,
            norm_eps=options.vit_layer_norm_epsilon,
            checkpointing=options.vit_grad_ckpt,
        )
        shape = BertShape(**vars(options.bert), image_width=options.vit.width)
        shape = replace(shape, vocab_size=max(shape.vocab_size or 0, len(self.tokenizer)))
        self.text_encoder: Any = self.build_text_encoder(shape)

    @property
    def device(self) -> torch.device:
        """Where the weights are. LAVIS's own lists all parameters at each access."""
        return next(self.parameters()).device

    @property
    def bert(self) -> BertModel:
        """The text and multi-modal encoder, without the MLM head."""
        return bert_of(self.text_encoder)

    def build_tokenizer(self, options: ModelOptions) -> BertTokenizerFast:
        """Build the tokenizer."""
        return build_tokenizer(options.tokenizer, options.bert.vocab_size or 8192)

    def build_text_encoder(self, shape: BertShape) -> nn.Module:
        """Build the text and multi-modal encoder."""
        predicts = self.PREDICTS_WORDS or getattr(self.options, "map_score", "match") == "word"
        return BertForMaskedLM(shape) if predicts else BertModel(shape)

    @classmethod
    def default_config_path(cls, model_type: str) -> Any:
        """The YAML file of a type, which LAVIS hands to ``OmegaConf.load``: a stream of it, whole,
        with the keys that it inherits. UserError if there is no such type."""
        types = cls.PRETRAINED_MODEL_CONFIG_DICT
        if model_type not in types:
            hint = suggest(model_type, types)
            raise UserError(f"unknown type '{model_type}' of {cls.__name__}: {hint}")
        return io.StringIO(whole_yaml(super().default_config_path(model_type)))

    @classmethod
    def from_pretrained(cls, model_type: str) -> SoftMaskBase:
        """Build a trained model; UserError if there is none or it is of another class.

        Args:
            model_type: A type, as LAVIS has it; or, for a model in evaluation mode, the folder of
                ``softmask export`` or of a run, a checkpoint that records its configuration, or the
                name OWNER/NAME of an export on the Hugging Face hub.
        """
        source = str(model_type)
        exists = Path(source).exists()
        if source in (types := cls.PRETRAINED_MODEL_CONFIG_DICT):
            return super().from_pretrained(source)
        if not (exists or "/" in source):
            raise UserError(
                f"unknown type '{source}' of {cls.__name__}, and no such file or folder: "
                f"{suggest(source, types)}"
            )
        on_hub = not exists and _HUB_NAME.fullmatch(source)
        checkpoint = open_checkpoint(HUB + source if on_hub else source)
        section = {**(checkpoint.config or {"model": {}})["model"], "trust_checkpoint": False}
        own = registry.get_model_class(arch) if (arch := section.get("arch")) else None
        if own is None or not issubclass(own, cls):
            what = f"is a {own.__name__}" if own else "does not say which model it is of"
            raise UserError(f"{checkpoint.path} {what}, and {cls.__name__} was asked for")
        model = own.from_checkpoint(read_options(own.OPTIONS, section), checkpoint)
        return cast(SoftMaskBase, model.eval())

    @classmethod
    def from_config(cls, cfg: DictConfig) -> SoftMaskBase:
        """Build the model from the ``model:`` section of a YAML, and load the weights it names;
        UserError at an unknown key, a wrong value, or weights that cannot be loaded."""
        options = read_options(cls.OPTIONS, cfg)
        if options.checkpoint is not None:
            checkpoint = open_checkpoint(options.checkpoint, options.trust_checkpoint)
            return cls.from_checkpoint(options, checkpoint)
        model = cls(options)
        model.load_encoders()
        return model

    @classmethod
    def from_checkpoint(cls, options: Any, checkpoint: Checkpoint) -> SoftMaskBase:
        """Build a model of these options with the weights and the vocabulary of a checkpoint;
        ``options.tokenizer`` counts only if it has none."""
        with nullcontext() if options.trust_checkpoint else weights.BoundedBy(checkpoint.path):
            model = cls(replace(options, tokenizer=checkpoint.vocabulary or options.tokenizer))
        model.load_weights(checkpoint)
        return model

    def load_encoders(self) -> None:
        """Start the encoders from the pretrained weights that the options name, if any."""
        weights.initialise(self, self.options.vit_weights, self.options.bert_weights)

    def load_from_pretrained(self, url_or_filename: str, **_: Any) -> None:
        """Open a checkpoint of this plugin or of ALBEF and load it; LAVIS calls this."""
        self.load_weights(open_checkpoint(url_or_filename, self.options.trust_checkpoint))

    load_checkpoint = load_from_pretrained

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Load an open checkpoint; one line of the log says what did not match. Captions end with
        [SEP] if they did when it was trained, unless ``sep_token`` is set."""
        left = weights.load(self, checkpoint, self.options.bert)
        new = {key.partition(".")[0] for key in left if not key.endswith("position_ids")}
        self.new_heads = [name for name in self.HEADS if name in new]
        self.trained_with = flat(checkpoint.config or {})
        self._warn_of_options(checkpoint)
        if self.asked_sep_token is None:
            self.options.sep_token = self.caption_tokenizer.sep_token = checkpoint.sep_token

    def _warn_of_options(self, checkpoint: Checkpoint) -> None:
        trained = comparable(self.trained_with)
        own = flat({"model": asdict(self.options)})
        for key in (f"model.{name}" for name in UNSEEN):
            if key in own and trained.get(key, own[key]) != own[key]:
                logging.warning(
                    f"{checkpoint.path} was trained with {key}={trained[key]}, and this "
                    f"model has {own[key]}: set it as it was, unless you mean to change it"
                )
        if checkpoint.vocabulary not in (None, vocabulary_of(self.tokenizer)):
            logging.warning(
                f"{checkpoint.path} was trained with another vocabulary, so its weights take words "
                "for others: set model.tokenizer to its vocab.txt, or use from_pretrained"
            )

    def step_of(self, samples: dict[str, Any]) -> int:
        """Index of the step in the run."""
        if "iters" in samples:
            return samples["epoch"] * samples["num_iters_per_epoch"] + samples["iters"]
        self.calls += 1
        return self.calls - 1

    def tokenize(self, captions: Sequence[str]) -> Captions:
        """Tokenize captions, onto the model's device."""
        return self.caption_tokenizer.tokenize(captions).to(self.device)

    def part(self, name: str, suffix: str) -> Any:
        """A module or, with suffix "_m", its momentum copy."""
        return getattr(self, name + suffix)


def bert_of(text_encoder: nn.Module) -> Any:
    """The BERT of a text encoder with or without an MLM head."""
    return getattr(text_encoder, "bert", text_encoder)
