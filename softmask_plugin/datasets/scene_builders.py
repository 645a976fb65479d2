"""The scenes data set for LAVIS: a pretraining split, or train, val and test for retrieval."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder, load_dataset_config
from lavis.datasets.datasets.base_dataset import BaseDataset
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from softmask_plugin.datasets.scene_render import render
from softmask_plugin.datasets.scenes import (
    MAX_OBJECTS,
    Box,
    Caption,
    Scene,
    captions,
    make_scenes,
)
from softmask_plugin.errors import UserError, suggest
from softmask_plugin.paths import shipped
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


@register("builder", "scenes_pretrain")
class ScenesPretrainBuilder(BaseDatasetBuilder):
    """Scenes to pretrain on: a train split, drawn from a seed.

    The keys of ``datasets.scenes_pretrain`` are described in the shipped YAML file.
    """

    NAME = "scenes_pretrain"
    DATASET_CONFIG_DICT = {"default": shipped("datasets/scenes/pretrain.yaml")}
    train_dataset_cls = SceneTrainDataset
    eval_dataset_cls = SceneEvalDataset

    def _download_data(self) -> None:
        """Nothing to download: scenes are drawn at run time."""

    def build(self) -> dict[str, BaseDataset]:
        """Draw the scenes of each split that ``num`` names.

        Raises:
            UserError: a key or a value that the shipped YAML file does not allow.
        """
        self._check_keys()
        seed = self._number("seed", int, 0)
        image_size = self._number("image_size", int, 16)
        objects = self._number("objects", int, 1, MAX_OBJECTS)
        heldout = self._number("heldout", float, 0, 0.5)
        layout = str(self.config.layout)

        self.build_processors()
        datasets: dict[str, BaseDataset] = {}
        for split in map(str, self.config.num):
            scenes = make_scenes(
                split, self._number(f"num.{split}", int, 1), seed, objects, heldout, layout
            )
            if split == "train":
                vis, text = self.vis_processors["train"], self.text_processors["train"]
                datasets[split] = self.train_dataset_cls(vis, text, scenes, image_size)
            else:
                each = self._number("captions_per_image", int, 1)
                vis, text = self.vis_processors["eval"], self.text_processors["eval"]
                datasets[split] = self.eval_dataset_cls(vis, text, scenes, image_size, each)
        return datasets

    def _check_keys(self) -> None:
        known = load_dataset_config(self.default_config_path())
        self._check_known(self.config, [*known, "type"])
        if not isinstance(self.config.num, DictConfig):
            raise UserError(
                f"datasets.{self.NAME}.num is {self.config.num!r}: it must give a number for each "
                f"of {', '.join(known.num)}"
            )
        self._check_known(self.config.num, known.num, "num.")

    def _check_known(self, given: Iterable[str], known: Iterable[str], place: str = "") -> None:
        for key in given:
            if key not in known:
                raise UserError(
                    f"unknown key datasets.{self.NAME}.{place}{key}: {suggest(key, known)}"
                )

    def _number(self, key: str, kind: type, low: float, high: float = float("inf")) -> Any:
        value = OmegaConf.select(self.config, key)
        right_kind = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not right_kind or not low <= value <= high:
            noun = "a whole number" if kind is int else "a number"
            span = f">= {low}" if high == float("inf") else f"from {low} to {high}"
            raise UserError(f"datasets.{self.NAME}.{key} is {value!r}: it must be {noun} {span}")
        return value


@register("builder", "scenes_retrieval")
class ScenesRetrievalBuilder(ScenesPretrainBuilder):
    """Scenes for image-text retrieval: train, val and test."""

    NAME = "scenes_retrieval"
    DATASET_CONFIG_DICT = {"default": shipped("datasets/scenes/retrieval.yaml")}
