"""What data sets of the user's own images share: YAML keys, missing and unreadable images."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lavis.common.dist_utils import is_main_process
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder, load_dataset_config
from lavis.datasets.datasets.base_dataset import BaseDataset
from PIL import Image
from tqdm import tqdm

from softmask_plugin.datasets.images import UnreadableImageError, open_rgb
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.errors import UserError, suggest

SPLITS = ("train", "val", "test")

# Where so many images in a row are unreadable, the disk is at fault rather than an image.
MAX_UNREADABLE_IN_A_ROW = 100

# As in LAVIS's annotation files: "image" or, where there are two, "images", and what is said of it.
Annotation = list[dict[str, Any]]


class FolderDataset(BaseDataset):
    """Items of an annotation. To be named before the class of LAVIS's whose samples it gives.

    Args:
        vis_processor, text_processor: applied to each PIL image and text.
        vis_root: the images folder.
        annotation: the items; every file exists.
        skipped: where unreadable images are reported; None: they are an error.
    """

    def __init__(
        self,
        vis_processor: Any,
        text_processor: Any,
        vis_root: str | Path,
        annotation: Annotation,
        skipped: SkipLog | None = None,
    ) -> None:
        super().__init__(vis_processor, text_processor, vis_root, ann_paths=[])
        self.annotation = annotation
        self.skipped = skipped
        self._add_instance_ids()

    def open(self, index: int) -> tuple[dict[str, Any], list[Image.Image]]:
        """An item and its images; unless they are an error, unreadable ones pass to the next item.

        Raises:
            UserError: an image cannot be read, or so many in a row that the disk must be at fault.
        """
        if index >= len(self):  # what ends a loop over the data set
            raise IndexError(index)
        for offset in range(MAX_UNREADABLE_IN_A_ROW):
            item = self.annotation[(index + offset) % len(self)]
            paths = [os.path.join(self.vis_root, name) for name in image_names(item)]
            min_side = getattr(self.vis_processor, "min_side", None)
            try:
                return item, [open_rgb(path, min_side) for path in paths]
            except UnreadableImageError as error:
                if self.skipped is None:
                    raise
                self.skipped.add("unreadable images", [str(error)])
        raise UserError(
            f"{MAX_UNREADABLE_IN_A_ROW} images in a row cannot be read, the last was {paths[-1]}: "
            f"is the disk of {self.vis_root} still there?"
        )


class FolderBuilder(BaseDatasetBuilder):
    """Builds the splits that have a file; a subclass says how to read one and what to make of it.

    Items whose images are missing or, in ``val`` and ``test``, unreadable are left out and
    reported. Relative paths start from the current folder.

    Attributes:
        NAME: the name it is registered under.
        FILES: the key of the section that names a file per split.
        annotations: what was read so far, by split.

    Raises:
        UserError: a key is missing or unknown, a file is malformed, or no image is left.
    """

    NAME: str
    FILES: str

    def read(self, file: Path, split: str, skipped: SkipLog) -> Annotation:
        """Read the file of a split; what is left out of it goes to ``skipped``."""
        raise NotImplementedError

    def arguments(self, split: str) -> dict[str, Any]:
        """Arguments of a split's data set that others of its kind do not have."""
        return {}

    def _download_data(self) -> None:
        """Nothing to download."""

    def build(self) -> dict[str, BaseDataset]:
        """Build the data sets, by split."""
        root, files = self._paths()
        self.build_processors()
        skipped = SkipLog.of_run()
        at_build = replace(skipped, muted=not is_main_process())  # every rank builds the same
        self.annotations: dict[str, Annotation] = {}
        datasets: dict[str, BaseDataset] = {}
        for split, file in files.items():
            annotation = self._existing(root, self.read(file, split, at_build), at_build)
            if split != "train":
                annotation = _readable(root, annotation, at_build, split)
            self.annotations[split] = annotation
            mode = "train" if split == "train" else "eval"
            dataset_class: Any = getattr(self, f"{mode}_dataset_cls")
            datasets[split] = dataset_class(
                vis_processor=self.vis_processors[mode],
                text_processor=self.text_processors[mode],
                vis_root=root,
                annotation=annotation,
                skipped=skipped if split == "train" else None,
                **self.arguments(split),
            )
            counts = len(annotation), len(_names(annotation))
            logging.info("%s %s: %d items, %d images", self.NAME, split, *counts)
        return datasets

    def _paths(self) -> tuple[Path, dict[str, Path]]:
        """The images folder and the file of each split, checked."""
        place = f"datasets.{self.NAME}"
        section = self.config.get(self.FILES) or {}
        check_keys(place, self.config, ["type", *load_dataset_config(self.default_config_path())])
        check_keys(f"{place}.{self.FILES}", section, SPLITS)
        files = {}
        for split in SPLITS:
            if file := section.get(split):
                if not isinstance(file, str):
                    raise UserError(f"{place}.{self.FILES}.{split} must be the path of one file")
                files[split] = Path(file).expanduser()
        if not files:
            raise UserError(f"{place}.{self.FILES} names no file: set its train, val or test")
        if not self.config.get("images"):
            raise UserError(f"{place}.images is not set: give the folder that holds the images")
        root = Path(self.config.images).expanduser().absolute()
        if not root.is_dir():
            raise UserError(f"{place}.images: there is no folder {root}")
        return root, files

    def _existing(self, root: Path, annotation: Annotation, skipped: SkipLog) -> Annotation:
        """Leave out images without a file: one listing per folder, not one query per image."""
        names = _names(annotation)
        folders = {os.path.dirname(name) for name in names}
        files = {folder: _listing(root / folder) for folder in folders}
        missing = [n for n in names if os.path.basename(n) not in files[os.path.dirname(n)]]
        found = _without(missing, annotation)
        if not found:
            raise UserError(
                f"none of the {len(missing)} images exists: the first was looked for as "
                f"{root / missing[0]}; set datasets.{self.NAME}.images to the folder that the "
                "names start from"
            )
        skipped.add("missing images", [f"{root / name}: no such file" for name in missing])
        return found


