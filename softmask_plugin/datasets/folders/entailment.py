"""The user's own images with sentences that they entail or contradict, for LAVIS to classify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavis.datasets.datasets.snli_ve_datasets import SNLIVisualEntialmentDataset
from omegaconf import ListConfig

from softmask_plugin.config.paths import shipped
from softmask_plugin.datasets.folders.base import Annotation, FolderBuilder, FolderDataset
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.datasets.tables.statements import read_statements
from softmask_plugin.errors import UserError
from softmask_plugin.registry import register


class EntailmentFolderDataset(FolderDataset, SNLIVisualEntialmentDataset):
    """An image and a sentence each, of one of several classes.

    Attributes:
        class_labels: class's name -> its number.
    """

    def __init__(self, labels: list[str], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.class_labels = {label: number for number, label in enumerate(labels)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``image``, ``text_input`` (both processed), ``label``, ``image_id`` (its name) and
        ``instance_id``.
        """
        item, (image,) = self.open(index)
        return {
            "image": self.vis_processor(image),
            "text_input": self.text_processor(item["sentence"]),
            "label": self.class_labels[item["label"]],
            "image_id": item["image"],
            "instance_id": item["instance_id"],
        }


@register("builder", "entailment_folder")
class EntailmentFolderBuilder(FolderBuilder):
    """Images, sentences and labels, for LAVIS's ``multimodal_classification`` task."""

    NAME = "entailment_folder"
    FILES = "sentences"
    DATASET_CONFIG_DICT = {"default": shipped("datasets/entailment_folder/default.yaml")}
    train_dataset_cls = eval_dataset_cls = EntailmentFolderDataset

    def read(self, file: Path, split: str, skipped: SkipLog) -> Annotation:
        """Read a file of statements; ``read_statements`` says what it holds."""
        return read_statements(file, ("image",), self._labels(), skipped)

    def arguments(self, split: str) -> dict[str, Any]:
        """The classes."""
        return {"labels": self._labels()}

    def _labels(self) -> list[str]:
        given = self.config.get("labels")
        labels = [str(name).strip() for name in given] if isinstance(given, ListConfig) else []
        different = {label.lower() for label in labels}
        if len(different) < max(2, len(labels)) or any(isinstance(name, bool) for name in given):
            raise UserError(
                f"datasets.{self.NAME}.labels is {given}: it must list two or more different "
                "names, yes and no in quotes"
            )
        return labels
