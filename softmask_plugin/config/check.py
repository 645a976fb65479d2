"""Checks of a YAML file and its overrides: a typo gets one line with the nearest valid names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from softmask_plugin.config.paths import CONFIGS
from softmask_plugin.config.run_options import (
    NEEDED,
    NEEDED_TO_TRAIN,
    RUN,
    RerankOptions,
    check_values,
    setting,
)
from softmask_plugin.config.values import check_image_sizes, require_section
from softmask_plugin.errors import UserError, reason_of, suggest

SECTIONS = ("model", "datasets", "run")

RUN_KEYS = frozenset([*RUN, *(field.name for field in fields(RerankOptions))])

ALWAYS_NEEDED = [key for key, known in RUN.items() if known.default == NEEDED]
TO_TRAIN = [key for key, known in RUN.items() if known.default == NEEDED_TO_TRAIN]


def shipped_configs() -> dict[str, Path]:
    """Project YAML files that come with the plugin, by the name ``--cfg-path`` knows them by."""
    files = sorted((CONFIGS / "projects").rglob("*.yaml"))
    return {f"lavis_configs/{file.relative_to(CONFIGS).as_posix()}": file for file in files}


def summary(file: Path) -> str:
    """First line of a YAML file, where it is a comment."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def find_config(cfg_path: str | Path) -> Path:
    """Return the file that ``cfg_path`` names: a file as such, else a shipped one."""
    return find_file("--cfg-path", cfg_path, shipped_configs())


