"""A checkpoint made ready for use: the model that it is of, and the processors that it expects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.common.utils import is_url
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from softmask_plugin.config.check import parse_options, valid_yaml
from softmask_plugin.errors import UserError, suggest
from softmask_plugin.files.download import fetch
from softmask_plugin.files.tensors import read_state_dict
from softmask_plugin.models.aligned import AlignedBase

# (model.arch, model.model_type) of the weights that are used where none are named; None: name some.
DEFAULT: tuple[str, str] | None = ("softmask_image_text_matching", "scenes_tiny")

SECTIONS = ("model", "preprocess")  # that options may change
# What a run's model section says of the weights that the run began with, and of trust in them: a
# checkpoint must not decide that it may run code.
BEGINNING = (
    "load_pretrained load_finetuned finetuned pretrained trust_checkpoint vit_weights bert_weights"
).split()


@dataclass(frozen=True)
class Trained:
    """A model with a matching head and its processors.

    Attributes:
        model: in evaluation mode, on the CPU.
        image_processor: of a PIL image, to (3, H, W).
        text_processor: of a caption.
    """

    model: AlignedBase
    image_processor: Callable[[Image.Image], Tensor]
    text_processor: Callable[[str], str]

    @classmethod
    def of(cls, model: AlignedBase) -> Trained:
        """A model that is there already, with the default processors.

        Raises:
            UserError: it is none of this plugin's with a matching head.
        """
        if not isinstance(model, AlignedBase):
            raise UserError(
                f"a {type(model).__name__} cannot be explained: give one of the models with a "
                f"matching head, {', '.join(_with_head())}"
            )
        return cls(model, *_processors({}, model.options.image_size))


def load_trained(
    checkpoint: str | Path | None = None,
    arch: str | None = None,
    model_type: str | None = None,
    options: Sequence[str] = (),
) -> Trained:
    """Load a model by what its checkpoint, or else a model type, says of it.

    Args:
        checkpoint: file or URL. One of this plugin holds its model's configuration, or has the
            run's ``config.yaml`` beside it; the ``vocab.txt`` beside it is the vocabulary.
        arch, model_type: the model that a checkpoint without a configuration is of (ALBEF.pth, for
            instance), or, without a checkpoint, the one whose own weights are loaded.
        options: overrides, "model.key=value" or "preprocess.vis_processor.eval.key=value".

    Raises:
        UserError: there are no weights, or they cannot be had; nothing says what model they are
            of, or it has no matching head; an option is wrong.
    """
    if arch is None and model_type is not None:
        raise UserError("a type needs its model: give --model with --type (arch with model_type)")
    if checkpoint is None and arch is None:
        if DEFAULT is None:
            raise UserError("there are no weights to use: give --checkpoint FILE")
        arch, model_type = DEFAULT
    file = None if checkpoint is None else _local(str(checkpoint))
    config = _config_of(file) if arch is None and file else _config_of_type(arch, model_type)
    overrides = parse_options(options, SECTIONS)
    config = OmegaConf.merge(config, overrides)  # type: ignore[assignment]
    if file is not None:
        own = {"pretrained": str(file), "load_pretrained": True, "load_finetuned": False}
        config.model = OmegaConf.merge(config.model, own)
    elif not (config.model.get("pretrained") or config.model.get("finetuned")):
        raise UserError(
            f"the type '{model_type}' of {arch} comes without weights: name a checkpoint of it"
        )
    model = _model_class(config.model).from_config(config.model)
    if file is not None:
        _require_head(file, bool(config.model.get("trust_checkpoint", False)))
    processors = _processors(config.get("preprocess") or {}, model.options.image_size)
    return Trained(model.eval(), *processors)


def _local(checkpoint: str) -> Path:
    path = fetch(checkpoint) if is_url(checkpoint) else Path(checkpoint).expanduser()
    if not path.is_file():
        raise UserError(f"no checkpoint at {checkpoint}: give a file or a URL")
    return path


def _require_head(file: Path, trusted: bool) -> None:
    """Raise UserError where the head would be left as it was drawn, and so would the scores be."""
    if not any("itm_head." in key for key in read_state_dict(str(file), trusted)):
        raise UserError(f"{file} has no matching head (itm_head), so it tells no match of a pair")


def _config_of(file: Path) -> DictConfig:
    """The sections model and preprocess of the run that a checkpoint is of."""
    run = _config_within(file) or _config_beside(file)
    if run is None:
        raise UserError(
            f"{file} does not say what model it is of: give --model and --type (in Python "
            "arch and model_type), softmask_image_text_matching and base for ALBEF.pth"
        )
    model = {key: value for key, value in run["model"].items() if key not in BEGINNING}
    if (vocabulary := file.parent / "vocab.txt").is_file():
        model["tokenizer"] = str(vocabulary)
    dataset = next(iter((run.get("datasets") or {}).values()), None) or {}
    preprocess = {slot: dataset.get(slot) for slot in ("vis_processor", "text_processor")}
    return OmegaConf.create({"model": model, "preprocess": preprocess})


def _config_within(file: Path) -> Any:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return content["config"] if "model" in content["config"] else None
    except Exception:  # of another kind, or broken: who loads its weights tells
        return None


def _config_beside(file: Path) -> Any:
    path = file.parent / "config.yaml"
    if not path.is_file():
        return None
    with valid_yaml(path):
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    return content if isinstance(content, dict) and "model" in content else None


def _config_of_type(arch: Any, model_type: str | None) -> DictConfig:
    model_class = _model_class(OmegaConf.create({"arch": arch}))
    types = model_class.PRETRAINED_MODEL_CONFIG_DICT
    if model_type not in types:
        raise UserError(f"unknown type '{model_type}' of {arch}: {suggest(str(model_type), types)}")
    config: Any = OmegaConf.load(model_class.default_config_path(model_type))
    return config


def _model_class(model: DictConfig) -> Any:
    fitting, arch = _with_head(), str(model.get("arch"))
    if arch not in fitting:
        raise UserError(f"no model '{arch}' with a matching head: {suggest(arch, fitting)}")
    return fitting[arch]


def _with_head() -> dict[str, type[AlignedBase]]:
    """The models of which the words can be explained, by name."""
    classes = {name: registry.get_model_class(name) for name in registry.list_models()}
    return {name: each for name, each in classes.items() if issubclass(each, AlignedBase)}


def _processors(preprocess: Any, image_size: int) -> tuple[Any, Any]:
    """Those for evaluation; where a run had none, such as fit those that it trained with."""
    image, text = (preprocess.get(slot) or {} for slot in ("vis_processor", "text_processor"))
    seen = image.get("train") or {}
    known = {key: seen[key] for key in ("mean", "std") if seen.get(key) is not None}
    given = {**(image.get("eval") or {}), **known, "image_size": image_size}
    return (
        _processor({"name": "softmask_image_eval", **given}),
        _processor({"name": "softmask_caption", **(text.get("eval") or text.get("train") or {})}),
    )


def _processor(section: dict[str, Any]) -> Any:
    name = section["name"]
    if name not in registry.list_processors():
        raise UserError(f"unknown processor '{name}': {suggest(name, registry.list_processors())}")
    return registry.get_processor_class(name).from_config(OmegaConf.create(section))
