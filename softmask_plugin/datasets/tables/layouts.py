"""Which columns hold what: options for files of one's own, and the layouts of published ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from softmask_plugin.errors import UserError


@dataclass(frozen=True)
class TableOptions:
    """How to parse a file of rows."""

    place: str = ""  # start of the options' names in errors, as in "datasets.captions_folder."
    keys: Mapping[str, str] = field(default_factory=dict)  # the file's column for one of ours
    separator: str | None = None  # of a CSV; None: found in its first line
    root: Path | None = None  # the images folder, below which absolute image names must be
    annotations: Path | None = None  # VQA's file of answers to a file of questions

    @classmethod
    def of(cls, place: str, section: DictConfig, split: str) -> TableOptions:
        """The options of a split of the data set section ``place``; UserError if one is wrong."""
        given = {str(k): str(v) for k, v in section.items() if isinstance(v, (str, int))}
        separator = given.get("separator", "").replace("\\t", "\t") or None
        if separator and (len(separator) > 1 or separator in '"\r\n'):
            raise UserError(
                f"{place}.separator is {separator!r}: it must be one character, as in |"
            )
        keys = {k.removesuffix("_key"): v for k, v in given.items() if k.endswith("_key")}
        root = Path(given["images"]).expanduser().absolute() if "images" in given else None
        answers = OmegaConf.select(section, f"annotations.{split}")
        annotations = Path(str(answers)).expanduser() if answers else None
        return cls(f"{place}.", keys, separator, root, annotations)

    @cached_property
    def roots(self) -> list[str]:
        """Spellings of the images folder in absolute image names."""
        return (
            [p.as_posix() for p in (self.root.absolute(), self.root.resolve())] if self.root else []
        )

    def below(self, name: str, *folders: str) -> str:
        """Prefix an image name with those of the nested folders that the images folder has."""
        path = ""
        for folder in folders:
            if self.root and folder and os.path.isdir(self.root / path / folder):
                path = f"{path}{folder}/"
        return path + name


PLAIN = TableOptions()


def _captions(_: TableOptions, image: Any, caption: Any) -> dict[str, Any]:
    return {"image": image, "caption": caption}


def _statement(_: TableOptions, image: Any, sentence: Any, label: Any) -> dict[str, Any]:
    name = str(image).removesuffix(".jpg") + ".jpg"
    return {"image": name, "sentence": sentence, "label": label}


def _question(_: TableOptions, image: Any, question: Any) -> dict[str, Any]:
    if not isinstance(image, str) or image.isdecimal():  # a number names no file
        return {}
    return {"image": image.removesuffix(".png") + ".png", "question": question}


def _pair(_: TableOptions, images: Any) -> dict[str, Any]:
    is_pair = isinstance(images, list) and len(images) == 2
    return {"image0": images[0], "image1": images[1]} if is_pair else {}


def _nlvr2(options: TableOptions, identifier: Any, directory: Any = "") -> dict[str, Any]:
    pair = str(identifier).rpartition("-")[0]  # dev-850-0-1: sentence 1 about the pair dev-850-0
    folders = pair.partition("-")[0], str(directory)
    return {f"image{i}": options.below(f"{pair}-img{i}.png", *folders) for i in (0, 1)}


# Published layouts of rows: the columns by which they are known, and what makes ours of them.
LAYOUTS: dict[tuple[str, ...], Callable[..., dict[str, Any]]] = {
    ("image_name", "comment"): _captions,  # Flickr30k's results.csv
    ("filepath", "title"): _captions,  # open_clip
    ("Flickr30K_ID", "sentence2", "gold_label"): _statement,  # SNLI-VE
    ("Flikr30kID", "sentence2", "gold_label"): _statement,  # SNLI-VE, first release
    ("Flickr30kID", "hypothesis", "gold_label"): _statement,  # e-SNLI-VE
    ("image_id", "question"): _question,  # DAQUAR
    ("images",): _pair,  # LAVIS's NLVR2
    ("identifier", "directory"): _nlvr2,  # NLVR2, train
    ("identifier",): _nlvr2,  # NLVR2, dev and test
}
