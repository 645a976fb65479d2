"""Pack a folder of images and a file of captions into WebDataset shards."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import webdataset as wds
from tqdm import tqdm

from softmask_plugin.datasets.images import UnreadableImageError, open_rgb
from softmask_plugin.datasets.shards.files import IMAGE_SUFFIXES, INDEX, INDEX_KIND
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.datasets.tables.captions import CaptionedImage, read_captions
from softmask_plugin.errors import UserError


def pack_shards(
    captions: str | Path,
    images: str | Path,
    out: str | Path,
    per_shard: int = 1000,
    seed: int = 42,
) -> dict[str, int]:
    """Write ``00000.tar``, ... and ``index.json`` (webdataset's wids layout) into a new folder.

    Images keep their bytes; the same input gives the same shards, byte for byte. The folder appears
    when all is written. Unreadable images, and rows and captions that cannot be used, are left out
    and named in the file ``<out>.skipped.log`` beside it.

    Args:
        captions: a caption file, as ``read_captions`` reads it; of Karpathy's layout, its train
            split.
        images: the folder that the names in it start from.
        out: the folder of the shards: a new or an empty one.
        per_shard: samples per shard; the last one has what is left.
        seed: of the order in which images are packed.

    Returns:
        Samples by shard.

    Raises:
        UserError: an argument cannot be used, no image is readable, or the disk is full.
    """
    images, out = Path(images).expanduser(), Path(out).expanduser().absolute()
    if per_shard < 1:
        raise UserError(f"--per-shard must be 1 or more, not {per_shard}")
    if not images.is_dir():
        raise UserError(f"--images: there is no folder {images}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out: {out} exists and is no empty folder: give a new one, or remove it")
    left_out = out.with_name(f"{out.name}.skipped.log")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        left_out.unlink(missing_ok=True)  # of an earlier attempt
        items = read_captions(captions, "train", SkipLog(left_out))
        random.Random(seed).shuffle(items)
        defects: list[str] = []
        # on the same disk, so that the finished folder only changes its name
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as parent:
            folder = Path(parent, out.name)
            folder.mkdir()
            counts = _write(_samples(items, images, defects), folder, per_shard)
            if not sum(counts.values()):
                raise UserError(f"none of the {len(items)} images can be read: {defects[0]}")
            _write_index(folder, counts)
            folder.rename(out)
        SkipLog(left_out).add("unreadable images", defects)
    except OSError as error:
        raise UserError(f"cannot write the shards {out}: {error.strerror or error}") from error
    return counts


def _samples(
    items: list[CaptionedImage], images: Path, defects: list[str]
) -> Iterator[dict[str, Any]]:
    """Samples as webdataset writes them, numbered; ``defects`` gets a line for what is left out."""
    number = 0
    for item in tqdm(items, "packing", unit=" images"):
        path = images / item.image
        try:
            data = _checked_bytes(path)
        except UnreadableImageError as error:
            defects.append(str(error))
            continue
        suffix = path.suffix[1:].lower()
        about = {"caption": item.captions, "image_id": item.image_id, "image": item.image}
        yield {
            "__key__": f"{number:08d}",
            suffix if suffix in IMAGE_SUFFIXES else "img": data,
            "json": json.dumps(about).encode(),
        }
        number += 1


def _checked_bytes(path: Path) -> bytes:
    if not path.is_file():  # a pipe is no image; reading one may hang
        raise UnreadableImageError(f"{path}: no such file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableImageError(f"{path}: {error.strerror}") from error
    open_rgb(path, 1, data)
    return data


def _write(samples: Iterator[dict[str, Any]], folder: Path, per_shard: int) -> dict[str, int]:
    """Write shards into ``folder``; returns samples by shard."""
    counts: dict[str, int] = {}
    with ExitStack() as stack:

        def opened(name: str) -> BinaryIO:  # by ourselves: webdataset would take a name for a URL
            stack.close()
            return stack.enter_context((folder / name).open("wb"))

        writer = wds.ShardWriter(
            "%05d.tar", per_shard, opener=opened, verbose=0, encoder=False, mtime=0
        )
        writer.post = partial(_count, writer, counts)
        with writer:
            for sample in samples:
                writer.write(sample)
    return counts


def _count(writer: Any, counts: dict[str, int], name: str) -> None:
    counts[name] = writer.count


def _write_index(folder: Path, counts: dict[str, int]) -> None:
    shards = [
        {"url": name, "nsamples": number, "filesize": (folder / name).stat().st_size}
        for name, number in counts.items()
    ]
    content = {"__kind__": INDEX_KIND, "wids_version": 1, "name": "train", "shardlist": shards}
    (folder / INDEX).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
