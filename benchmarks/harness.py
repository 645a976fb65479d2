"""Side-by-side timing: two subjects take turns, so that a busy machine slows both alike."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from softmask_plugin.ablate.table import markdown_table
from softmask_plugin.check import now
from softmask_plugin.files.whole import write_json
from softmask_plugin.host.environment import environment


@dataclass(frozen=True)
class Row:
    """One line of the table: ours against another, and a target for their ratio."""

    name: str
    unit: str
    ours: float  # median
    other: float  # median
    target: float | None = None  # largest ratio allowed; the smallest if higher_is_better
    higher_is_better: bool = False
    ratios: tuple[float, ...] = ()  # of the single turns
    note: str = ""

    @property
    def ratio(self) -> float:
        """Ours over the other: the median of the turns."""
        return statistics.median(self.ratios) if self.ratios else self.ours / self.other

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is none."""
        if self.target is None:
            return None
        return self.ratio >= self.target if self.higher_is_better else self.ratio <= self.target


@dataclass(frozen=True)
class Cost:
    """Seconds at one point of an axis, such as "batch" at 8."""

    axis: str
    value: int
    seconds: float


def alternate(
    subjects: dict[str, Callable[[], float]], rounds: int, title: str
) -> dict[str, list[float]]:
    """Let subjects take turns, one call each per round; return their durations by name, in seconds.

    A subject does its work once and returns the duration. The first round does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in tqdm(range(rounds + 1), desc=title, unit="round", leave=False):
        for name, subject in subjects.items():
            seconds = subject()
            if turn:
                times[name].append(seconds)
    return times


def compare(name: str, unit: str, ours: list[float], other: list[float], **row: Any) -> Row:
    """A row from two lists of measurements that were taken in turns."""
    ratios = tuple(a / b for a, b in zip(ours, other, strict=True))
    medians = statistics.median(ours), statistics.median(other)
    return Row(name, unit, *medians, ratios=ratios, **row)


def timed(work: Callable[[], Any]) -> float:
    """Duration of ``work`` in seconds, its work on a GPU included."""
    start = now()
    work()
    return now() - start


class Worker:
    """An object in a process of its own, so that its memory can be measured; the process must be
    able to import ``factory``, which makes it."""

    def __init__(self, factory: Callable[..., Any], *arguments: Any) -> None:
        self.process = ProcessPoolExecutor(
            1,
            multiprocessing.get_context("spawn"),
            initializer=_make,
            initargs=(torch.get_num_threads(), factory, *arguments),
        )

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method and wait for its result."""
        return self.process.submit(_call, method, *arguments).result()

    def close(self) -> None:
        """End the process."""
        self.process.shutdown()


_subject: Any = None  # of a worker's process


def _make(threads: int, factory: Callable[..., Any], *arguments: Any) -> None:
    global _subject
    torch.set_num_threads(threads)
    _subject = factory(*arguments)


def _call(method: str, *arguments: Any) -> Any:
    return getattr(_subject, method)(*arguments)


def peak_memory() -> float:
    """Peak memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def tensor_peak(work: Callable[[], Any], kept: Sequence[torch.Tensor]) -> float:
    """Peak memory of tensors during ``work``, in GiB, by torch's allocator; those in ``kept`` exist
    before and after it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return (sum(storages.values()) + max(itertools.accumulate(changes))) / 2**30


def machine() -> dict[str, Any]:
    """What the figures depend on: date, hardware and versions."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), **environment(device)}


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = []
    for row in rows:
        spread = f" ({min(row.ratios):.3f} to {max(row.ratios):.3f})" if len(row.ratios) > 1 else ""
        sign = "≥" if row.higher_is_better else "≤"
        verdict = {None: "", True: "met", False: "missed"}[row.met]
        lines.append(
            [
                row.name,
                f"{row.ours:.4g} {row.unit}",
                f"{row.other:.4g} {row.unit}",
                f"{row.ratio:.3f}{spread}",
                "" if row.target is None else f"{sign} {row.target:g}",
                "; ".join(filter(None, (verdict, row.note))),
            ]
        )
    head = ["what", "ours", "against", "ratio (of turns: least to greatest)", "target", ""]
    return markdown_table(head, lines)


def grid(costs: Sequence[Cost]) -> str:
    """The costs as a Markdown table, one row per axis."""
    points: dict[str, list[str]] = {}
    for cost in costs:
        points.setdefault(cost.axis, []).append(f"{cost.value}: {cost.seconds:.3g}")
    lines = ([axis, ", ".join(values)] for axis, values in points.items())
    return markdown_table(["axis", "seconds at each value"], lines)


def save(rows: Sequence[Row], costs: Sequence[Cost], path: Path, settings: dict[str, Any]) -> None:
    """Write the measurements, the machine and the settings as JSON."""
    content = {
        "machine": machine(),
        "settings": settings,
        "rows": [{**asdict(row), "ratio": row.ratio, "met": row.met} for row in rows],
        "costs": [asdict(cost) for cost in costs],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
