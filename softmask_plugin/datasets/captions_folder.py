"""The user's own images with a file of captions, for pretraining and retrieval."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lavis.common.dist_utils import is_main_process
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.datasets.datasets.base_dataset import BaseDataset
from tqdm import tqdm

from softmask_plugin.datasets.caption_files import CaptionedImage, read_captions
from softmask_plugin.datasets.images import UnreadableImageError, open_rgb
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.errors import UserError, suggest
from softmask_plugin.paths import shipped
from softmask_plugin.registry import register

SPLITS = ("train", "val", "test")
KEYS = ("type", "data_type", "images", "captions", "vis_processor", "text_processor")

# Where so many images in a row are unreadable, the disk is at fault rather than an image.
MAX_UNREADABLE_IN_A_ROW = 100


class CaptionsFolderDataset(BaseDataset):
    """One item per image; of its captions one is drawn at each access, as in ALBEF's pretraining.

    An unreadable image is replaced by the next readable one and reported.

    Args:
        vis_processor, text_processor: applied to the PIL image and the caption.
        vis_root: the images folder.
        images: what to show; every file exists.
        skipped: where unreadable images are reported.
    """

    def __init__(
        self,
        vis_processor: Any,
        text_processor: Any,
        vis_root: str | Path,
        images: list[CaptionedImage],
        skipped: SkipLog,
    ) -> None:
        super().__init__(vis_processor, text_processor, vis_root)
        self.skipped = skipped
        numbers: dict[str, int] = {}
        self.annotation: list[dict[str, Any]] = [
            {
                "image": item.image,
                "caption": item.captions,
                "image_id": numbers.setdefault(item.image_id, len(numbers)),
            }
            for item in images
        ]
        self._add_instance_ids()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``image`` (as processed), ``text_input``, ``image_id`` (int), ``instance_id``."""
        for offset in range(MAX_UNREADABLE_IN_A_ROW):
            item = self.annotation[(index + offset) % len(self)]
            path = os.path.join(self.vis_root, item["image"])
            try:
                image = open_rgb(path, getattr(self.vis_processor, "min_side", None))
            except UnreadableImageError as error:
                self.skipped.add("unreadable images", [str(error)])
                continue
            captions = item["caption"]
            caption = captions[int(torch.randint(len(captions), ()))]
            return {
                "image": self.vis_processor(image),
                "text_input": self.text_processor(caption),
                "image_id": item["image_id"],
                "instance_id": item["instance_id"],
            }
        raise UserError(
            f"{MAX_UNREADABLE_IN_A_ROW} images in a row cannot be read, the last was {path}: is "
            f"the disk of {self.vis_root} still there?"
        )


