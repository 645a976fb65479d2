"""Files of phrases and boxes (JSON, JSONL, CSV or TSV), and phrases found in their captions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from softmask_plugin.datasets.tables.layouts import PLAIN, TableOptions, find_columns
from softmask_plugin.datasets.tables.rows import image_name, one_text, parse_table, short, texts

TEXTS = ("phrase", "caption")  # what a model may be given: the phrase alone, or its caption


@dataclass(frozen=True)
class Mention:
    """A phrase about an image, and the boxes of what it names."""

    image: str
    phrase: str
    boxes: list[list[float]]  # (x0, y0, x1, y1) in [0, 1], one or more
    categories: list[str]
    captions: list[str]  # where it may stand
    first: int | None = None  # its first word in its only caption, from 0; None: look for it


def parse_phrases(path: str | Path, options: TableOptions = PLAIN) -> list[Mention]:
    """Parse a file of phrases and boxes; unusable rows and phrases are skipped and reported.

    Rows of the same image, phrase (in any case) and captions are one phrase with all their boxes.

    Args:
        path: Rows ``{"image", "phrase", "box": [x0, y0, x1, y1] or "boxes": a list of them,
            "caption": text or [texts] (optional), "category": name or [names] (optional)}``, or
            rows by image, ``{"image", "caption" (optional), "phrases": [{"phrase", "box", ...}]}``.
            Boxes are shares of the image's width and height; in a CSV four numbers each.
        options: Names of columns, the separator, the images folder.

    Raises:
        UserError: The file is missing, malformed, or holds no usable row.
    """

    def parse(row: dict[str, Any], complaints: list[str]) -> list[Mention]:
        image, said = image_name(row["image"], options), row.get("caption")
        captions = [] if said in (None, "", []) else texts(said, "caption", complaints)
        if not isinstance(row.get("phrases"), list):
            return [_mention(image, captions, row, options)]
        found = []
        for each in row["phrases"]:
            try:
                found.append(_mention(image, captions, each, options))
            except ValueError as error:
                complaints.append(str(error))
        if not found:
            raise ValueError(f"no usable phrase of image {short(image)}")
        return found

    rows = parse_table(path, ["image"], parse, "phrase", "rows or phrases", options=options)
    merged: dict[tuple[Any, ...], Mention] = {}
    for mention in chain.from_iterable(rows):
        same = mention.image, mention.phrase.casefold(), *mention.captions
        first = merged.setdefault(same, mention)
        if first is not mention:
            first.boxes.extend(box for box in mention.boxes if box not in first.boxes)
            first.categories.extend(
                name for name in mention.categories if name not in first.categories
            )
    return list(merged.values())


def annotate(
    mentions: Iterable[Mention], text: str, clean: Callable[[str], str]
) -> list[dict[str, Any]]:
    """List what a model is given, and the phrases that it maps there.

    Args:
        mentions: Phrases and their boxes.
        text: ``"phrase"``: each phrase alone. ``"caption"``: each phrase in each of its captions
            that has it, word for word; those that occur in none are left out.
        clean: The text processor. It may cut a caption: what it cuts off does not occur.

    Returns:
        One entry for each image and text, the same after cleaning: ``{"image", "text", "boxes",
        "phrases": [{"phrase", "words", "box", "group"}]}``. ``words`` are numbers of words of the
        cleaned text, those of all places where the phrase occurs, unless the file names one;
        ``box`` lists the phrase's boxes, ``boxes`` those of all phrases of the image, and
        ``group`` the phrase's categories.
    """
    mentions = list(mentions)
    boxes: dict[str, list[list[float]]] = {}
    for mention in mentions:
        seen = boxes.setdefault(mention.image, [])
        seen.extend(box for box in mention.boxes if box not in seen)
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for mention in mentions:
        phrase, alone = clean(mention.phrase).split(), [(mention.phrase, None)]
        within = [(caption, _start(mention, caption, clean)) for caption in mention.captions]
        known: set[str] = set()  # an image's captions may be the same once cleaned
        for given, start in alone if text == "phrase" else within:
            said = clean(given)
            if said in known:
                continue
            known.add(said)
            if words := occurrences(phrase, said.split(), start):
                blank = {"image": mention.image, "text": given, "boxes": boxes[mention.image]}
                entry = entries.setdefault((mention.image, said), {**blank, "phrases": []})
                found = {"phrase": mention.phrase, "words": words}
                truth = {"box": mention.boxes, "group": mention.categories}
                entry["phrases"].append({**found, **truth})
    return list(entries.values())


def occurrences(phrase: Sequence[str], text: Sequence[str], start: int | None = None) -> list[int]:
    """Number the words of a text that are the phrase's, wherever it occurs or at ``start`` alone.

    >>> occurrences(["a", "dog"], ["a", "dog", "and", "a", "dog"])
    [0, 1, 3, 4]
    """
    n = len(phrase)
    starts = range(len(text) - n + 1) if start is None else [start]
    places = (range(at, at + n) for at in starts if n and [*text[at : at + n]] == [*phrase])
    return sorted({*chain.from_iterable(places)})


def _start(mention: Mention, caption: str, clean: Callable[[str], str]) -> int | None:
    """The phrase's first word in the cleaned caption, where a dash may have split earlier words."""
    if mention.first is None:
        return None
    return len(clean(" ".join(caption.split()[: mention.first])).split())


def _mention(image: str, captions: list[str], row: Any, options: TableOptions) -> Mention:
    if not isinstance(row, dict):
        raise ValueError(f"expected a phrase and its box, got {short(row)}")
    row = row | find_columns(row, (), options)
    if "phrase" not in row:
        key = f"{options.place}phrase_key"
        raise ValueError(f"no 'phrase' among {short(list(row))}: set {key}=COLUMN")
    phrase, category = one_text(row["phrase"], "phrase"), row.get("category")
    categories = [] if category in (None, "", []) else texts(category, "category", [])
    boxes = _boxes(row.get("boxes") or row.get("box"))
    return Mention(image, phrase, boxes, categories, captions)


def _boxes(value: Any) -> list[list[float]]:
    if isinstance(value, str):
        value = re.split(r"[\s,;\[\]()]+", value.strip(" []()"))
    try:
        boxes = np.array(value, dtype=np.float64).reshape(-1, 4)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"expected a box of four numbers, got {short(value)}") from error
    inside = (boxes >= 0) & (boxes <= 1)
    if not len(boxes) or not (inside.all() and (boxes[:, :2] < boxes[:, 2:]).all()):
        remedy = "x1 and y1 are the right and the bottom side, not width and height"
        if (boxes > 1).any():
            remedy = "divide pixels by the image's width and height"
        raise ValueError(f"box {short(value)} is not [x0, y0, x1, y1] in [0, 1]: {remedy}")
    return boxes.tolist()
