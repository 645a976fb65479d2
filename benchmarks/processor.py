"""Row 5: the strong image processor of ours against LAVIS's blip_image_train, JPEG to tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import softmask_plugin  # noqa: F401  (first: it makes `import lavis` work)

# isort: split
import numpy as np
import torch
from lavis.processors.blip_processors import BlipImageTrainProcessor
from PIL import Image

from benchmarks.harness import Row, alternate, compare, timed
from softmask_plugin.datasets.caption_files import read_captions
from softmask_plugin.datasets.images import open_rgb
from softmask_plugin.processors.image import ImageTrainProcessor

SIZE = 256  # pixels, of the result
LARGE = (640, 480)  # pixels, COCO's usual


def photos(folder: Path, captions: str | None, count: int) -> dict[str, list[Path]]:
    """JPEG files by kind: those of a caption file as they are, and of COCO's size.

    A caption file names its images relative to its own folder. Without one the photos show smooth
    random colours, which JPEG takes for a photo.
    """
    if captions is not None:
        rows = read_captions(captions, "val")[:count]
        small = [Path(captions).parent / row.image for row in rows]
        pictures = [Image.open(path).convert("RGB") for path in small]
    else:
        generator = np.random.default_rng(0)
        coarse = generator.integers(0, 256, (count, 24, 32, 3), dtype=np.uint8)
        pictures, small = [Image.fromarray(pixels) for pixels in coarse], []
    large = [folder / f"{i}.jpg" for i in range(count)]
    for picture, path in zip(pictures, large, strict=True):
        picture.resize(LARGE, Image.Resampling.BICUBIC).save(path, quality=90)
    return {"as they are": small, "640 x 480": large} if small else {"640 x 480": large}


def run(small: bool, captions: str | None, rounds: int) -> list[Row]:
    """Measure a row for each kind of photo; one process, one thread, as in a loader's worker."""
    ours = ImageTrainProcessor(image_size=SIZE)
    lavis = BlipImageTrainProcessor(image_size=SIZE)
    threads, count = torch.get_num_threads(), 32 if small else 256
    torch.set_num_threads(1)
    rows = []
    try:
        with TemporaryDirectory() as folder:
            for kind, paths in photos(Path(folder), captions, count).items():
                subjects: dict[str, Callable[[], float]] = {
                    "ours": lambda paths=paths: timed(
                        lambda: [ours(open_rgb(path, ours.min_side)) for path in paths]
                    ),
                    "lavis": lambda paths=paths: timed(
                        lambda: [lavis(Image.open(path).convert("RGB")) for path in paths]
                    ),
                }
                times = alternate(subjects, rounds, f"processors, {kind}")
                speeds = [[count / t for t in times[name]] for name in ("ours", "lavis")]
                name = f"strong image processor, JPEGs {kind}"
                rows.append(compare(name, "images/s", *speeds, target=1.0, higher_is_better=True))
    finally:
        torch.set_num_threads(threads)
    return rows