def find_file(option: str, name: str | Path, shipped: dict[str, Path]) -> Path:
    """Return the file that an option of the command names: a file as such, else a shipped one."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.as_posix() in shipped:
        return shipped[path.as_posix()]
    siblings = [file.as_posix() for file in path.parent.glob("*.yaml")]
    hint = suggest(path.as_posix(), [*shipped, *siblings])
    raise UserError(f"{option}: there is no file '{name}': {hint}")


def read_config(path: Path, options: Sequence[str] = ()) -> DictConfig:
    """Load a YAML file, merge overrides of the form "section.key=value", and check the result.

    Checked are the names that LAVIS looks up in its registry and the keys of the run section; the
    plugin's models, data sets and processors check their own keys.

    Raises:
        UserError: at the first thing found wrong.
    """
    overrides = parse_options(options)
    with valid_yaml(path):
        loaded = OmegaConf.load(path)
    try:
        _check_sections(loaded)
        config: Any = OmegaConf.merge(loaded, overrides)
        defaults = _check_model(config.model)
        for name in config.datasets:
            if config.datasets[name] is None:
                config.datasets[name] = {}  # all of its defaults
            known = _check_dataset(str(name), config.datasets[name])
            defaults = OmegaConf.merge(defaults, {"datasets": {name: known}})
        whole: Any = OmegaConf.merge(defaults, config)
        check_image_sizes(whole)
        _check_run(config.run)
    except (UserError, OmegaConfBaseException) as error:
        raise UserError(
            f"{reason_of(error)} (in {path}{' or --options' if options else ''})"
        ) from None
    return config


@contextmanager
def valid_yaml(path: Path) -> Iterator[None]:
    """Within: what goes wrong with a YAML file becomes one line that names it."""
    try:
        yield
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {reason_of(error)}") from error


def parse_options(options: Sequence[str], sections: Sequence[str] = SECTIONS) -> DictConfig:
    """Read overrides of the form "section.key=value"; UserError where one is not of it."""
    for option in options:
        key, equals, _ = option.partition("=")
        if not equals or "." not in key:
            raise UserError(f"--options: '{option}' is not of the form section.key=value")
        _known(f"--options: section '{key.split('.')[0]}'", key.split(".")[0], sections)
    try:
        return OmegaConf.from_dotlist(list(options))
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"--options: {reason_of(error)}") from error


def option(key: str, value: object) -> str:
    """An override of a text, which YAML might read otherwise: a path with " #" in it, say.

    >>> print(option("run.output_dir", "runs/ #1"))
    run.output_dir="runs/ #1"
    """
    return f"{key}={json.dumps(str(value), ensure_ascii=False)}"


def _check_sections(config: Any) -> None:
    for section in map(str, config if isinstance(config, DictConfig) else ()):
        _known(f"section '{section}'", section, SECTIONS)
    for section in SECTIONS:
        if not isinstance(config, DictConfig) or not isinstance(config.get(section), DictConfig):
            raise UserError(f"the section '{section}' is missing or empty")


def _check_model(model: DictConfig) -> Any:
    """Returns the defaults of its type."""
    _needed(model, ["arch", "model_type"], "model")
    _known(f"model.arch '{model.arch}'", model.arch, registry.list_models())
    cls = registry.get_model_class(model.arch)
    types = cls.PRETRAINED_MODEL_CONFIG_DICT
    _known(f"model.model_type '{model.model_type}' of {model.arch}", model.model_type, types)
    return OmegaConf.load(cls.default_config_path(model.model_type))


def _check_dataset(name: str, dataset: Any) -> DictConfig:
    """Returns its defaults."""
    where = f"datasets.{name}"
    _known(f"data set {where}", name, registry.list_datasets())
    require_section(where, dataset)
    builder = registry.get_builder_class(name)
    kind = dataset.get("type", "default")
    _known(f"{where}.type '{kind}'", kind, builder.DATASET_CONFIG_DICT)
    defaults = OmegaConf.load(builder.default_config_path(type=kind)).datasets[name]
    merged: Any = OmegaConf.merge(defaults, dataset)
    for slot in ("vis_processor", "text_processor"):
        if merged.get(slot) is None:
            continue
        require_section(f"{where}.{slot}", merged[slot])
        for split, processor in merged[slot].items():
            if processor is not None:
                require_section(f"{where}.{slot}.{split!s}", processor)
            found = (processor or {}).get("name")
            _known(f"{where}.{slot}.{split!s}.name '{found}'", found, registry.list_processors())
    return defaults


def _check_run(run: DictConfig) -> None:
    _needed(run, ALWAYS_NEEDED, "run")
    runner = setting(run, "runner")
    _known(f"run.task '{run.task}'", run.task, registry.list_tasks())
    _known(f"run.runner '{runner}'", runner, registry.list_runners())
    readers = (registry.get_task_class(run.task), registry.get_runner_class(runner))
    for key in run:
        if all(_is_known_package(reader) for reader in readers):
            _known(f"key run.{key!s}", key, RUN_KEYS)
    check_values(run)
    RerankOptions.of(run)  # checks its values
    if not setting(run, "evaluate"):
        _needed(run, TO_TRAIN, "run")
        if "max_iters" not in run:  # which runner_iter counts instead of epochs
            _needed(run, ["max_epoch"], "run")
        _known(f"run.lr_sched '{run.lr_sched}'", run.lr_sched, registry.list_lr_schedulers())
    _check_device(run.device)


def _check_device(device: str) -> None:
    _known(f"run.device '{device}'", device, ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "run.device is cuda, but PyTorch finds no CUDA device: "
            "see 'softmask doctor', or add --options run.device=cpu"
        )


def _is_known_package(cls: type) -> bool:
    """Whether all keys a class reads are known here; other packages may read keys of their own."""
    return cls.__module__.split(".")[0] in ("lavis", "softmask_plugin")


def _needed(section: DictConfig, keys: Iterable[str], where: str) -> None:
    for key in keys:
        if section.get(key) is None:
            raise UserError(f"{where}.{key} is missing")


def _known(what: str, name: Any, choices: Iterable[Any]) -> None:
    choices = [str(choice) for choice in choices]
    if str(name) not in choices:
        raise UserError(f"unknown {what}: {suggest(name, choices)}")
