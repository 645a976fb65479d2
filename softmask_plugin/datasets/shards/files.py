"""WebDataset shards on disk: finding them, counting and reading their samples.

Shards may come from anywhere, so nothing in them is trusted. Their members are read one by one into
memory and never written to a path; only images and captions are taken; nothing is unpickled. The
library's own way of opening a shard is not used, since it runs a command where the name is a URL
that starts with ``pipe:``.
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

from softmask_plugin.datasets.images import UnreadableImageError, open_rgb
from softmask_plugin.datasets.tables.rows import read_json, read_text, short, texts
from softmask_plugin.errors import UserError

INDEX = "index.json"
INDEX_KIND = "wids-shard-index-v1"

# Suffixes of the members that are read. "img" stands for any format, which Pillow finds out.
IMAGE_SUFFIXES = tuple("jpg jpeg png webp avif bmp gif jp2 ppm tif tiff img".split())
CAPTION_SUFFIXES = ("json", "txt")

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")

# As webdataset groups the members of a shard: their bytes by suffix, and "__key__", the name that
# they share.
RawSample = dict[str, Any]


class BrokenSampleError(Exception):
    """A sample that cannot be used; the message is its name and the reason."""


def find_shards(given: str | Iterable[str], where: str) -> list[Path]:
    """Absolute paths of the shards that are named, each once, in the order of the names.

    Args:
        given: a path, a brace pattern (``{000..127}.tar``), a glob, a folder (all its ``*.tar``),
            or several of these.
        where: what the option is called in errors.

    Raises:
        UserError: a URL, a malformed pattern, or nothing is found.
    """
    names = [given] if isinstance(given, str) else list(given)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{where} is not set: give shards (.tar files), a pattern or a folder")
    found = [path for name in names for path in _expand(name, where)]
    return list(dict.fromkeys(path.absolute() for path in found))


def _expand(name: str, where: str) -> list[Path]:
    try:
        expanded = list(braceexpand(name))
    except ValueError as error:
        raise UserError(f"{where}: {name} is no pattern of shards: {error}") from error
    paths: list[Path] = []
    for each in expanded:
        if scheme := _SCHEME.match(each):
            raise UserError(
                f"{where}: {each} starts with {scheme[0]}, but only local files are read: download "
                "the shards, or write ./ before the name of a file that has a colon"
            )
        paths += _matches(Path(each).expanduser())
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{where}: {len(missing)} of {len(paths)} shards, {missing[0]} is no file")
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
    """Shards by their paths below the folder that all share: the same wherever that folder is.

    Args:
        shards: absolute paths.
    """
    root = os.path.commonpath([path.parent for path in shards])
    return {path.relative_to(root).as_posix(): path for path in shards}


def count_samples(shards: Sequence[Path], where: str) -> int:
    """Sum of the shards' samples as the ``index.json`` beside them says (webdataset's wids layout).

    Args:
        shards: paths of shards, in one or more folders.
        where: what the option is called that makes counting needless.

    Raises:
        UserError: there is no such file, it is malformed, or it does not name a shard.
    """
    counts: dict[Path, int] = {}
    for folder in dict.fromkeys(shard.parent for shard in shards):
        index = folder / INDEX
        if not index.is_file():
            raise UserError(f"{where} is not set and there is no {index}: set {where}")
        content = read_json(index, read_text(index, "index"))
        entries = content.get("shardlist") if isinstance(content, dict) else None
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and type(entry.get("nsamples")) is int:
                counts[folder / os.path.basename(str(entry.get("url")))] = entry["nsamples"]
    unknown = [shard for shard in shards if shard not in counts]
    if unknown:
        raise UserError(
            f"{unknown[0].parent / INDEX} does not count {unknown[0].name}: set {where}"
        )
    return sum(counts[shard] for shard in shards)


def read_shard(path: Path, defects: list[str]) -> Iterator[RawSample]:
    """Yield a shard's samples in its order, undecoded.

    Only members with the suffixes above are read; those of a sample must follow each other. Links
    and whatever else is no regular file are passed over.

    Args:
        path: the shard; a compressed one is read as well.
        defects: is given a line for a shard that cannot be read to its end or lacks one, and for a
            member that occurs twice in a sample (of which the first counts).
    """

    def go_on(error: Exception) -> bool:
        defects.append(f"{path}: {_reason(error)}")
        return True

    def stop(error: Exception) -> bool:
        defects.append(f"{path}: {_reason(error)}, so the rest of it is skipped")
        ends.append(error)
        return False

    ends: list[Exception] = []
    try:
        with path.open("rb") as file:
            source = [{"url": str(path), "stream": file}]
            members = tar_file_expander(source, handler=stop, select_files=_wanted)
            yield from group_by_keys(members, handler=go_on)
            if not ends and _is_cut(file):
                defects.append(f"{path}: its end mark is missing, it may have been cut short")
    except OSError as error:
        stop(error)


def _is_cut(file: BinaryIO) -> bool:
    """Whether an archive that is not compressed lacks the two empty blocks at its end.

    Where one was cut between its members, or in a header, tarfile takes that for the end.
    """
    file.seek(257)
    plain = file.read(5) == b"ustar"
    file.seek(max(0, file.seek(0, os.SEEK_END) - 1024))
    return plain and any(file.read())


def _wanted(name: str) -> bool:
    _, suffix = base_plus_ext(name)
    return (suffix or "").lower() in IMAGE_SUFFIXES + CAPTION_SUFFIXES


def _reason(error: Exception) -> str:
    # webdataset adds to `args`, and to the text, what was being read
    text = getattr(error, "strerror", None) or str(error.args[0] if error.args else "")
    return text.partition(" @ ")[0] or type(error).__name__


def read_sample(
    sample: RawSample, label: str, min_side: int | None = None
) -> tuple[Image.Image, list[str], str | None]:
    """Decode a sample: its image as 8-bit RGB, its captions, its ``image_id`` if it has any.

    The captions, at least one, are those of its ``.json`` (``{"caption": text or [texts],
    "image_id": optional}``); where that has no ``caption``, or there is none, the text of its
    ``.txt`` is the caption.

    Args:
        sample: as ``read_shard`` gives it.
        label: names the sample in messages.
        min_side: as ``open_rgb`` has it.

    Raises:
        BrokenSampleError: no image, or one that cannot be decoded, or no usable caption.
    """
    try:
        captions, image_id = _captions(sample)
        suffix = _image_suffix(sample)
    except (ValueError, RecursionError) as error:
        raise BrokenSampleError(f"{label}: {error}") from error
    try:
        image = open_rgb(f"{label}.{suffix}", min_side, sample[suffix])
    except UnreadableImageError as error:
        raise BrokenSampleError(str(error)) from error
    return image, captions, image_id


def _image_suffix(sample: RawSample) -> str:
    for suffix in IMAGE_SUFFIXES:
        if suffix in sample:
            return suffix
    raise ValueError(f"no image (.{', .'.join(IMAGE_SUFFIXES)})")


def _captions(sample: RawSample) -> tuple[list[str], str | None]:
    content: Any = {}
    if "json" in sample:
        try:
            content = json.loads(sample["json"])
        except ValueError as error:
            raise ValueError(f".json is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f".json holds no object but {short(content)}")
    captions = content.get("caption")
    if captions is None and "txt" in sample:
        captions = sample["txt"].decode("utf-8")
    image_id = content.get("image_id")
    return texts(captions, "caption", []), None if image_id in (None, "") else str(image_id)