def image_names(item: dict[str, Any]) -> list[str]:
    """Paths of an item's images below the images folder."""
    return item["images"] if "images" in item else [item["image"]]


def check_keys(place: str, section: Iterable[Any], known: Iterable[str]) -> None:
    """Raise UserError, with the nearest known keys, at an unknown key of the YAML section."""
    for key in section:
        if key not in known:
            raise UserError(f"unknown key {place}.{key}: {suggest(key, known)}")


def _names(annotation: Annotation) -> list[str]:
    return list(dict.fromkeys(name for item in annotation for name in image_names(item)))


def _without(names: Iterable[str], annotation: Annotation) -> Annotation:
    names = set(names)
    return [item for item in annotation if names.isdisjoint(image_names(item))]


def _listing(folder: Path) -> set[str]:
    try:
        with os.scandir(folder) as entries:  # a pipe or a folder is no image; opening one may hang
            return {entry.name for entry in entries if entry.is_symlink() or _is_file(entry)}
    except (OSError, ValueError):  # no such folder, or a name that none can have
        return set()


def _is_file(entry: os.DirEntry[str]) -> bool:
    return entry.is_file(follow_symlinks=False)


def _readable(root: Path, annotation: Annotation, skipped: SkipLog, split: str) -> Annotation:
    """Leave out images that cannot be decoded; evaluation needs to know before it starts."""
    names = _names(annotation)
    bar = tqdm(names, f"checking {split} images", unit=" images", leave=False)
    defects = {name: defect for name in bar if (defect := _defect(root / name))}
    readable = _without(defects, annotation)
    if not readable:
        first = next(iter(defects.values()))
        raise UserError(f"none of the {len(defects)} {split} images can be read: {first}")
    skipped.add("unreadable images", list(defects.values()))
    return readable


def _defect(path: Path) -> str | None:
    try:
        open_rgb(path, min_side=1)
    except UnreadableImageError as error:
        return str(error)
    return None
