"""What data sets of the user's own images share: YAML keys, missing and unreadable images."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lavis.common.dist_utils import is_main_process
from PIL import Image
from tqdm import tqdm

from softmask_plugin.config.values import require_section
from softmask_plugin.datasets.builder import Builder
from softmask_plugin.datasets.images import UnreadableImageError, open_rgb
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.datasets.tables.layouts import TableOptions
from softmask_plugin.datasets.task_datasets import Annotation, ItemDataset
from softmask_plugin.errors import UserError, require_known


class FolderBuilder(Builder):
    """Builds the splits that have a file; a subclass parses the file and names the data sets.

    Items with an image that is missing or, in ``val`` and ``test``, unreadable are left out and
    reported. Relative paths start from the current folder.

    Raises:
        UserError: A key is missing or unknown, a file is malformed, or no image is left.
    """

    FILES: str  # the key of the section that names one file for each split of the default YAML

    def _parse(self, file: Path, split: str, options: TableOptions) -> Annotation:
        """Parse the file of a split: ``image``, or two ``images``, per item, and what is said."""
        raise NotImplementedError

    def build(self) -> dict[str, ItemDataset]:
        """Build the data sets, by split."""
        root, files = self._paths()
        self.build_processors()
        skipped = SkipLog.of_run()
        at_build = replace(skipped, muted=not is_main_process())  # every rank builds the same
        self.annotations: dict[str, Annotation] = {}  # of the splits built so far
        datasets: dict[str, ItemDataset] = {}
        for split, file in files.items():
            options = replace(TableOptions.of(self.place, self.config, split), skipped=at_build)
            annotation = self._existing(root, self._parse(file, split, options), at_build)
            if split != "train":  # evaluation must know its gallery from the start
                annotation = _readable(root, annotation, at_build, split)
            self.annotations[split] = annotation
            log = skipped if split == "train" else None
            datasets[split] = self._dataset(split, annotation, partial(_open, root), skipped=log)
            counts = len(annotation), len(_names(annotation))
            logging.info("%s %s: %d items, %d images", self.NAME, split, *counts)
        return datasets

    def _paths(self) -> tuple[Path, dict[str, Path]]:
        splits = list(self._check_keys()[self.FILES])
        for key in (self.FILES, "annotations"):
            if (given := self.config.get(key)) is not None:
                require_section(f"{self.place}.{key}", given)
                require_known(f"{self.place}.{key}", given, splits)
        section, place = self.config.get(self.FILES) or {}, f"{self.place}.{self.FILES}"
        files = {}
        for split in splits:
            if file := section.get(split):
                if not isinstance(file, str):
                    raise UserError(f"{place}.{split} must be the path of one file")
                files[split] = Path(file).expanduser()
        if not files:
            raise UserError(f"{place} names no file: set its {' or '.join(splits)}")
        if not self.config.get("images"):
            raise UserError(f"{self.place}.images is not set: give the folder of the images")
        root = Path(str(self.config.images)).expanduser().absolute()  # 2014 is an int
        if not root.is_dir():
            raise UserError(f"{self.place}.images: there is no folder {root}")
        return root, files

    def _existing(self, root: Path, annotation: Annotation, skipped: SkipLog) -> Annotation:
        """Leave out images without a file: one listing per folder, not one query per image."""
        names = _names(annotation)
        files = {folder: _listing(root / folder) for folder in set(map(os.path.dirname, names))}
        missing = [n for n in names if os.path.basename(n) not in files[os.path.dirname(n)]]
        found = _without(missing, annotation)
        if not found:
            raise UserError(
                f"none of the {len(missing)} images exists: there is no {root / missing[0]}; set "
                f"{self.place}.images to the folder that the names start from"
            )
        skipped.add("missing images", [f"{root / name}: no such file" for name in missing])
        return found


def _open(root: Path, item: dict[str, Any], min_side: int | None) -> list[Image.Image]:
    crop = item.get("crop")  # in pixels of the full size
    files = (os.path.join(root, name) for name in _image_names(item))
    images = [open_rgb(file, None if crop else min_side) for file in files]
    return [_part(image, crop, item) for image in images] if crop else images


def _part(image: Image.Image, crop: tuple[int, int, int, int], item: dict[str, Any]) -> Image.Image:
    x0, y0, x1, y1 = crop
    if x0 >= image.width or y0 >= image.height or min(x1, y1) <= 0:  # Pillow would give black
        raise UnreadableImageError(
            f"{item['image']}: the box {crop} lies outside of its {image.width} x {image.height} "
            "pixels: take images of the size that the file was made for"
        )
    return image.crop(crop)


def _image_names(item: dict[str, Any]) -> list[str]:
    return item["images"] if "images" in item else [item["image"]]


def _names(annotation: Annotation) -> list[str]:
    return list(dict.fromkeys(name for item in annotation for name in _image_names(item)))


def _without(names: Iterable[str], annotation: Annotation) -> Annotation:
    names = set(names)
    return [item for item in annotation if names.isdisjoint(_image_names(item))]


def _listing(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:  # opening a pipe may hang
            return {e.name for e in entries if e.is_symlink() or e.is_file(follow_symlinks=False)}
    except (OSError, ValueError):  # no such folder, or an impossible name
        return set()


def _readable(root: Path, annotation: Annotation, skipped: SkipLog, split: str) -> Annotation:
    defects: dict[str, str] = {}
    for name in tqdm(_names(annotation), f"checking {split} images", unit=" images", leave=False):
        try:
            open_rgb(root / name, min_side=1)
        except UnreadableImageError as error:
            defects[name] = str(error)
    readable = _without(defects, annotation)
    if not readable:
        first = next(iter(defects.values()))
        raise UserError(f"none of the {len(defects)} {split} images can be read: {first}")
    skipped.add("unreadable images", list(defects.values()))
    return readable
