"""Readers of caption files: JSON, JSONL, CSV, TSV and Karpathy's layout, told apart by content."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.errors import UserError

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")

# Karpathy's "restval" is the rest of COCO's validation images, which everyone trains on.
_KARPATHY_SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}

# Where a row stands in its file, and the row: a mapping with "image", "caption" and perhaps
# "image_id" if all is well, an exception if it could not be parsed.
_Row = tuple[str, Any]


@dataclass
class CaptionedImage:
    """An image with its captions.

    Attributes:
        image: path below the images folder, "/" between its parts.
        captions: at least one; each has a letter or digit.
        image_id: the file's ``image_id``, or ``image`` where it gives none.
    """

    image: str
    captions: list[str]
    image_id: str


def read_captions(
    path: str | Path, split: str | None = None, skipped: SkipLog | None = None
) -> list[CaptionedImage]:
    """Read a caption file: one entry per image, in the order of the file.

    Rows of the same image are merged; the first one's ``image_id`` counts. A row without a usable
    image or caption, and any single unusable caption, is skipped and reported. An image must lie
    below the images folder: absolute names and ``..`` are refused. A caption needs a letter or
    digit; a number is taken as text.

    Args:
        path: a JSON list of ``{"image", "caption": text or [texts], "image_id" (optional)}``; the
            same one per line (JSONL); a CSV or TSV with columns ``image`` and ``caption``; or
            Karpathy's ``{"images": [{"filename", "split", "sentences": [{"raw"}]}]}``. UTF-8.
        split: ``train``, ``val`` or ``test``: which part of a Karpathy file (None: all of it).
            Other files hold one split and are read whole.
        skipped: where skipped rows are reported; by default a warning names the first.

    Raises:
        UserError: the file is missing, malformed, or holds no usable row.
    """
    path = Path(path)
    images: dict[str, CaptionedImage] = {}
    problems = []
    for where, row in _rows(path, _read(path), split):
        try:
            _merge(images, row)
        except ValueError as problem:
            problems.append(f"{path}, {where}: {problem}")
    if not images:
        raise UserError(f"no usable row: {problems[0]}" if problems else f"{path} holds no rows")
    (skipped or SkipLog()).add(f"rows or captions of {path.name}", problems)
    return list(images.values())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8 ({error.reason})") from error
    except OSError as error:
        raise UserError(f"cannot read the caption file {path}: {error.strerror}") from error


def _rows(path: Path, text: str, split: str | None) -> Iterator[_Row]:
    suffix, start = path.suffix.lower(), text.lstrip()[:1]
    if suffix in (".csv", ".tsv") or (start not in ("[", "{") and suffix not in SUFFIXES):
        return _csv_rows(path, text)
    first_line, _, rest = text.strip().partition("\n")
    if start == "{" and rest and _is_row(first_line):
        return _jsonl_rows(text)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        return _karpathy_rows(path, content["images"], split)
    rows = content if isinstance(content, list) else [content]
    return ((f"entry {number}", row) for number, row in enumerate(rows, 1))


def _is_row(line: str) -> bool:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "images" not in row


def _jsonl_rows(text: str) -> Iterator[_Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"line {number}", error


def _csv_rows(path: Path, text: str) -> Iterator[_Row]:
    delimiter = max("\t,;", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        for needed in ("image", "caption"):
            if needed not in reader.fieldnames:
                raise UserError(
                    f"{path} has no '{needed}' among its columns {_short(reader.fieldnames)}"
                )
        for row in reader:
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        where = f"{path}, after line {reader.line_num}"
        raise UserError(f"{where}: {error}; look for a stray quotation mark") from error


def _karpathy_rows(path: Path, entries: list[Any], split: str | None) -> Iterator[_Row]:
    splits = Counter(str(entry.get("split")) for entry in entries if isinstance(entry, dict))
    wanted = set(splits) if split is None else _KARPATHY_SPLITS[split]
    if not splits.keys() & wanted:
        raise UserError(f"{path} has no image of split '{split}'; its splits: {dict(splits)}")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            yield f"image {number}", entry
        elif str(entry.get("split")) in wanted:
            yield f"image {number}", _plain_row(entry)


def _plain_row(entry: dict[str, Any]) -> Any:
    name, folder, sentences = (entry.get(key) for key in ("filename", "filepath", "sentences"))
    if not isinstance(name, str) or not isinstance(sentences, list):
        return ValueError(f"no 'filename' or no list 'sentences' in {_short(entry)}")
    captions = [sentence.get("raw") for sentence in sentences if isinstance(sentence, dict)]
    return {"image": f"{folder}/{name}" if folder else name, "caption": captions}


def _merge(images: dict[str, CaptionedImage], row: Any) -> None:
    """Add a row to ``images``; ValueError, which says why, if any of it cannot be used."""
    if isinstance(row, Exception):
        raise ValueError(str(row))
    if not isinstance(row, dict):
        raise ValueError(f"expected 'image' and 'caption', got {_short(row)}")
    for needed in ("image", "caption"):
        if needed not in row:
            raise ValueError(f"no '{needed}' among {_short(list(row))}")
    if None in row:  # where csv puts surplus fields
        raise ValueError("more fields than columns: quote captions that hold the delimiter")
    name = _image_name(row["image"])
    given = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
    captions = [text for text in map(_caption, given) if text]
    if not captions:
        raise ValueError(f"no caption for {name}, but {_short(row['caption'])}")
    image_id = row.get("image_id")
    entry = CaptionedImage(name, [], name if image_id in (None, "") else str(image_id))
    images.setdefault(name, entry).captions.extend(captions)
    if len(captions) < len(given):
        raise ValueError(f"{len(given) - len(captions)} unusable captions in {_short(given)}")


def _image_name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"an image's name expected, got {_short(value)}")
    name = PurePosixPath(value.strip().replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or PureWindowsPath(name).drive:
        raise ValueError(f"image {_short(value)} does not lie below the images folder")
    if not name.name:
        raise ValueError(f"an image's name expected, got {_short(value)}")
    return str(name)


def _caption(value: Any) -> str | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if isinstance(value, str) and any(character.isalnum() for character in value):
        # JSON can spell half a surrogate pair, which no tokenizer takes.
        return value.strip().encode("utf-8", "replace").decode("utf-8")
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
