"""What all data set builders share: checked YAML keys, and one data set per split."""

from __future__ import annotations

import math
from typing import Any

from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder, load_dataset_config
from omegaconf import DictConfig, OmegaConf

from softmask_plugin.datasets.task_datasets import Annotation, ItemDataset, OpenImages
from softmask_plugin.errors import UserError, require_known


class Builder(BaseDatasetBuilder):
    """Builds the data sets of the section ``datasets.<NAME>``; its default YAML lists the keys."""

    NAME: str  # under which it is registered

    @property
    def place(self) -> str:
        """The section's name."""
        return f"datasets.{self.NAME}"

    def _download_data(self) -> None:
        pass

    def _check_keys(self) -> DictConfig:
        """Raise UserError at an unknown key; return the default values."""
        known = load_dataset_config(self.default_config_path())
        require_known(self.place, self.config, ["type", *known])
        return known

    def _number(self, key: str, low: float, high: float = math.inf, kind: type = int) -> Any:
        """Return the number in [low, high] at a key of the section, or raise UserError."""
        value = OmegaConf.select(self.config, key)
        right_kind = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not right_kind or not low <= value <= high:
            noun = "a whole number" if kind is int else "a number"
            span = f">= {low}" if high == math.inf else f"from {low} to {high}"
            raise UserError(f"{self.place}.{key} is {value!r}: it must be {noun} {span}")
        return value

    def _arguments(self, split: str) -> dict[str, Any]:
        """Arguments that only this kind of data set has."""
        return {}

    def _dataset(
        self, split: str, annotation: Annotation, open_images: OpenImages, **arguments: Any
    ) -> ItemDataset:
        mode = "train" if split == "train" else "eval"
        processors = self.vis_processors[mode], self.text_processors[mode]
        dataset_class: Any = getattr(self, f"{mode}_dataset_cls")
        arguments |= self._arguments(split)
        return dataset_class(*processors, annotation, open_images, **arguments)
