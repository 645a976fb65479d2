"""Row 5: our strong image processor against LAVIS's blip_image_train, from JPEG to tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lavis.processors.blip_processors import BlipImageTrainProcessor
from PIL import Image

from benchmarks.harness import Row, alternate, compare, timed
from benchmarks.material import photos, write_jpegs
from softmask_plugin.datasets.images import open_rgb
from softmask_plugin.datasets.tables.captions import parse_captions
from softmask_plugin.processors.image import ImageTrainProcessor

SIZE = 256  # pixels of the result


def run(small: bool, captions: str | None, rounds: int) -> list[Row]:
    """Measure a row for each kind of photo, with one thread, as in a data-loader worker."""
    ours = ImageTrainProcessor(image_size=SIZE)
    lavis = BlipImageTrainProcessor(image_size=SIZE)
    threads, count = torch.get_num_threads(), 32 if small else 256
    torch.set_num_threads(1)
    rows = []
    try:
        with TemporaryDirectory() as folder:
            large = write_jpegs(photos(captions, count), Path(folder))
            kinds = [("of 640 x 480", large, 1.5)]
            if captions is not None:
                parsed = parse_captions(captions, "val")[:count]
                own = [Path(captions).parent / row["image"] for row in parsed]
                kinds.append(("as they are", own, 1.0))
            for kind, paths, target in kinds:
                subjects: dict[str, Callable[[], float]] = {
                    "ours": lambda paths=paths: timed(
                        lambda: [ours(open_rgb(path, ours.min_side)) for path in paths]
                    ),
                    "lavis": lambda paths=paths: timed(
                        lambda: [lavis(Image.open(path).convert("RGB")) for path in paths]
                    ),
                }
                times = alternate(subjects, rounds, f"processors, {kind}")
                speeds = [[len(paths) / t for t in times[name]] for name in ("ours", "lavis")]
                name = f"strong image processor, JPEGs {kind}"
                rows.append(
                    compare(name, "images/s", *speeds, target=target, higher_is_better=True)
                )
    finally:
        torch.set_num_threads(threads)
    return rows