class CaptionsFolderEvalDataset(BaseDataset):
    """Images and all their captions, laid out as LAVIS's ``retrieval`` task reads them.

    Attributes:
        image: names of the images (N).
        text: processed captions (M).
        txt2img: caption's index -> image's index.
        img2txt: image's index -> indices of its captions.
    """

    def __init__(
        self,
        vis_processor: Any,
        text_processor: Any,
        vis_root: str | Path,
        images: list[CaptionedImage],
    ) -> None:
        super().__init__(vis_processor, text_processor, vis_root)
        self.annotation = [{"image": item.image, "caption": item.captions} for item in images]
        self.image = [item.image for item in images]
        self.text: list[str] = []
        self.txt2img: dict[int, int] = {}
        self.img2txt: dict[int, list[int]] = {}
        for index, item in enumerate(images):
            first = len(self.text)
            self.text += map(text_processor, item.captions)
            self.img2txt[index] = list(range(first, len(self.text)))
            self.txt2img |= dict.fromkeys(self.img2txt[index], index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``image`` (as processed) and ``index``."""
        image = open_rgb(os.path.join(self.vis_root, self.image[index]))
        return {"image": self.vis_processor(image), "index": index}


@register("builder", "captions_folder")
class CaptionsFolderBuilder(BaseDatasetBuilder):
    """Builds the splits that have a caption file: ``train``; for retrieval ``val`` and ``test``.

    Missing images and, of ``val`` and ``test``, unreadable ones are left out and reported.
    Relative paths start from the current folder.

    Raises:
        UserError: a key is missing or unknown, a caption file is malformed, or no image is left.
    """

    DATASET_CONFIG_DICT = {"default": shipped("datasets/captions_folder/default.yaml")}

    def _download_data(self) -> None:
        """Nothing to download."""

    def build(self) -> dict[str, BaseDataset]:
        """Build the data sets, by split."""
        root, files = self._paths()
        self.build_processors()
        skipped = SkipLog.of_run()
        at_build = replace(skipped, muted=not is_main_process())  # every rank builds the same
        datasets: dict[str, BaseDataset] = {}
        for split, file in files.items():
            images = _existing(root, read_captions(file, split, at_build), at_build)
            if split == "train":
                processors = self.vis_processors["train"], self.text_processors["train"]
                datasets[split] = CaptionsFolderDataset(*processors, root, images, skipped)
            else:
                images = _readable(root, images, at_build, split)
                processors = self.vis_processors["eval"], self.text_processors["eval"]
                datasets[split] = CaptionsFolderEvalDataset(*processors, root, images)
            count = sum(len(item.captions) for item in images)
            logging.info("captions_folder %s: %d images, %d captions", split, len(images), count)
        return datasets

    def _paths(self) -> tuple[Path, dict[str, Path]]:
        """The images folder and the caption file of each split, checked."""
        place = "datasets.captions_folder"
        captions = self.config.get("captions") or {}
        _check_keys(place, self.config, KEYS)
        _check_keys(f"{place}.captions", captions, SPLITS)
        files = {}
        for split in SPLITS:
            if file := captions.get(split):
                if not isinstance(file, str):
                    raise UserError(f"{place}.captions.{split} must be the path of one file")
                files[split] = Path(file).expanduser()
        if not files:
            raise UserError(f"{place}.captions names no file: set its train, val or test")
        if not self.config.get("images"):
            raise UserError(f"{place}.images is not set: give the folder that holds the images")
        root = Path(self.config.images).expanduser().absolute()
        if not root.is_dir():
            raise UserError(f"{place}.images: there is no folder {root}")
        return root, files


def _check_keys(place: str, section: Any, known: tuple[str, ...]) -> None:
    for key in section:
        if key not in known:
            raise UserError(f"unknown key {place}.{key}: {suggest(key, known)}")


def _existing(root: Path, images: list[CaptionedImage], skipped: SkipLog) -> list[CaptionedImage]:
    """Leave out images without a file: one listing per folder instead of one query per image."""
    folders = {os.path.dirname(item.image) for item in images}
    files = {folder: _listing(root / folder) for folder in folders}
    found: list[CaptionedImage] = []
    missing: list[CaptionedImage] = []
    for item in images:
        folder, name = os.path.split(item.image)
        (found if name in files[folder] else missing).append(item)
    if not found:
        raise UserError(
            f"none of the {len(images)} images exists: the first was looked for as "
            f"{root / missing[0].image}; set datasets.captions_folder.images to the folder that "
            "the names start from"
        )
    skipped.add("missing images", [f"{root / item.image}: no such file" for item in missing])
    return found


def _listing(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (OSError, ValueError):  # no such folder, or a name that none can have
        return set()


def _readable(
    root: Path, images: list[CaptionedImage], skipped: SkipLog, split: str
) -> list[CaptionedImage]:
    """Leave out images that cannot be decoded; evaluation needs to know before it starts."""
    bar = tqdm(images, f"checking {split} images", unit=" images", leave=False)
    defects = [_defect(root / item.image) for item in bar]
    skipped.add("unreadable images", [defect for defect in defects if defect])
    readable = [item for item, defect in zip(images, defects, strict=True) if not defect]
    if not readable:
        raise UserError(f"none of the {len(images)} {split} images can be read: {defects[0]}")
    return readable


def _defect(path: Path) -> str | None:
    try:
        open_rgb(path, min_side=1)
    except UnreadableImageError as error:
        return str(error)
    return None
