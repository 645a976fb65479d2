"""Data sets built from the default YAML and some changes, as a run builds them."""

from __future__ import annotations

from typing import Any

from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf


def section(name: str, *changes: str | dict[str, Any]) -> DictConfig:
    """The section ``datasets.<name>``, changed by options ("key=value") or mappings, in order."""
    config = OmegaConf.load(registry.get_builder_class(name).default_config_path())
    for change in changes:
        given = OmegaConf.from_dotlist([change]) if isinstance(change, str) else change
        config = OmegaConf.merge(config, {"datasets": {name: given}})
    return config.datasets[name]


def build(name: str, *changes: str | dict[str, Any]) -> dict[str, Any]:
    """The data sets by split."""
    return registry.get_builder_class(name)(section(name, *changes)).build_datasets()


def build_scenes(name: str, num: int, *changes: dict[str, Any]) -> dict[str, Any]:
    """Data sets of ``num`` items per split."""
    return build(name, {"num": dict.fromkeys(section(name).num, num)}, *changes)
