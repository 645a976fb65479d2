"""Files of captions and foils: JSON, JSONL, CSV or TSV, one's own and as published."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from softmask_plugin.datasets.images import MAX_PIXELS
from softmask_plugin.datasets.tables.layouts import PLAIN, TableOptions
from softmask_plugin.datasets.tables.rows import (
    SUFFIXES,
    Row,
    image_name,
    parse_table,
    short,
    texts,
)
from softmask_plugin.errors import UserError

_SIDES = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")  # ARO's


def parse_foils(path: str | Path, options: TableOptions = PLAIN) -> list[dict[str, Any]]:
    """Parse a file of foils, or all those in a folder, into one entry per usable row.

    Args:
        path: Rows ``{"image", "caption", "foil", "group" (optional), "pair" (optional)}``, or a
            file as published: SugarCrepe's, VALSE's, ARO's (VG-Relation and VG-Attribution),
            Winoground's (docs/data.md). The group of a row without one is the file's name.
            VALSE's foils that its annotators did not confirm are skipped.
        options: Names of columns, the separator, the images folder.

    Returns:
        ``{"image", "caption", "foil", "group"}`` each; with ``pair`` if the row has one, and with
        ``crop``, (x0, y0, x1, y1) in pixels, for the part of the image that ARO shows.

    Raises:
        UserError: A file is missing, malformed, or holds no usable row, a folder holds no file, or
            a pair is not two rows with caption and foil exchanged.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"{path} holds no file that ends in {', '.join(SUFFIXES)}")
    return [item for file in files for item in _parse_file(file, options)]


def _parse_file(path: Path, options: TableOptions) -> list[dict[str, Any]]:
    named = (column for column in ("group", "pair") if column in options.keys)
    columns, parse = ("image", "caption", "foil", *named), partial(_items, path.stem, options)
    rows = parse_table(path, columns, parse, "foil", unpack=_unpack, options=options)
    items = [item for row in rows for item in row]
    pairs: dict[str, list[tuple[str, str]]] = {}
    for item in items:
        if "pair" in item:
            pairs.setdefault(item["pair"], []).append((item["caption"], item["foil"]))
    for pair, (first, *others) in pairs.items():
        if others and others != [first[::-1]]:
            raise UserError(
                f"{path}: pair {short(pair)} must be two rows with caption and foil exchanged"
            )
    return items


def _unpack(content: dict[str, Any]) -> Iterable[Row] | None:
    """Rows by name, as in SugarCrepe and VALSE."""
    nested = content and all(isinstance(row, dict) for row in content.values())
    return [(f"entry '{name}'", row) for name, row in content.items()] if nested else None


def _items(
    file: str, options: TableOptions, row: dict[str, Any], complaints: list[str]
) -> list[dict[str, Any]]:
    """The item of a row; Winoground's rows hold two."""
    votes = row.get("mturk")  # VALSE's
    if isinstance(votes, dict) and votes.get("caption") in (0, 1):
        raise ValueError("fewer than two annotators chose the caption and not the foil")
    (caption, *_), (foil, *_) = (texts(row[key], key, complaints) for key in ("caption", "foil"))
    if caption == foil:
        raise ValueError(f"caption and foil are the same: {short(caption)}")
    item: dict[str, Any] = {
        "image": image_name(row["image"], options),
        "caption": caption,
        "foil": foil,
        "group": str(_given(row, "group", row.get("collapsed_tag") or file)),
    }
    if all(side in row for side in _SIDES):
        item["crop"] = _crop(*(row[side] for side in _SIDES))
    if "image_1" not in row:
        pair = _given(row, "pair", None)
        return [item if pair is None else {**item, "pair": f"{file} {pair}"}]
    image = image_name(f"{row['image_1']}.png", options)
    pair = {"pair": f"{file} {row.get('id', item['image'])}"}
    return [item | pair, {**item, **pair, "image": image, "caption": foil, "foil": caption}]


def _given(row: dict[str, Any], column: str, default: Any) -> Any:
    value = row.get(column)
    return default if value in (None, "") else value


def _crop(*sides: Any) -> tuple[int, int, int, int]:
    try:
        x, y, width, height = map(int, sides)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"the box {short(sides)} is not four whole numbers") from None
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise ValueError(f"the box {short(sides)} is empty or has over {MAX_PIXELS:,} pixels")
    return x, y, x + width, y + height
