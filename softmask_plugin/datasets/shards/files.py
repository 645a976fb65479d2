"""WebDataset shards on disk: finding them, counting and reading their samples.

Shards may come from anywhere, so nothing in them is trusted: members are read into memory one by
one and never written to a path, only images and captions are used, and nothing is unpickled. The
library's own way of opening a shard is avoided, because it runs a command if the name is a URL that
starts with ``pipe:``.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from braceexpand import braceexpand
from PIL import Image
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from softmask_plugin.datasets.images import IMAGE_SUFFIXES, open_rgb
from softmask_plugin.datasets.tables.rows import parse_json, read_text, short, texts
from softmask_plugin.errors import UserError

INDEX = "index.json"  # webdataset's name

# Suffixes of a shard's images; Pillow finds out the format of an "img"
MEMBER_SUFFIXES = (*IMAGE_SUFFIXES, "img")

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")

# Members as webdataset groups them: their bytes by suffix, and their common name as "__key__".
RawSample = dict[str, Any]


def find_shards(given: str | Iterable[str], where: str) -> list[Path]:
    """Return the absolute paths of shards, each once, in the order given.

    ``given`` is a path, a brace pattern (``{000..127}.tar``), a glob, a folder (all its ``*.tar``),
    or several of these. UserError, with the option's name ``where``, at a URL, at a malformed
    pattern, or if nothing is found.
    """
    names = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{where} is not set: give shards (.tar files), a pattern or a folder")
    found = [path.absolute() for name in names for path in _expand(name, where)]
    return list(dict.fromkeys(found))


def _expand(name: str, where: str) -> list[Path]:
    try:
        expanded = list(braceexpand(name))
    except ValueError as error:
        raise UserError(f"{where}: {name} is not a valid pattern: {error}") from error
    for each in expanded:
        if scheme := _SCHEME.match(each):
            raise UserError(
                f"{where}: {each} starts with {scheme[0]}, but only local files are read: download "
                "the shards, or put ./ before a file name with a colon"
            )
    paths = [path for each in expanded for path in _matches(Path(each).expanduser())]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{where}: {missing[0]} is not a file ({len(missing)} of {len(paths)})")
    if not paths:
        raise UserError(f"{where}: no shard (.tar file) is found at {name}")
    return paths


def _matches(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if not path.exists() and glob.has_magic(str(path)):
        return sorted(map(Path, glob.glob(str(path))))
    return [path]


def shards_by_name(shards: Sequence[Path]) -> dict[str, Path]:
    """Name absolute paths relative to their common folder, which may then move."""
    root = os.path.commonpath([path.parent for path in shards])
    return {path.relative_to(root).as_posix(): path for path in shards}


def count_samples(shards: Sequence[Path], where: str) -> int:
    """Sum the samples of shards from the ``index.json`` beside them (webdataset's wids layout).

    UserError if that is missing, malformed or lacks a shard: set the option ``where`` instead.
    """
    counts: dict[Path, int] = {}
    for folder in dict.fromkeys(shard.parent for shard in shards):
        index = folder / INDEX
        if not index.is_file():
            raise UserError(f"{where} is not set and there is no {index}: set {where}")
        content = parse_json(index, read_text(index, "index"))
        entries = content.get("shardlist") if isinstance(content, dict) else None
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and type(entry.get("nsamples")) is int:
                counts[folder / os.path.basename(str(entry.get("url")))] = entry["nsamples"]
    for shard in shards:
        if shard not in counts:
            raise UserError(f"{shard.parent / INDEX} does not count {shard.name}: set {where}")
    return sum(counts[shard] for shard in shards)


def read_shard(path: Path, defects: list[str]) -> Iterator[RawSample]:
    """Yield a shard's undecoded samples in its order.

    The shard may be compressed. The members of a sample must follow each other. Members that are no
    image, JSON or text by their suffix, or no regular file, are ignored. ``defects`` gets a line
    for a shard that is unreadable from some point on or lacks its end, and for a member that occurs
    twice in a sample (the first counts).
    """

    def skip(error: Exception) -> bool:
        defects.append(f"{path}: {_reason(error)}")
        return True

    def stop(error: Exception) -> bool:
        defects.append(f"{path}: {_reason(error)}, so the rest of it is skipped")
        errors.append(error)
        return False

    errors: list[Exception] = []
    try:
        with path.open("rb") as file:
            source = [{"url": str(path), "stream": file}]
            members = tar_file_expander(source, handler=stop, select_files=_wanted)
            yield from group_by_keys(members, handler=skip)
            if not errors and _is_cut(file):
                defects.append(f"{path}: its end mark is missing, it may have been cut short")
    except OSError as error:
        stop(error)


def _is_cut(file: BinaryIO) -> bool:
    """Whether an uncompressed archive lacks the two empty blocks at its end.

    tarfile does not notice a cut between members or in a header.
    """
    file.seek(257)
    plain = file.read(5) == b"ustar"
    file.seek(max(0, file.seek(0, os.SEEK_END) - 1024))
    return plain and any(file.read())


def _wanted(name: str) -> bool:
    _, suffix = base_plus_ext(name)
    return (suffix or "").lower() in (*MEMBER_SUFFIXES, "json", "txt")


def _reason(error: Exception) -> str:
    # webdataset adds what was being read to `args` and to the text
    text = getattr(error, "strerror", None) or str(error.args[0] if error.args else "")
    return text.partition(" @ ")[0] or type(error).__name__


def read_sample(
    sample: RawSample, label: str, min_side: int | None = None
) -> tuple[Image.Image, list[str], str | None]:
    """Decode a sample: its image as 8-bit RGB, its captions (one or more), and its ``image_id``.

    The captions are in its ``.json`` (``{"caption": text or [texts], "image_id": optional}``), or
    else in its ``.txt``. ``label`` names the sample in messages; ``min_side`` is ``open_rgb``'s.

    Raises:
        UserError: No image, an image that cannot be decoded, or no usable caption.
    """
    try:
        captions, image_id = _captions(sample)
        suffix = next((suffix for suffix in MEMBER_SUFFIXES if suffix in sample), None)
        if suffix is None:
            raise ValueError(f"no image (.{', .'.join(MEMBER_SUFFIXES)})")
        return open_rgb(f"{label}.{suffix}", min_side, sample[suffix]), captions, image_id
    except (ValueError, RecursionError) as error:
        raise UserError(f"{label}: {error}") from error


def _captions(sample: RawSample) -> tuple[list[str], str | None]:
    try:
        content = json.loads(sample.get("json", "{}"))
    except ValueError as error:
        raise ValueError(f".json is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f".json is not an object but {short(content)}")
    captions = content.get("caption")
    if captions is None and "txt" in sample:
        captions = sample["txt"].decode("utf-8")
    image_id = content.get("image_id")
    return texts(captions, "caption", []), None if image_id in (None, "") else str(image_id)
