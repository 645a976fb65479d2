"""Whether memory stays flat while shards are streamed: ``python -m benchmarks.stream_memory``.

Small photos with captions are packed into shards, some of them broken, and streamed as training
does it, many times over. All of it happens in this process, whose resident memory is read as it
goes: the shuffle buffer, the decoder, the image processor, batches and the log of what is skipped.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import softmask_plugin  # noqa: F401  (first: it makes `import lavis` work)

# isort: split
import numpy as np
import webdataset as wds
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.harness import machine
from softmask_plugin.datasets.shards.stream import ShardStream
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.processors import CaptionProcessor, ImageTrainProcessor

BATCH = 50
WARM_UP = 0.1  # share of the stream after which memory must not grow any more
BROKEN = 100  # every so many samples one is cut short


@dataclass
class Setting:
    """How much is streamed.

    Attributes:
        shards, per_shard: what is on disk.
        samples: how many are streamed.
        shuffle: samples in the shuffle buffer.
    """

    shards: int = 40
    per_shard: int = 1000
    samples: int = 200_000
    shuffle: int = 500


SMALL = Setting(shards=4, per_shard=100, samples=4000, shuffle=50)


@dataclass
class Result:
    """Resident memory over a stream.

    Attributes:
        setting: what was streamed.
        samples: how many were by each reading.
        mib: the readings.
        streamed_mib: bytes of the images that were decoded.
        broken: lines in the log of what was skipped.
        seconds: what it took.
    """

    setting: Setting
    samples: list[int] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)
    streamed_mib: float = 0.0
    broken: int = 0
    seconds: float = 0.0

    def at(self, share: float) -> float:
        """The last reading within a share of the stream."""
        last = max(i for i, n in enumerate(self.samples) if n <= share * self.samples[-1])
        return self.mib[last]

    @property
    def growth(self) -> float:
        """MiB between the end of the warm-up and the largest reading after it."""
        warm_up = WARM_UP * self.samples[-1]
        warm = [m for n, m in zip(self.samples, self.mib, strict=True) if n >= warm_up]
        return max(warm) - warm[0]


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def write_shards(folder: Path, setting: Setting) -> None:
    """Shards of photos of 96 x 96 pixels (noise of low frequency, about 2 KiB)."""
    for shard in range(setting.shards):
        with (folder / f"{shard:05d}.tar").open("wb") as file, wds.TarWriter(file) as writer:
            for number in range(setting.per_shard):
                rng = np.random.default_rng((shard, number))
                noise = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
                data = io.BytesIO()
                noise.resize((96, 96), Image.Resampling.BICUBIC).save(data, "JPEG")
                whole = data.getvalue()
                image = whole[:-200] if number % BROKEN == 0 else whole
                caption = f"photo number {number} of shard {shard}"
                writer.write({"__key__": f"{number:06d}", "jpg": image, "txt": caption})


def measure(setting: Setting, readings: int = 200) -> Result:
    """Stream, and read the memory so many times."""
    result = Result(setting)
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, setting)
        shards = sorted(folder.glob("*.tar"))
        stream = ShardStream(
            shards,
            items=setting.shards * setting.per_shard,
            vis_processor=ImageTrainProcessor(image_size=64),
            text_processor=CaptionProcessor(),
            shuffle=setting.shuffle,
            skipped=SkipLog(folder / "skipped.log"),
        )
        loader: Iterator[object] = iter(DataLoader(stream, BATCH))
        start, steps = time.perf_counter(), setting.samples // BATCH
        every = max(1, steps // readings)
        for step, _ in enumerate(tqdm(islice(loader, steps), "streaming", steps), 1):
            if step % every == 0:
                result.samples.append(step * BATCH)
                result.mib.append(round(resident_mib(), 2))
        result.seconds = round(time.perf_counter() - start, 1)
        passes = setting.samples / (setting.shards * setting.per_shard)
        result.streamed_mib = round(passes * sum(s.stat().st_size for s in shards) / 2**20)
        result.broken = len((folder / "skipped.log").read_text().splitlines())
    return result


def report(result: Result) -> str:
    """What was measured, in words."""
    setting = result.setting
    shares = (WARM_UP, 0.25, 0.5, 0.75, 1.0)
    lines = [
        ", ".join(f"{key} {value}" for key, value in machine().items()),
        f"{result.samples[-1]} samples of {setting.shards} shards with {setting.per_shard} each "
        f"({setting.samples / setting.shards / setting.per_shard:.1f} passes, "
        f"{result.streamed_mib:.0f} MiB of shards read, {result.broken} broken samples named), "
        f"{result.seconds:.0f} s",
        *(f"{100 * share:4.0f}% of the stream: {result.at(share):7.1f} MiB" for share in shares),
        f"growth after the warm-up, at most: {result.growth:.1f} MiB",
    ]
    return "\n".join(lines)


def plot(result: Result, file: Path) -> None:
    """Resident memory against samples."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(result.samples, result.mib)
    axes.axvline(WARM_UP * result.samples[-1], color="grey", linestyle=":", label="warm-up")
    highest = 1.2 * max(result.mib)
    axes.set(xlabel="samples streamed", ylabel="resident memory, MiB", ylim=(0, highest))
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=120)


def main() -> None:
    """Measure, print, and write a JSON and a plot where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream_memory", description=__doc__)
    parser.add_argument("--small", action="store_true", help="a trial of seconds")
    parser.add_argument("--samples", type=int, help="how many to stream")
    parser.add_argument("--output", type=Path, help="folder of stream_memory.json and .png")
    arguments = parser.parse_args()
    setting = SMALL if arguments.small else Setting()
    if arguments.samples:
        setting = Setting(setting.shards, setting.per_shard, arguments.samples, setting.shuffle)
    result = measure(setting)
    print(report(result))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        content = json.dumps({**asdict(result), "growth": result.growth})
        (arguments.output / "stream_memory.json").write_text(content)
        plot(result, arguments.output / "stream_memory.png")


if __name__ == "__main__":
    main()
