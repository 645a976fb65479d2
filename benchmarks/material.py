"""Models, captions and images for the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image

from softmask_plugin.config.options import read_options
from softmask_plugin.datasets.tables.captions import parse_captions
from softmask_plugin.models.aligned import AlignedBase
from softmask_plugin.models.pretrain import SoftMaskPretrain

# Words per caption in Flickr8k: the middles of twenty equal shares of 5,000 captions
WORDS = (6, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 15, 15, 17, 18, 21)

SMALL: dict[str, Any] = {
    "image_size": 64,
    "vit": {"patch_size": 16, "width": 64, "depth": 3, "heads": 4},
    "bert": {
        "vocab_size": 500,
        "width": 64,
        "layers": 6,
        "heads": 4,
        "intermediate": 256,
        "fusion_layer": 3,
    },
    "embed_dim": 32,
    "queue_size": 256,
}


def build(
    small: bool, captions: str | None, cls: Any = SoftMaskPretrain, **changes: Any
) -> AlignedBase:
    """A model with random weights, of size base or small and with ``changes`` of its options. Its
    vocabulary is made from a caption file; None: it is that of the scenes."""
    torch.manual_seed(0)
    given: Any = {"tokenizer": captions or "scenes", **(SMALL if small else {})}
    return cls(read_options(cls.OPTIONS, OmegaConf.merge(given, changes)))


def texts(
    model: AlignedBase, captions: str | None, count: int, words: int | None = None
) -> list[str]:
    """The first ``count`` captions of a file. Without one, captions of random words that the model
    knows, ``words`` in each; None: as many as drawn from WORDS."""
    if captions is not None:
        found = [c for item in parse_captions(captions, "val") for c in item["caption"]]
        return [found[i % len(found)] for i in range(count)]
    generator = torch.Generator().manual_seed(0)
    known = sorted(w for w in model.tokenizer.get_vocab() if w.isalpha())

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    lengths = [words or WORDS[draw(len(WORDS))] for _ in range(count)]
    return [" ".join(known[draw(len(known))] for _ in range(length)) for length in lengths]


def photos(captions: str | None, count: int) -> list[Image.Image]:
    """The first images of a caption file, which lie beside it; without one, random colours."""
    if captions is not None:
        rows = parse_captions(captions, "val")[:count]
        return [Image.open(Path(captions).parent / row["image"]).convert("RGB") for row in rows]
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (count, 24, 32, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in coarse]


def write_jpegs(pictures: list[Image.Image], folder: Path) -> list[Path]:
    """Write ``0.jpg``, ``1.jpg``, ... in COCO's usual size, 640 x 480."""
    paths = [folder / f"{i}.jpg" for i in range(len(pictures))]
    for picture, path in zip(pictures, paths, strict=True):
        picture.resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)
    return paths


def batch(model: AlignedBase, captions: list[str], step: int, device: str = "cpu") -> dict:
    """A batch with random images, as LAVIS's tasks pass it to a model."""
    size = model.options.image_size
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(len(captions), 3, size, size, generator=generator)
    progress = {"epoch": 0, "iters": step, "num_iters_per_epoch": 1000}
    ids = torch.arange(len(captions), device=device)
    return {"image": images.to(device), "text_input": captions, "image_id": ids, **progress}
