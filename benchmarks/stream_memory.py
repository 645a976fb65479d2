"""Does memory stay flat while shards are streamed? ``python -m benchmarks.stream_memory``.

Small photos with captions, some of them broken, are written into shards and streamed many times, as
in training. Everything runs in this process, whose resident memory is recorded: shuffle buffer,
decoder, image processor, batches, and the log of skipped samples.
"""

from __future__ import annotations

import argparse
import io
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import webdataset as wds
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.harness import machine
from softmask_plugin.datasets.shards.stream import ShardStream
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.files.whole import write_json
from softmask_plugin.processors import CaptionProcessor, ImageTrainProcessor

BATCH = 50
WARM_UP = 0.1  # share of the stream after which memory must no longer grow
BROKEN = 100  # one in this many samples is truncated


@dataclass
class Setting:
    """How much is streamed."""

    shards: int = 40
    per_shard: int = 1000  # samples
    samples: int = 200_000  # to stream
    shuffle: int = 500  # samples in the shuffle buffer


SMALL = Setting(shards=4, per_shard=100, samples=4000, shuffle=50)


@dataclass
class Result:
    """Resident memory over a stream."""

    setting: Setting
    samples: list[int] = field(default_factory=list)  # streamed until each measurement
    mib: list[float] = field(default_factory=list)  # the measurements
    streamed_mib: float = 0.0  # size of the shards that were streamed
    broken: int = 0  # lines in the log of skipped samples
    seconds: float = 0.0

    def at(self, share: float) -> float:
        """The last measurement within a share of the stream."""
        last = max(i for i, n in enumerate(self.samples) if n <= share * self.samples[-1])
        return self.mib[last]

    @property
    def growth(self) -> float:
        """MiB between the end of the warm-up and the highest measurement after it."""
        warm_up = WARM_UP * self.samples[-1]
        warm = [m for n, m in zip(self.samples, self.mib, strict=True) if n >= warm_up]
        return max(warm) - warm[0]


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def write_shards(folder: Path, setting: Setting) -> None:
    """Write shards of photos of 96 x 96 pixels (low-frequency noise, about 2 KiB)."""
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


def measure(setting: Setting, times: int = 200) -> Result:
    """Stream, and measure the memory this many times."""
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
        every = max(1, steps // times)
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
    """The result in words."""
    setting = result.setting
    shares = (WARM_UP, 0.25, 0.5, 0.75, 1.0)
    lines = [
        ", ".join(f"{key} {value}" for key, value in machine().items()),
        f"{result.samples[-1]} samples of {setting.shards} shards with {setting.per_shard} each "
        f"({setting.samples / setting.shards / setting.per_shard:.1f} passes, "
        f"{result.streamed_mib:.0f} MiB of shards, {result.broken} broken samples logged), "
        f"{result.seconds:.0f} s",
        *(f"{100 * share:4.0f}% of the stream: {result.at(share):7.1f} MiB" for share in shares),
        f"growth after the warm-up: {result.growth:.1f} MiB at most",
    ]
    return "\n".join(lines)


def plot(result: Result, file: Path) -> None:
    """Draw resident memory over samples."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(result.samples, result.mib)
    axes.axvline(WARM_UP * result.samples[-1], color="grey", linestyle=":", label="warm-up")
    highest = 1.2 * max(result.mib)
    axes.set(xlabel="samples streamed", ylabel="resident memory, MiB", ylim=(0, highest))
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=120)


def main() -> None:
    """Measure and print; write JSON and a plot if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream_memory", description=__doc__)
    parser.add_argument("--small", action="store_true", help="a trial of seconds")
    parser.add_argument("--output", type=Path, help="folder for stream_memory.json and .png")
    arguments = parser.parse_args()
    result = measure(SMALL if arguments.small else Setting())
    print(report(result))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        content = {**asdict(result), "growth": result.growth}
        write_json(arguments.output / "stream_memory.json", content)
        plot(result, arguments.output / "stream_memory.png")


if __name__ == "__main__":
    main()
