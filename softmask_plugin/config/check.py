"""Checks of a YAML file and its overrides: each mistake gets one line with the nearest names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from softmask_plugin.config.paths import find_file, shipped_configs
from softmask_plugin.config.run_options import NEEDED, NEEDED_TO_TRAIN, RUN, check_values, setting
from softmask_plugin.config.values import check_image_sizes, require_section
from softmask_plugin.errors import UserError, reason_of, require_known, suggest

SECTIONS = ("model", "datasets", "run")

# Tasks of LAVIS that read keys beyond RUN; no model of this plugin supports them.
OTHER_KEYS = ("vqa_reading_comprehension", "gqa_reading_comprehension")


def find_config(cfg_path: str | Path) -> Path:
    """Find the file that ``--cfg-path`` names: a path, or the name of a shipped file."""
    return find_file("--cfg-path", cfg_path, shipped_configs())


def read_config(
    path: Path, options: Sequence[str] = (), content: dict[str, Any] | None = None
) -> DictConfig:
    """Load a YAML file, merge overrides "section.key=value", and check the result.

    ``content``, if given, is that of the file.

    This checks registered names, processors, image sizes and the run section. Models, data sets
    and processors of this plugin check their own keys when they are built.

    Raises:
        UserError: At the first mistake.
    """
    overrides = parse_options(options)
    with valid_yaml(path):
        loaded = OmegaConf.load(path) if content is None else OmegaConf.create(content)
    try:
        _check_sections(loaded)
        try:
            config: Any = OmegaConf.merge(loaded, overrides)
        except TypeError as error:  # a key of a list, such as run.train_splits.0
            raise UserError(f"--options: {reason_of(error)}: set a list as a whole") from error
        defaults = [_model_defaults(config.model)]
        for name in config.datasets:
            if config.datasets[name] is None:
                config.datasets[name] = {}  # all defaults
            defaults.append(_dataset_defaults(str(name), config.datasets[name]))
        whole: Any = OmegaConf.merge(*defaults, config)
        for name in config.datasets:
            _check_processors(f"datasets.{name!s}", whole.datasets[name])
        check_image_sizes(whole)
        _check_run(config.run)
    except (UserError, OmegaConfBaseException) as error:
        raise UserError(
            f"{reason_of(error)} (in {path}{' or --options' if options else ''})"
        ) from None
    return config


@contextmanager
def valid_yaml(path: Path) -> Iterator[None]:
    """Turn errors of a YAML file into one line that names it."""
    try:
        yield
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {reason_of(error)}") from error
    except RecursionError as error:
        raise UserError(f"{path} has too many levels") from error


def parse_options(options: Sequence[str], sections: Sequence[str] = SECTIONS) -> DictConfig:
    """Parse overrides; UserError unless each is of the form "section.key=value"."""
    for option in options:
        key, equals, _ = option.partition("=")
        if not equals or "." not in key:
            raise UserError(f"--options: '{option}' is not of the form section.key=value")
        _known(f"--options: section '{key.split('.')[0]}'", key.split(".")[0], sections)
    try:
        return OmegaConf.from_dotlist([_without_comments(option) for option in options])
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"--options: {reason_of(error)}") from error


def _without_comments(given: str) -> str:
    """Quote a value that YAML would cut at a #, which a shell passes on as any other character."""
    key, _, value = given.partition("=")
    plain = not value.lstrip().startswith(("'", '"', "[", "{"))
    return option(key, value) if plain and re.search(r"(^|\s)#", value) else given


def option(key: str, value: object) -> str:
    """An override with any text as its value, quoted so that YAML takes it literally.

    >>> print(option("run.output_dir", "runs/ #1"))
    run.output_dir="runs/ #1"
    """
    return f"{key}={json.dumps(str(value), ensure_ascii=False)}"


def _check_sections(config: Any) -> None:
    for section in map(str, config if isinstance(config, DictConfig) else ()):
        if section != "preprocess":  # LAVIS merges it into the config.yaml of a run
            _known(f"section '{section}'", section, SECTIONS)
    for section in SECTIONS:
        if not isinstance(config, DictConfig) or not isinstance(config.get(section), DictConfig):
            raise UserError(f"the section '{section}' is missing or empty")


def _model_defaults(model: DictConfig) -> Any:
    _needed(model, ["arch", "model_type"], "model")
    _known(f"model.arch '{model.arch}'", model.arch, registry.list_models())
    cls = registry.get_model_class(model.arch)
    types = cls.PRETRAINED_MODEL_CONFIG_DICT
    _known(f"model.model_type '{model.model_type}' of {model.arch}", model.model_type, types)
    return OmegaConf.load(cls.default_config_path(model.model_type))


def _dataset_defaults(name: str, dataset: Any) -> Any:
    where = f"datasets.{name}"
    _known(f"data set {where}", name, registry.list_datasets())
    require_section(where, dataset)
    builder = registry.get_builder_class(name)
    kind = dataset.get("type", "default")
    _known(f"{where}.type '{kind}'", kind, builder.DATASET_CONFIG_DICT)
    return OmegaConf.load(builder.default_config_path(type=kind))


def _check_processors(where: str, dataset: DictConfig) -> None:
    for slot in ("vis_processor", "text_processor"):
        if dataset.get(slot) is None:
            continue
        require_section(f"{where}.{slot}", dataset[slot])
        for split, processor in dataset[slot].items():
            if processor is not None:
                require_section(f"{where}.{slot}.{split!s}", processor)
            found = (processor or {}).get("name")
            _known(f"{where}.{slot}.{split!s}.name '{found}'", found, registry.list_processors())


def _check_run(run: DictConfig) -> None:
    _needed(run, [key for key, known in RUN.items() if known.default == NEEDED], "run")
    runner = setting(run, "runner")
    _known(f"run.task '{run.task}'", run.task, registry.list_tasks())
    _known(f"run.runner '{runner}'", runner, registry.list_runners())
    if not _may_read_other_keys(str(run.task), runner):
        require_known("run", run, RUN)
    check_values(run)
    if not setting(run, "evaluate"):
        _needed(run, [key for key, known in RUN.items() if known.default == NEEDED_TO_TRAIN], "run")
        if run.get("max_steps" if runner == "softmask_runner" else "max_iters") is None:
            _needed(run, ["max_epoch"], "run")
        if run.lr_sched == "linear_warmup_step_lr":
            _needed(run, ["lr_decay_rate"], "run")
        _known(f"run.lr_sched '{run.lr_sched}'", run.lr_sched, registry.list_lr_schedulers())
    _check_device(run.device)


def _may_read_other_keys(task: str, runner: str) -> bool:
    readers = (registry.get_task_class(task), registry.get_runner_class(runner))
    packages = {reader.__module__.partition(".")[0] for reader in readers}
    return task in OTHER_KEYS or not packages <= {"lavis", "softmask_plugin"}


def _check_device(device: str) -> None:
    _known(f"run.device '{device}'", device, ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "run.device is cuda, but PyTorch finds no CUDA device: "
            "see 'softmask doctor', or add --options run.device=cpu"
        )


def _needed(section: DictConfig, keys: Iterable[str], where: str) -> None:
    for key in keys:
        if section.get(key) is None:
            raise UserError(f"{where}.{key} is missing")


def _known(what: str, name: Any, choices: Iterable[Any]) -> None:
    choices = [str(choice) for choice in choices]
    if str(name) not in choices:
        raise UserError(f"unknown {what}: {suggest(name, choices)}")
