"""Scenes as data sets for LAVIS: what all share, and those for pretraining and retrieval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder, load_dataset_config
from lavis.datasets.datasets.base_dataset import BaseDataset
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from softmask_plugin.config.paths import shipped
from softmask_plugin.datasets.folders.base import check_keys
from softmask_plugin.datasets.scenes.grammar import (
    MAX_OBJECTS,
    Box,
    Caption,
    Composition,
    Scene,
    allowed_compositions,
    captions,
    make_scenes,
)
from softmask_plugin.datasets.scenes.render import render
from softmask_plugin.errors import UserError
from softmask_plugin.registry import register


class SceneTrainDataset(BaseDataset):
    """One sample per scene, drawn when asked for, with one of its captions at random.

    Args:
        vis_processor: turns an RGB image into a tensor (3, H, W).
        text_processor: turns a caption into the model's text.
        scenes: what to draw.
        image_size: side of the drawn image in pixels.
    """

    def __init__(
        self,
        vis_processor: Callable[[Image.Image], Tensor],
        text_processor: Callable[[str], str],
        scenes: list[Scene],
        image_size: int,
    ) -> None:
        super().__init__(vis_processor, text_processor)
        self.scenes = scenes
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        choices = captions(self.scenes[index])
        chosen = choices[int(torch.randint(len(choices), ()))]
        return {
            "image": self.vis_processor(render(self.scenes[index], self.image_size)),
            "text_input": self.text_processor(chosen.text),
            "image_id": index,
            "instance_id": str(index),
        }


class SceneEvalDataset(BaseDataset):
    """Scenes and captions to match with each other, as LAVIS's ``retrieval`` task reads them.

    Args:
        vis_processor: turns an RGB image into a tensor (3, H, W).
        text_processor: turns a caption into the model's text.
        scenes: the gallery.
        image_size: side of the drawn image in pixels.
        captions_per_image: how many of each scene's captions to use, the most detailed first.

    Raises:
        UserError: the scenes have fewer captions than that.
    """

    def __init__(
        self,
        vis_processor: Callable[[Image.Image], Tensor],
        text_processor: Callable[[str], str],
        scenes: list[Scene],
        image_size: int,
        captions_per_image: int = 2,
    ) -> None:
        super().__init__(vis_processor, text_processor)
        self.scenes = scenes
        self.image_size = image_size
        self.captions: list[Caption] = []
        self.txt2img: dict[int, int] = {}
        self.img2txt: dict[int, list[int]] = {}
        for i, scene in enumerate(scenes):
            known = captions(scene)
            if captions_per_image > len(known):
                raise UserError(
                    f"captions_per_image is {captions_per_image}, but a scene of "
                    f"{len(scene.things)} object(s) has {len(known)} captions: ask for fewer"
                )
            first = len(self.captions)
            self.captions += known[:captions_per_image]
            self.img2txt[i] = list(range(first, len(self.captions)))
            self.txt2img.update(dict.fromkeys(self.img2txt[i], i))
        self.text = [text_processor(caption.text) for caption in self.captions]
        self.image = [f"scene {i}" for i in range(len(scenes))]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = render(self.scenes[index], self.image_size)
        return {"image": self.vis_processor(image), "index": index}

    def boxes(self, text_index: int) -> list[tuple[int, Box, str]]:
        """What each word of ``text[text_index]`` that names a thing points at.

        Returns:
            (index of the word in ``text.split()``, box (x0, y0, x1, y1) in [0, 1], role), the role
            being ``"size"``, ``"colour"`` or ``"shape"``.
        """
        return list(self.captions[text_index].boxes)


class ScenesBuilder(BaseDatasetBuilder):
    """Draws the scenes of each split that ``num`` names, from a seed.

    The keys of ``datasets.<NAME>`` are described in the shipped YAML file.

    Attributes:
        NAME: the name it is registered under.
        OBJECTS: least and greatest number of things per scene.
        SCENES_PER_ITEM: how many consecutive scenes make up an item.
    """

    NAME: str
    OBJECTS = (1, MAX_OBJECTS)
    SCENES_PER_ITEM = 1

    def items(self, scenes: list[Scene], pool: Sequence[Composition]) -> list[Any]:
        """Make a data set's items; ``pool``: the compositions that its split may name."""
        return scenes

    def arguments(self, split: str) -> dict[str, Any]:
        """Arguments of a split's data set that others do not have."""
        return {}

    def _download_data(self) -> None:
        """Nothing to download: scenes are drawn at run time."""

    def build(self) -> dict[str, BaseDataset]:
        """Build the data sets, by split.

        Raises:
            UserError: a key or a value that the shipped YAML file does not allow.
        """
        self._check_keys()
        seed = self._number("seed", int, 0)
        image_size = self._number("image_size", int, 16)
        objects = self._number("objects", int, *self.OBJECTS)
        heldout = self._number("heldout", float, 0, 0.5)
        layout = str(self.config.layout)

        self.build_processors()
        datasets: dict[str, BaseDataset] = {}
        for split in map(str, self.config.num):
            num = self.SCENES_PER_ITEM * self._number(f"num.{split}", int, 1)
            scenes = make_scenes(split, num, seed, objects, heldout, layout)
            mode = "train" if split == "train" else "eval"
            dataset_class: Any = getattr(self, f"{mode}_dataset_cls")
            datasets[split] = dataset_class(
                self.vis_processors[mode],
                self.text_processors[mode],
                self.items(scenes, allowed_compositions(split, heldout)),
                image_size,
                **self.arguments(split),
            )
        return datasets

    def _check_keys(self) -> None:
        place, num = f"datasets.{self.NAME}", self.config.num
        known = load_dataset_config(self.default_config_path())
        check_keys(place, self.config, [*known, "type"])
        if not isinstance(num, DictConfig):
            raise UserError(
                f"{place}.num is {num!r}: it must give a number for each of {', '.join(known.num)}"
            )
        check_keys(f"{place}.num", num, known.num)

    def _number(self, key: str, kind: type, low: float, high: float = float("inf")) -> Any:
        value = OmegaConf.select(self.config, key)
        right_kind = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not right_kind or not low <= value <= high:
            noun = "a whole number" if kind is int else "a number"
            span = f">= {low}" if high == float("inf") else f"from {low} to {high}"
            raise UserError(f"datasets.{self.NAME}.{key} is {value!r}: it must be {noun} {span}")
        return value


@register("builder", "scenes_pretrain")
class ScenesPretrainBuilder(ScenesBuilder):
    """Scenes to pretrain on: a train split."""

    NAME = "scenes_pretrain"
    DATASET_CONFIG_DICT = {"default": shipped("datasets/scenes/pretrain.yaml")}
    train_dataset_cls = SceneTrainDataset


@register("builder", "scenes_retrieval")
class ScenesRetrievalBuilder(ScenesPretrainBuilder):
    """Scenes for image-text retrieval: train, val and test."""

    NAME = "scenes_retrieval"
    DATASET_CONFIG_DICT = {"default": shipped("datasets/scenes/retrieval.yaml")}
    eval_dataset_cls = SceneEvalDataset

    def arguments(self, split: str) -> dict[str, Any]:
        """How many captions of a val or test scene to use."""
        if split == "train":
            return {}
        return {"captions_per_image": self._number("captions_per_image", int, 1)}
