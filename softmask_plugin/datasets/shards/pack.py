"""Pack a folder of images and a file of captions into WebDataset shards."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import chain, count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import webdataset as wds
from tqdm import tqdm

from softmask_plugin.datasets.images import IMAGE_SUFFIXES, UnreadableImageError, open_rgb
from softmask_plugin.datasets.shards.files import INDEX
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.datasets.tables.captions import parse_captions
from softmask_plugin.datasets.tables.layouts import TableOptions
from softmask_plugin.errors import UserError
from softmask_plugin.files.whole import write_json


def pack_shards(
    captions: str | Path, images: str | Path, out: str | Path, per_shard: int = 1000, seed: int = 42
) -> dict[str, int]:
    """Write ``00000.tar``, ... and ``index.json`` (webdataset's wids layout) into a new folder.

    Images keep their bytes, and the same input gives the same shards, byte for byte. The folder
    appears once all is written. Unreadable images and unusable rows and captions are left out and
    named in the file ``<out>.skipped.log`` beside it.

    Args:
        captions: A caption file for ``parse_captions``; of a Karpathy file, the train split.
        images: The folder that the names in it start from.
        out: The folder for the shards: new or empty.
        per_shard: Samples per shard; the last shard may have fewer.
        seed: Random seed for the order of the images.

    Returns:
        Number of samples, by name of the shard. UserError if an argument is unusable, no image is
        readable, or the disk is full.
    """
    images, out = Path(images).expanduser(), Path(out).expanduser().absolute()
    if per_shard < 1:
        raise UserError(f"--per-shard must be 1 or more, not {per_shard}")
    if not images.is_dir():
        raise UserError(f"--images: there is no folder {images}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out: {out} is not an empty folder: give another, or remove it")
    log = out.with_name(f"{out.name}.skipped.log")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)  # of an earlier attempt
        items = parse_captions(captions, "train", TableOptions(root=images, skipped=SkipLog(log)))
        random.Random(seed).shuffle(items)
        defects: list[str] = []
        # On the same disk, so that the finished folder can be renamed
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as parent:
            folder = Path(parent, out.name)
            folder.mkdir()
            counts = _write(_samples(items, images, defects), folder, per_shard)
            if not counts:
                raise UserError(f"none of the {len(items)} images can be read: {defects[0]}")
            shards = [
                {"url": name, "nsamples": number, "filesize": (folder / name).stat().st_size}
                for name, number in counts.items()
            ]
            about = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": "train"}
            write_json(folder / INDEX, {**about, "shardlist": shards})
            folder.rename(out)
        SkipLog(log).add("unreadable images", defects)
    except OSError as error:
        raise UserError(f"cannot write the shards {out}: {error.strerror or error}") from error
    return counts


def _samples(
    items: list[dict[str, Any]], images: Path, defects: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield numbered samples in webdataset's form; ``defects`` gets a line per unreadable image."""
    number = count()
    for item in tqdm(items, "packing", unit=" images"):
        path = images / item["image"]
        try:
            open_rgb(path, 1)
        except UnreadableImageError as error:
            defects.append(str(error))
            continue
        suffix = path.suffix[1:].lower()
        about = {key: item[key] for key in ("caption", "image_id", "image")}
        yield {
            "__key__": f"{next(number):08d}",
            suffix if suffix in IMAGE_SUFFIXES else "img": path.read_bytes(),
            "json": json.dumps(about).encode(),
        }


def _write(samples: Iterator[dict[str, Any]], folder: Path, per_shard: int) -> dict[str, int]:
    counts: dict[str, int] = {}
    for first in samples:
        name = f"{len(counts):05d}.tar"
        counts[name] = 0
        # An open file, because webdataset would take a name for a URL
        with (folder / name).open("wb") as file, wds.TarWriter(file, encoder=False, mtime=0) as tar:
            for sample in chain([first], islice(samples, per_shard - 1)):
                tar.write(sample)
                counts[name] += 1
    return counts
