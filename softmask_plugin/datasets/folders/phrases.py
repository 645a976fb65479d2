"""Phrases and the boxes of what they name: a file of one's own, and Flickr30k Entities.

Flickr30k Entities (Plummer et al., arXiv 1505.04870) as published, each file with an image's number
for a name:

- ``Sentences/ID.txt``: five lines, captions with ``[/EN#CHAIN/TYPE/... the words of a phrase]``;
- ``Annotations/ID.xml``: ``size`` with ``width`` and ``height``, and an ``object`` for each box,
  with the ``name`` of one chain or more, and ``bndbox`` with ``xmin``, ``ymin``, ``xmax`` and
  ``ymax`` (pixels counted from 1, both ends included, as in PASCAL VOC). In place of a box an
  object may have the flags ``scene`` and ``nobndbox``;
- ``train.txt``, ``val.txt``, ``test.txt``: the numbers of a split's images.

A phrase has all boxes of its chain. Phrases without one (scenes, what no box can show, chain 0) are
left out, as everyone does.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from softmask_plugin.config.paths import shipped
from softmask_plugin.datasets.folders.base import FolderBuilder
from softmask_plugin.datasets.folders.refcoco import read_bytes, unit_boxes
from softmask_plugin.datasets.tables.layouts import TableOptions
from softmask_plugin.datasets.tables.phrases import TEXTS, Mention, annotate, parse_phrases
from softmask_plugin.datasets.tables.rows import image_name
from softmask_plugin.datasets.task_datasets import Annotation, GroundingDataset
from softmask_plugin.errors import UserError, suggest
from softmask_plugin.registry import register

# Where the files come from, for error messages.
ENTITIES = "Flickr30k Entities (https://github.com/BryanPlummer/flickr30k_entities)"

_PHRASE = re.compile(r"\[/EN#(\d+)/(\S+) ([^\[\]]+)\]")


class PhrasesBuilder(FolderBuilder):
    """Images with phrases, which ``text`` gives to a model alone or within their captions."""

    eval_dataset_cls = GroundingDataset

    def _mentions(self, file: Path, options: TableOptions) -> list[Mention]:
        raise NotImplementedError

    def _parse(self, file: Path, split: str, options: TableOptions) -> Annotation:
        text = self.config.text
        if text not in TEXTS:
            raise UserError(f"{self.place}.text is {text!r}: {suggest(text, TEXTS)}")
        mentions = self._mentions(file, options)
        annotation = annotate(mentions, text, self.text_processors["eval"])
        if not annotation:
            raise UserError(
                f"{file}: none of the {len(mentions)} phrases occurs in a caption: set "
                f"{self.place}.text=phrase to measure them alone"
            )
        count = sum(len(entry["phrases"]) for entry in annotation)
        numbers = self.NAME, split, count, len(annotation)
        logging.info("%s %s: %d phrases to find with %d texts", *numbers)
        return annotation


@register("builder", "phrases_folder")
class PhrasesFolderBuilder(PhrasesBuilder):
    """Images with a file of phrases and boxes, for ``softmask_grounding``."""

    FILES = "phrases"
    DATASET_CONFIG_DICT = {"default": shipped("datasets/phrases_folder/default.yaml")}

    def _mentions(self, file: Path, options: TableOptions) -> list[Mention]:
        return parse_phrases(file, options)


@register("builder", "flickr30k_entities")
class Flickr30kEntitiesBuilder(PhrasesBuilder):
    """Flickr30k Entities for ``softmask_grounding``; the groups are its types of phrases."""

    FILES = "splits"
    DATASET_CONFIG_DICT = {"default": shipped("datasets/flickr30k_entities/default.yaml")}

    def _mentions(self, file: Path, options: TableOptions) -> list[Mention]:
        folder, problems = Path(str(self.config.data)).expanduser(), list[str]()
        try:
            names = [image_name(f"{number}.jpg") for number in _lines(file)]
        except ValueError as error:
            raise UserError(f"{file}: {error}") from error
        mentions = [each for name in names for each in _read(folder, name, problems)]
        if not mentions:
            raise UserError(f"{file}: its {len(names)} images have no phrase with a box")
        options.skipped.add(f"sentences of {file.name}", problems)
        return mentions


def _read(folder: Path, image: str, problems: list[str]) -> Iterator[Mention]:
    """Read an image's mentions; sentences whose brackets do not match become ``problems``."""
    boxes = _boxes(folder / "Annotations" / Path(image).with_suffix(".xml"))
    file = folder / "Sentences" / Path(image).with_suffix(".txt")
    for number, line in enumerate(_lines(file), 1):
        caption = " ".join(_PHRASE.sub(r" \3 ", line).split())
        if "/EN#" in caption:
            problems.append(f"{file}, line {number}: brackets that do not match")
            continue
        for found in _PHRASE.finditer(line):
            chain, kinds, phrase = found.groups()
            if chain in boxes:
                first = len(_PHRASE.sub(r" \3 ", line[: found.start()]).split())
                yield Mention(image, phrase, boxes[chain], kinds.split("/"), [caption], first)


def _boxes(file: Path) -> dict[str, list[list[float]]]:
    """Boxes by chain."""
    boxes = defaultdict[str, list[list[float]]](list)
    try:
        root = ElementTree.fromstring(read_bytes(file, ENTITIES))
        width, height = _numbers(root.find("size"), "width", "height")
        if not (width > 0 and height > 0):
            raise ValueError(f"{width} x {height} pixels")
        for thing in root.iterfind("object"):
            if (box := thing.find("bndbox")) is not None:
                x0, y0, x1, y1 = _numbers(box, "xmin", "ymin", "xmax", "ymax")
                pixels = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
                for name in thing.iterfind("name"):
                    boxes[str(name.text).strip()] += unit_boxes([pixels], width, height)
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(
            f"{file} is laid out differently ({error}): get that of {ENTITIES}"
        ) from error
    return {chain: found for chain, found in boxes.items() if found}


def _numbers(parent: Any, *tags: str) -> list[float]:
    """Numbers of an element's children; ValueError if one is missing."""
    if parent is None or None in (texts := [parent.findtext(tag) for tag in tags]):
        raise ValueError(f"no {', '.join(tags)}")
    return [float(text) for text in texts]


def _lines(file: Path) -> list[str]:
    try:
        text = read_bytes(file, ENTITIES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: get that of {ENTITIES}") from error
    return [line for line in re.split(r"\r?\n", text.strip()) if line.strip()]
