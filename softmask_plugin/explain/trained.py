"""Load a trained model with a matching head, and the processors that it expects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.models.albef_models.albef_pretrain import AlbefPretrain
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from lavis.models.blip_models.blip_pretrain import BlipPretrain
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from softmask_plugin.config.check import parse_options
from softmask_plugin.config.options import read_options
from softmask_plugin.errors import UserError, advice_on, reason_of, suggest
from softmask_plugin.explain.lavis_models import matcher_of, with_head
from softmask_plugin.explain.matcher import Matcher
from softmask_plugin.files.checkpoint import SHIPPED, Checkpoint, open_checkpoint
from softmask_plugin.models.aligned import AlignedBase

# (model.arch, model.model_type) of the bundled model, the default
DEFAULT = ("softmask_image_text_matching", "scenes_tiny")
PRETRAINED = (AlbefPretrain, BlipPretrain)  # LAVIS builds these without any weights
LAVIS_PROCESSORS = {
    "vis_processor": {"eval": {"name": "blip_image_eval"}},
    "text_processor": {"eval": {"name": "blip_caption"}},
}


@dataclass(frozen=True)
class Trained:
    """A model with a matching head and its processors.

    Attributes:
        model: One of this plugin or of LAVIS, in evaluation mode; ``load_trained`` leaves it on the
            CPU.
        image_processor: Turns a PIL image into a tensor (3, H, W).
        text_processor: Cleans a caption.
        bundled: Whether the weights are those that come with the package.
        run: Settings of the run that trained it, as far as its checkpoint has them.
    """

    model: Any
    image_processor: Callable[[Image.Image], Tensor]
    text_processor: Callable[[str], str]
    bundled: bool = False
    run: Mapping[str, Any] = field(default_factory=dict)

    @property
    def matcher(self) -> Matcher:
        """The model as maps and explanations use it."""
        return matcher_of(self.model)

    def on_gpu(self) -> Trained:
        """The same, with its model moved to the GPU if there is one."""
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        return self

    @classmethod
    def of(cls, model: Any) -> Trained:
        """Pair a model with the processors of its type, or BLIP's for one of LAVIS.

        Raises:
            UserError: It is no model with a matching head.
        """
        matcher = matcher_of(model)
        model = matcher.model  # behind a matcher or torch.compile
        preprocess: Any = LAVIS_PROCESSORS
        if isinstance(model, AlignedBase):
            types, own = model.PRETRAINED_MODEL_CONFIG_DICT, model.options.model_type
            known: Any = OmegaConf.load(model.default_config_path(own)) if own in types else {}
            preprocess = known.get("preprocess") or {}
        return cls(model, *_processors(preprocess, matcher.image_size))


def load_trained(
    checkpoint: str | Path | None = None,
    arch: str | None = None,
    model_type: str | None = None,
    options: Sequence[str] = (),
) -> Trained:
    """Load a model as its checkpoint, or else a model type, describes it.

    Args:
        checkpoint: A file, a run's folder or a URL. Checkpoints of this plugin hold the
            configuration and the vocabulary of their run, or have them beside them.
        arch, model_type: The model of a checkpoint without a configuration (ALBEF.pth, for
            instance) or, without a checkpoint, the model whose own weights are loaded.
        options: Overrides, "model.key=value" or "preprocess.vis_processor.eval.key=value".

    Raises:
        UserError: There are no weights or they cannot be loaded, nothing says which model they
            belong to, it has no matching head, or an option is wrong.
    """
    if arch is None and model_type is not None:
        raise UserError("a type needs its model: give --model with --type (arch with model_type)")
    if arch is None and (checkpoint is None or str(checkpoint).startswith(SHIPPED)):
        arch, model_type = DEFAULT
    overrides = parse_options(options, sections=("model", "preprocess"))
    run: Mapping[str, Any] = {}
    if checkpoint is None:
        config: Any = OmegaConf.merge(_config_of_type(arch, model_type), overrides)
        model_class = _model_class(arch)
        known = config.model.get("pretrained") or config.model.get("finetuned")
        if not known or issubclass(model_class, PRETRAINED):
            like = f" such as {known}" if known else ""
            raise UserError(
                f"the type '{model_type}' of {arch} comes without weights: name a checkpoint of it"
                + like
            )
        model = _build(model_class, config.model)
    else:
        trusted = bool(OmegaConf.select(overrides, "model.trust_checkpoint"))
        opened = open_checkpoint(checkpoint, trusted)
        if arch is None:
            described = _config_of(opened)
            run = (opened.config or {}).get("run") or {}
        else:
            described = _config_of_type(arch, model_type)
        config = OmegaConf.merge(described, overrides)
        model_class = _model_class(arch or config.model.arch)
        if not any("itm_head." in key for key in opened.state):  # it would stay random
            raise UserError(f"{opened.path} has no matching head (itm_head): it scores no pair")
        if issubclass(model_class, AlignedBase):
            options = read_options(model_class.OPTIONS, config.model)
            model = model_class.from_checkpoint(options, opened)
        else:
            model = _build(model_class, config.model, opened)
    processors = _processors(config.get("preprocess") or {}, matcher_of(model).image_size)
    weights = config.model.get("pretrained") if checkpoint is None else checkpoint
    return Trained(model.eval(), *processors, str(weights).startswith(SHIPPED), run)


def _config_of(checkpoint: Checkpoint) -> DictConfig:
    """The sections model and preprocess of the run that wrote a checkpoint."""
    run, path = checkpoint.config, checkpoint.path
    if run is None:
        raise UserError(
            f"{path} does not say which model it belongs to: give --model and --type (in Python "
            "arch and model_type), softmask_image_text_matching and base for ALBEF.pth"
        )
    # A checkpoint must not decide that it may run code
    model = {key: value for key, value in run["model"].items() if key != "trust_checkpoint"}
    dataset = next(iter((run.get("datasets") or {}).values()), None) or {}
    preprocess = {slot: dataset.get(slot) for slot in ("vis_processor", "text_processor")}
    return OmegaConf.create({"model": model, "preprocess": preprocess})


def _config_of_type(arch: Any, model_type: str | None) -> DictConfig:
    model_class = _model_class(arch)
    if model_type is None:
        types = ", ".join(model_class.PRETRAINED_MODEL_CONFIG_DICT)
        raise UserError(f"no type of {arch} is given: name one with --type (model_type): {types}")
    if model_type not in (types := model_class.PRETRAINED_MODEL_CONFIG_DICT):
        raise UserError(f"unknown type '{model_type}' of {arch}: {suggest(str(model_type), types)}")
    config: Any = OmegaConf.load(model_class.default_config_path(model_type))
    return config


def _model_class(arch: Any) -> Any:
    fitting = with_head()
    if arch not in fitting:
        raise UserError(f"no model '{arch}' with a matching head: {suggest(str(arch), fitting)}")
    return fitting[arch]


def _build(model_class: Any, config: Any, checkpoint: Checkpoint | None = None) -> Any:
    """A model with its type's weights or, if it is one of LAVIS, those of a checkpoint."""
    if checkpoint is not None:
        file = str(checkpoint.path)
        config = OmegaConf.merge(config, {"load_finetuned": True, "finetuned": file})
    if issubclass(model_class, Blip2Qformer):
        config = OmegaConf.merge(config, {"vit_precision": "fp32"})  # a CPU cannot run LAVIS's fp16
    try:
        model = model_class.from_config(config)
        if checkpoint is not None and isinstance(model, PRETRAINED):  # from_config loaded nothing
            renaming = {"rename_text_keys": False} if isinstance(model, AlbefPretrain) else {}
            model.load_from_pretrained(file, **renaming)
    except OSError as error:  # LAVIS's models load a tokenizer and weights from the network
        raise UserError(f"cannot build {model_class.__name__}: {advice_on(error)}") from error
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise UserError(f"the weights do not fit: {reason_of(error)}") from error
    if checkpoint is not None:  # LAVIS would only log what it lacks; it saves no frozen weights
        trained = {name for name, each in model.named_parameters() if each.requires_grad}
        if missing := sorted(trained - checkpoint.state.keys()):
            raise UserError(
                f"{file} is not of {model_class.__name__}: it lacks {len(missing)} of its tensors, "
                f"such as {missing[0]}; name its model with --model and --type"
            )
    return model


def _processors(preprocess: Any, image_size: int) -> tuple[Any, Any]:
    """Evaluation's processors; mean and std that they do not name are those of training."""
    image, text = (preprocess.get(slot) or {} for slot in ("vis_processor", "text_processor"))
    train = image.get("train") or {}
    known = {key: train[key] for key in ("mean", "std") if train.get(key) is not None}
    given = {**known, **(image.get("eval") or {}), "image_size": image_size}
    return (
        _processor({"name": "softmask_image_eval", **given}),
        _processor({"name": "softmask_caption", **(text.get("eval") or text.get("train") or {})}),
    )


def _processor(section: dict[str, Any]) -> Any:
    name = section["name"]
    if name not in registry.list_processors():
        raise UserError(f"unknown processor '{name}': {suggest(name, registry.list_processors())}")
    return registry.get_processor_class(name).from_config(OmegaConf.create(section))
