"""Caption files of one's own and as published, known by suffix and content."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from softmask_plugin.datasets.tables.layouts import PLAIN, TableOptions
from softmask_plugin.datasets.tables.rows import Row, image_name, parse_table, short, texts
from softmask_plugin.errors import UserError

# "restval" is the rest of COCO's validation images, which everyone trains on.
_KARPATHY_SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


def parse_captions(
    path: str | Path,
    split: str | None = None,
    options: TableOptions = PLAIN,
) -> list[dict[str, Any]]:
    """Parse a caption file into one entry per image, in the order of the file.

    Rows of the same image are merged; the first ``image_id`` counts. A row without a usable image
    or caption is skipped and reported, as is any single unusable caption. An image must lie below
    the images folder: ``..`` and absolute names elsewhere are refused. A caption needs a letter or
    digit; a number is taken as text.

    Args:
        path: A JSON list of ``{"image", "caption": text or [texts], "image_id" (optional)}``; one
            such object per line (JSONL); a CSV or TSV with columns ``image`` and ``caption``;
            ``{image: caption or [captions]}``; or a file as published: Karpathy's, COCO's,
            Flickr8k's, Flickr30k's, open_clip's (docs/data.md). UTF-8.
        split: ``train``, ``val`` or ``test``: a part of a Karpathy file (None: all of it). Other
            files hold one split.
        options: Names of columns, the separator, the images folder.

    Returns:
        ``{"image", "caption", "image_id"}`` each, as in LAVIS's annotations: ``image`` is the path
        below the images folder, with "/" between its parts, ``caption`` a list of one or more, and
        ``image_id`` the file's, or ``image`` if it has none.

    Raises:
        UserError: The file is missing, malformed, or holds no usable row.
    """

    def parse(row: dict[str, Any], complaints: list[str]) -> dict[str, Any]:
        name, image_id = image_name(row["image"], options), row.get("image_id")
        captions = texts(row["caption"], "caption", complaints)
        image_id = name if image_id in (None, "") else str(image_id)
        return {"image": name, "caption": captions, "image_id": image_id}

    columns, parts = ("image", "caption"), "rows or captions"
    unpack = partial(_unpack, path, split, options)
    images: dict[str, dict[str, Any]] = {}
    for row in parse_table(path, columns, parse, "caption", parts, unpack, options):
        first = images.setdefault(row["image"], row)
        if first is not row:
            first["caption"] += row["caption"]
    return list(images.values())


def _unpack(
    path: str | Path, split: str | None, options: TableOptions, content: dict[str, Any]
) -> list[Row] | None:
    entries, annotations = content.get("images"), content.get("annotations")
    if isinstance(entries, list) and isinstance(annotations, list):
        return _coco_rows(entries, annotations, options)
    if isinstance(entries, list):
        return _karpathy_rows(path, split, entries)
    if content and all(PurePosixPath(name).suffix for name in content):  # image files
        return [(name, {"image": name, "caption": said}) for name, said in content.items()]
    return None


def _coco_rows(entries: list[Any], annotations: list[Any], options: TableOptions) -> list[Row]:
    names = {}
    for entry in entries:
        with suppress(AttributeError, KeyError, TypeError):  # what has no name is reported below
            folder = PurePosixPath(entry.get("coco_url") or "").parent.name  # .../val2017/1.jpg
            names[str(entry["id"])] = options.below(entry["file_name"], folder)
    return [
        (
            f"annotation {number}",
            row | {"image": names.get(str(row.get("image_id")))} if isinstance(row, dict) else row,
        )
        for number, row in enumerate(annotations, 1)
    ]


def _karpathy_rows(path: str | Path, split: str | None, entries: list[Any]) -> list[Row]:
    splits = Counter(str(entry.get("split")) for entry in entries if isinstance(entry, dict))
    wanted = set(splits) if split is None else _KARPATHY_SPLITS[split]
    if not splits.keys() & wanted:
        have = (
            f"its splits: {dict(splits)}" if splits.keys() - {"None"} else "no entry names a split"
        )
        raise UserError(f"{path} has no image of split '{split}'; {have}")
    return [
        (f"image {number}", _karpathy_row(entry) if isinstance(entry, dict) else entry)
        for number, entry in enumerate(entries, 1)
        if not isinstance(entry, dict) or str(entry.get("split")) in wanted
    ]


def _karpathy_row(entry: dict[str, Any]) -> Any:
    name, folder, sentences = (entry.get(key) for key in ("filename", "filepath", "sentences"))
    if not isinstance(name, str) or not isinstance(sentences, list):
        return ValueError(f"no 'filename' or no list 'sentences' in {short(entry)}")
    captions = [sentence.get("raw") for sentence in sentences if isinstance(sentence, dict)]
    return {"image": f"{folder}/{name}" if folder else name, "caption": captions}
