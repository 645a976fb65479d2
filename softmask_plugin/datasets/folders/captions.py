"""The user's own images with a file of captions, for pretraining and retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from softmask_plugin.config.paths import shipped
from softmask_plugin.datasets.folders.base import Annotation, FolderBuilder, FolderDataset
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.datasets.tables.captions import read_captions
from softmask_plugin.registry import register


class CaptionsFolderDataset(FolderDataset):
    """One item per image; of its captions one is drawn at each access, as in ALBEF's pretraining.

    An unreadable image is replaced by the next readable one and reported. Images of the same
    ``image_id`` get the same number, so that they are positives of each other.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        numbers: dict[str, int] = {}
        for item in self.annotation:
            item["image_id"] = numbers.setdefault(item["image_id"], len(numbers))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``image`` (as processed), ``text_input``, ``image_id`` (int), ``instance_id``."""
        item, (image,) = self.open(index)
        captions = item["caption"]
        caption = captions[int(torch.randint(len(captions), ()))]
        return {
            "image": self.vis_processor(image),
            "text_input": self.text_processor(caption),
            "image_id": item["image_id"],
            "instance_id": item["instance_id"],
        }


class CaptionsFolderEvalDataset(FolderDataset):
    """Images and all their captions, laid out as LAVIS's ``retrieval`` task reads them.

    Attributes:
        image: names of the images (N).
        text: processed captions (M).
        txt2img: caption's index -> image's index.
        img2txt: image's index -> indices of its captions.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.image = [item["image"] for item in self.annotation]
        self.text: list[str] = []
        self.txt2img: dict[int, int] = {}
        self.img2txt: dict[int, list[int]] = {}
        for index, item in enumerate(self.annotation):
            first = len(self.text)
            self.text += map(self.text_processor, item["caption"])
            self.img2txt[index] = list(range(first, len(self.text)))
            self.txt2img |= dict.fromkeys(self.img2txt[index], index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``image`` (as processed) and ``index``."""
        _, (image,) = self.open(index)
        return {"image": self.vis_processor(image), "index": index}


@register("builder", "captions_folder")
class CaptionsFolderBuilder(FolderBuilder):
    """Images and captions: ``train`` to pretrain on, ``val`` and ``test`` for retrieval."""

    NAME = "captions_folder"
    FILES = "captions"
    DATASET_CONFIG_DICT = {"default": shipped("datasets/captions_folder/default.yaml")}
    train_dataset_cls = CaptionsFolderDataset
    eval_dataset_cls = CaptionsFolderEvalDataset

    def read(self, file: Path, split: str, skipped: SkipLog) -> Annotation:
        """Read a caption file; ``read_captions`` says which layouts there are."""
        return [
            {"image": item.image, "caption": item.captions, "image_id": item.image_id}
            for item in read_captions(file, split, skipped)
        ]
