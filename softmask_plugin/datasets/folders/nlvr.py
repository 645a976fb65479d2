"""The user's own pairs of images with sentences that are true or false, in NLVR2's manner."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from lavis.datasets.datasets.nlvr_datasets import NLVRDataset

from softmask_plugin.config.paths import shipped
from softmask_plugin.datasets.folders.base import Annotation, FolderBuilder, FolderDataset
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.datasets.tables.statements import read_statements
from softmask_plugin.errors import UserError
from softmask_plugin.registry import register

LABELS = ("False", "True")  # in the order of LAVIS's classes
OTHER_SIDE = {"left": "right", "right": "left"}


class NLVRFolderDataset(FolderDataset, NLVRDataset):
    """Two images and a sentence each, true or false.

    Args:
        swap: exchange the images, and the words "left" and "right", half of the time.
    """

    def __init__(self, swap: bool = False, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.swap = swap

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``image0``, ``image1``, ``text_input`` (all processed), ``label``,
        ``instance_id``.
        """
        item, images = self.open(index)
        sentence = self.text_processor(item["sentence"])
        if self.swap and torch.rand(()) < 0.5:
            images.reverse()
            # From a word's start on: "leftmost" turns, LAVIS would turn "bright" as well.
            sentence = re.sub(r"\b(left|right)", lambda word: OTHER_SIDE[word[0]], sentence)
        return {
            "image0": self.vis_processor(images[0]),
            "image1": self.vis_processor(images[1]),
            "text_input": sentence,
            "label": self.class_labels[item["label"]],
            "instance_id": item["instance_id"],
        }


@register("builder", "nlvr_folder")
class NLVRFolderBuilder(FolderBuilder):
    """Pairs of images with sentences, for LAVIS's ``multimodal_classification`` task."""

    NAME = "nlvr_folder"
    FILES = "sentences"
    DATASET_CONFIG_DICT = {"default": shipped("datasets/nlvr_folder/default.yaml")}
    train_dataset_cls = eval_dataset_cls = NLVRFolderDataset

    def read(self, file: Path, split: str, skipped: SkipLog) -> Annotation:
        """Read a file of statements; ``read_statements`` says what it holds."""
        return read_statements(file, ("image0", "image1"), LABELS, skipped)

    def arguments(self, split: str) -> dict[str, Any]:
        """Whether to swap: in training, if the YAML says so."""
        swap = self.config.get("swap", True)
        if not isinstance(swap, bool):
            raise UserError(f"datasets.{self.NAME}.swap is {swap!r}: it must be true or false")
        return {"swap": swap and split == "train"}
