"""Scenes for LAVIS's downstream tasks: entailment, NLVR, VQA and grounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from softmask_plugin.config.paths import shipped
from softmask_plugin.datasets.scenes.builders import ScenesBuilder
from softmask_plugin.datasets.scenes.grammar import (
    MAX_OBJECTS,
    Composition,
    Scene,
    heldout_compositions,
)
from softmask_plugin.datasets.scenes.task_datasets import (
    SceneEntailmentDataset,
    SceneGroundingDataset,
    SceneNLVRDataset,
    SceneVQADataset,
    SceneVQAEvalDataset,
)
from softmask_plugin.datasets.scenes.tasks import (
    Hypothesis,
    Pair,
    Question,
    Reference,
    ask,
    entail,
    pair_up,
    refer,
)
from softmask_plugin.registry import register


@register("builder", "scenes_entailment")
class ScenesEntailmentBuilder(ScenesBuilder):
    """Scenes for visual entailment, LAVIS's task ``multimodal_classification``."""

    NAME = "scenes_entailment"
    OBJECTS = (2, MAX_OBJECTS)
    DATASET_CONFIG_DICT = {"default": shipped("datasets/scenes/entailment.yaml")}
    train_dataset_cls = eval_dataset_cls = SceneEntailmentDataset

    def items(self, scenes: list[Scene], pool: Sequence[Composition]) -> list[Hypothesis]:
        """One hypothesis about each scene."""
        return [entail(scene, pool) for scene in scenes]


@register("builder", "scenes_nlvr")
class ScenesNLVRBuilder(ScenesBuilder):
    """Pairs of scenes with a statement, LAVIS's task ``multimodal_classification``."""

    NAME = "scenes_nlvr"
    SCENES_PER_ITEM = 2
    DATASET_CONFIG_DICT = {"default": shipped("datasets/scenes/nlvr.yaml")}
    train_dataset_cls = eval_dataset_cls = SceneNLVRDataset

    def items(self, scenes: list[Scene], pool: Sequence[Composition]) -> list[Pair]:
        """One statement about every two scenes."""
        heldout = heldout_compositions(self.config.heldout)
        pairs = zip(scenes[::2], scenes[1::2], strict=True)
        return [pair_up(left, right, pool, heldout) for left, right in pairs]


@register("builder", "scenes_vqa")
class ScenesVQABuilder(ScenesBuilder):
    """Scenes with a question each, LAVIS's task ``vqa``."""

    NAME = "scenes_vqa"
    DATASET_CONFIG_DICT = {"default": shipped("datasets/scenes/vqa.yaml")}
    train_dataset_cls = SceneVQADataset
    eval_dataset_cls = SceneVQAEvalDataset

    def items(self, scenes: list[Scene], pool: Sequence[Composition]) -> list[Question]:
        """One question about each scene."""
        return [ask(scene, pool) for scene in scenes]

    def arguments(self, split: str) -> dict[str, Any]:
        """The split's name, for the record."""
        return {} if split == "train" else {"split": split}


@register("builder", "scenes_grounding")
class ScenesGroundingBuilder(ScenesBuilder):
    """Scenes with a referring expression each: val and test, for ``softmask_grounding``."""

    NAME = "scenes_grounding"
    OBJECTS = (2, MAX_OBJECTS)
    DATASET_CONFIG_DICT = {"default": shipped("datasets/scenes/grounding.yaml")}
    eval_dataset_cls = SceneGroundingDataset

    def items(
        self, scenes: list[Scene], pool: Sequence[Composition]
    ) -> list[tuple[Scene, Reference]]:
        """One expression for a thing of each scene."""
        return [(scene, refer(scene)) for scene in scenes]

    def arguments(self, split: str) -> dict[str, Any]:
        """Metrics are reported by split."""
        return {"group": split}
