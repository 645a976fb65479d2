"""Scenes as data sets for LAVIS: for pretraining and for every task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from omegaconf import DictConfig

from softmask_plugin.config.paths import shipped
from softmask_plugin.config.run_options import flag
from softmask_plugin.datasets import task_datasets as data
from softmask_plugin.datasets.builder import Builder
from softmask_plugin.datasets.scenes import grammar, tasks
from softmask_plugin.datasets.scenes.grammar import MAX_OBJECTS, Composition, Scene
from softmask_plugin.datasets.scenes.render import render_item
from softmask_plugin.datasets.scenes.tasks import Item
from softmask_plugin.datasets.tables.phrases import TEXTS
from softmask_plugin.errors import UserError, require_known, suggest
from softmask_plugin.registry import register


class ScenesBuilder(Builder):
    """Makes the scenes of each split in ``num`` from a seed; they are rendered when accessed."""

    OBJECTS = (1, MAX_OBJECTS)  # least and greatest number of things per scene

    def _scenes_for(self, items: int) -> int:
        """How many scenes a number of items needs."""
        return items

    def _annotate(self, split: str, scenes: list[Scene], pool: Sequence[Composition]) -> list[Item]:
        """Make the items of a split, whose texts may name the compositions of ``pool``: captions,
        unless a builder makes others."""
        return [tasks.describe(scene) for scene in scenes]

    def build(self) -> dict[str, data.ItemDataset]:
        """Build the data sets, by split; UserError at a key or a value that is not allowed."""
        splits, num = list(self._check_keys().num), self.config.num
        if not isinstance(num, DictConfig):
            names = ", ".join(splits)
            raise UserError(f"{self.place}.num is {num!r}: give a number for each of {names}")
        require_known(f"{self.place}.num", num, splits)
        seed = self._number("seed", 0)
        image_size = self._number("image_size", 16)
        objects = self._number("objects", *self.OBJECTS)
        heldout = self._number("heldout", 0, 0.5, float)
        self.build_processors()
        layout, datasets = str(self.config.layout), {}
        for split in map(str, num):
            count = self._scenes_for(self._number(f"num.{split}", 1))
            scenes = grammar.make_scenes(split, count, seed, objects, heldout, layout)
            items = self._annotate(split, scenes, grammar.allowed_compositions(split, heldout))
            items = [{"image": f"scene {i}", "image_id": i, **each} for i, each in enumerate(items)]
            datasets[split] = self._dataset(split, items, partial(render_item, image_size))
        return datasets


@register("builder", "scenes_pretrain")
class ScenesPretrainBuilder(ScenesBuilder):
    """Scenes for pretraining: a train split."""

    DATASET_CONFIG_DICT = {"default": shipped("datasets/scenes/pretrain.yaml")}
    train_dataset_cls = data.PretrainDataset


@register("builder", "scenes_retrieval")
class ScenesRetrievalBuilder(ScenesBuilder):
    """Scenes for image-text retrieval: train, val and test."""

    DATASET_CONFIG_DICT = {"default": shipped("datasets/scenes/retrieval.yaml")}
    train_dataset_cls = data.PretrainDataset
    eval_dataset_cls = data.RetrievalDataset

    def _annotate(self, split: str, scenes: list[Scene], pool: Sequence[Composition]) -> list[Item]:
        limit = None if split == "train" else self._number("captions_per_image", 1)
        return [tasks.describe(scene, limit) for scene in scenes]


@register("builder", "scenes_entailment")
class ScenesEntailmentBuilder(ScenesBuilder):
    """Scenes behind a curtain with a statement each, for ``multimodal_classification``."""

    OBJECTS = (2, MAX_OBJECTS)
    DATASET_CONFIG_DICT = {"default": shipped("datasets/scenes/entailment.yaml")}
    train_dataset_cls = eval_dataset_cls = data.EntailmentDataset

    def _annotate(self, split: str, scenes: list[Scene], pool: Sequence[Composition]) -> list[Item]:
        return [tasks.entail(scene, pool) for scene in scenes]


@register("builder", "scenes_nlvr")
class ScenesNLVRBuilder(ScenesBuilder):
    """Pairs of scenes with a statement, for ``multimodal_classification``."""

    DATASET_CONFIG_DICT = {"default": shipped("datasets/scenes/nlvr.yaml")}
    train_dataset_cls = eval_dataset_cls = data.NLVRDataset

    def _scenes_for(self, items: int) -> int:
        return 2 * items

    def _annotate(self, split: str, scenes: list[Scene], pool: Sequence[Composition]) -> list[Item]:
        pairs = zip(scenes[::2], scenes[1::2], strict=True)
        return [tasks.compare(left, right, pool) for left, right in pairs]


@register("builder", "scenes_vqa")
class ScenesVQABuilder(ScenesBuilder):
    """Scenes with a question each, for ``vqa``."""

    DATASET_CONFIG_DICT = {"default": shipped("datasets/scenes/vqa.yaml")}
    train_dataset_cls = data.VQADataset
    eval_dataset_cls = data.VQAEvalDataset

    def _annotate(self, split: str, scenes: list[Scene], pool: Sequence[Composition]) -> list[Item]:
        return [{"question_id": i, **tasks.ask(scene, pool)} for i, scene in enumerate(scenes)]

    def _arguments(self, split: str) -> dict[str, Any]:
        return {} if split == "train" else {"answer_list": list(tasks.ANSWERS)}


@register("builder", "scenes_grounding")
class ScenesGroundingBuilder(ScenesBuilder):
    """Scenes with expressions, or words of captions, and the boxes of what they refer to: val and
    test, for ``softmask_grounding``."""

    OBJECTS = (2, MAX_OBJECTS)
    DATASET_CONFIG_DICT = {"default": shipped("datasets/scenes/grounding.yaml")}
    eval_dataset_cls = data.GroundingDataset

    def _annotate(self, split: str, scenes: list[Scene], pool: Sequence[Composition]) -> list[Item]:
        text, known = self.config.text, ("expression", *TEXTS)
        if text not in known:
            raise UserError(f"{self.place}.text is {text!r}: {suggest(text, known)}")
        if text == "expression":
            return [{"group": split, **tasks.refer(scene)} for scene in scenes]
        return [
            {"image": f"scene {i}", **item}
            for i, scene in enumerate(scenes)
            for item in tasks.name_things(scene, alone=text == "phrase")
        ]


@register("builder", "scenes_foils")
class ScenesFoilsBuilder(ScenesBuilder):
    """Scenes with a true and a false caption: val and test, for ``softmask_foils``."""

    OBJECTS = (2, MAX_OBJECTS)
    DATASET_CONFIG_DICT = {"default": shipped("datasets/scenes/foils.yaml")}
    eval_dataset_cls = data.FoilDataset

    def _scenes_for(self, items: int) -> int:
        flag(f"{self.place}.curtain", self.config.curtain)
        return math.ceil(items / len(tasks.foil_groups(self.config.objects, self.config.curtain)))

    def _annotate(self, split: str, scenes: list[Scene], pool: Sequence[Composition]) -> list[Item]:
        items = [
            {"image": f"scene {i}", **item}
            for i, scene in enumerate(scenes)
            for item in tasks.foils(scene, self.config.curtain)
        ]
        return items[: self.config.num[split]]
