"""Side-by-side timing: two subjects take turns, so that a busy machine slows both alike."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm


@dataclass(frozen=True)
class Row:
    """One line of the table: ours against another, and what their ratio is to be.

    Attributes:
        name: what was compared.
        unit: of ``ours`` and ``other``.
        ours, other: medians.
        target: what the ratio should not exceed, or, with ``higher_is_better``, not fall below.
        ratios: of the single turns, where there were several.
        note: what a reader should know besides.
    """

    name: str
    unit: str
    ours: float
    other: float
    target: float | None = None
    higher_is_better: bool = False
    ratios: tuple[float, ...] = ()
    note: str = ""

    @property
    def ratio(self) -> float:
        """Ours over the other: the median of the turns."""
        return statistics.median(self.ratios) if self.ratios else self.ours / self.other

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if self.target is None:
            return None
        return self.ratio >= self.target if self.higher_is_better else self.ratio <= self.target


@dataclass(frozen=True)
class Cost:
    """Seconds at one point of an axis, such as 8 of ``batch``."""

    axis: str
    value: int
    seconds: float


def alternate(
    subjects: dict[str, Callable[[], float]], rounds: int, title: str
) -> dict[str, list[float]]:
    """Call each subject once per round, in turn, after a first round that is not counted.

    Args:
        subjects: functions by name that do the work once and return its duration, seconds.
        rounds: how many turns each one gets.
        title: of the progress bar.

    Returns:
        Durations by name, in the order of the rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in tqdm(range(rounds + 1), desc=title, unit="round", leave=False):
        for name, subject in subjects.items():
            seconds = subject()
            if turn:
                times[name].append(seconds)
    return times


def compare(name: str, unit: str, ours: list[float], other: list[float], **row: Any) -> Row:
    """A row of two lists of measurements that were taken in turns."""
    ratios = tuple(a / b for a, b in zip(ours, other, strict=True))
    medians = statistics.median(ours), statistics.median(other)
    return Row(name, unit, *medians, ratios=ratios, **row)


def timed(work: Callable[[], Any]) -> float:
    """Seconds that ``work`` takes, to the end of what it left to a GPU."""
    start = now()
    work()
    return now() - start


def now() -> float:
    """The clock in seconds, once a GPU has done all that was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Worker:
    """An object in a process of its own, so that its memory can be told from the other's.

    Args:
        factory: makes the object; a function that the process can import.
        arguments: of ``factory``.
    """

    def __init__(self, factory: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        threads = torch.get_num_threads()
        self.process = context.Process(
            target=_serve, args=(theirs, threads, factory, *arguments), daemon=True
        )
        self.process.start()
        theirs.close()  # so that a worker that dies ends the wait for its answer

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method there and wait for its result."""
        self.pipe.send((method, arguments))
        return self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join()


def _serve(pipe: Any, threads: int, factory: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(threads)
    subject = factory(*arguments)
    for method, given in iter(pipe.recv, None):
        pipe.send(getattr(subject, method)(*given))


def peak_memory() -> float:
    """Most memory that this process ever had, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def tensor_peak(work: Callable[[], Any], kept: Sequence[torch.Tensor]) -> float:
    """Most memory of tensors while ``work`` runs, GiB, as torch's allocator counts it.

    Args:
        work: what to measure.
        kept: tensors that are there before and after it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return (sum(storages.values()) + max(itertools.accumulate(changes))) / 2**30


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| what | ours | against | ratio (of turns: least to greatest) | target | |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f" ({min(row.ratios):.3f} to {max(row.ratios):.3f})" if len(row.ratios) > 1 else ""
        sign = "≥" if row.higher_is_better else "≤"
        target = "" if row.target is None else f"{sign} {row.target:g}"
        verdict = {None: "", True: "met", False: "missed"}[row.met]
        lines.append(
            f"| {row.name} | {row.ours:.4g} {row.unit} | {row.other:.4g} {row.unit} | "
            f"{row.ratio:.3f}{spread} | {target} | {'; '.join(filter(None, (verdict, row.note)))} |"
        )
    return "\n".join(lines)


def grid(costs: Sequence[Cost]) -> str:
    """The costs as a Markdown table, an axis a row."""
    lines = ["| axis | seconds at each value |", "|---|---|"]
    for axis in dict.fromkeys(cost.axis for cost in costs):
        points = [f"{c.value}: {c.seconds:.3g}" for c in costs if c.axis == axis]
        lines.append(f"| {axis} | {', '.join(points)} |")
    return "\n".join(lines)


def save(rows: Sequence[Row], costs: Sequence[Cost], path: Path, settings: dict[str, Any]) -> None:
    """Write what was measured, with the machine and the settings, as JSON."""
    content = {
        "machine": machine(),
        "settings": settings,
        "rows": [{**asdict(row), "ratio": row.ratio, "met": row.met} for row in rows],
        "costs": [asdict(cost) for cost in costs],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
