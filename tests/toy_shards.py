"""Small shards, their streams, and samples in a comparable form."""

from __future__ import annotations

import io
import json
import random
import tarfile
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import torch
import toy_builders
from PIL import Image
from torch.utils.data import DataLoader

from softmask_plugin.datasets.shards.stream import ShardStream

SHARDS, PER_SHARD = 8, 5


def picture(number: int = 0) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (6, 6), (number % 256, 40, 200)).save(data, "PNG")
    return data.getvalue()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def good(*keys: str) -> dict[str, bytes]:
    members = {}
    for number, key in enumerate(keys):
        members |= {f"{key}.png": picture(number), f"{key}.txt": f"picture {key}".encode()}
    return members


def write_shards(folder: Path) -> list[Path]:
    """Shards of five samples with two captions each."""
    for shard in range(SHARDS):
        members = {}
        for number in range(PER_SHARD):
            key = f"{shard}_{number}"
            members[f"{key}.png"] = picture(10 * shard + number)
            members[f"{key}.json"] = json.dumps({"caption": [f"a {key}", f"the {key}"]}).encode()
        write_tar(folder / f"{shard:05d}.tar", members)
    return sorted(folder.glob("*.tar"))


def draw(image: Image.Image) -> torch.Tensor:
    """A processor that returns the image's red value and three random draws, (4,)."""
    drawn = [float(torch.rand(())), np.random.rand(), random.random()]
    return torch.tensor([image.getpixel((0, 0))[0], *drawn], dtype=torch.float64)


def same(text: str) -> str:
    return text


def make(shards, **options) -> ShardStream:
    return ShardStream(shards, len(shards) * PER_SHARD, draw, same, **{"shuffle": 3, **options})


def build(*options: str) -> dict:
    return toy_builders.build("caption_shards", "vis_processor.train.image_size=8", *options)


def plain(sample: dict) -> tuple:
    """A sample in a comparable form."""
    return tuple(v.tolist() if isinstance(v, torch.Tensor) else v for v in sample.values())


def ids(samples) -> list[str]:
    return [sample["instance_id"] for sample in samples]


def one_pass(stream: ShardStream, number: int = 0, workers: int = 0) -> list[dict]:
    """This process's samples of a pass; with workers, those among each one's first samples."""
    if not workers:
        samples = iter(stream)
        first = next(s for s in samples if int(s["position"][1]) == number)
        return [first, *takewhile(lambda s: int(s["position"][1]) == number, samples)]
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    taken = islice(loader, 3 * workers * PER_SHARD * -(-SHARDS // workers))
    return [sample for sample in taken if int(sample["position"][1]) == number]


def through_checkpoint(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)
