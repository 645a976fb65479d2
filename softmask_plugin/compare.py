"""``softmask compare``: are two runs different on the same items?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from softmask_plugin.errors import UserError, reason_of
from softmask_plugin.foil_metrics import Result, item_scores, units_of
from softmask_plugin.pointing import group_suffixes
from softmask_plugin.report.records import best_epoch, read_metrics

RESAMPLES = 2000

Results = dict[str, Result]  # of a run, by the item's id


@dataclass(frozen=True)
class Kind:
    """What the results of a task hold of each item."""

    name: str
    keys: frozenset[str]  # by which they are known
    same: tuple[str, ...]  # of these, both runs must say the same of an item
    scores: Callable[[list[Result]], dict[str, np.ndarray]]  # by metric, (N,), in [0, 1]


def _classes(results: list[Result]) -> dict[str, np.ndarray]:
    return {"acc": np.array([float(row["prediction"] == row["target"]) for row in results])}


def _grounding(results: list[Result]) -> dict[str, np.ndarray]:
    columns = {"acc": "acc", "pointing": "hit", "pointing_other": "other"}
    return {
        name: np.array([float(row[key]) for row in results])
        for name, key in columns.items()
        if key in results[0]  # phrases have no acc
    }


KINDS = (
    Kind(
        "softmask_foils",
        frozenset({"itm", "itc", "image", "group"}),
        ("image", "caption", "foil", "group"),
        item_scores,
    ),
    Kind(
        "softmask_grounding",
        frozenset({"hit", "other"}),
        ("image", "text", "phrase", "group"),
        _grounding,
    ),
    Kind("multimodal_classification", frozenset({"prediction", "target"}), ("target",), _classes),
)


@dataclass(frozen=True)
class Difference:
    """One metric of two runs on the same N items, in percent.

    Attributes:
        first, second: Means.
        low, high: Bootstrap 95% interval of ``second - first``: percentiles over resamples of the
            units that are independent, such as images. None for a single unit.
        worse, better: On how many items the second run scores lower and higher.
        p: McNemar's exact test of these two counts. It takes items as independent. None for
            metrics that are no counts, such as probabilities.
    """

    metric: str
    items: int
    first: float
    second: float
    low: float | None
    high: float | None
    worse: int
    better: int
    p: float | None


def compare(first: str | Path, second: str | Path, split: str = "test") -> list[Difference]:
    """Compare the saved results of two runs, item by item.

    Args:
        first, second: Folders of runs of the task ``softmask_foils``, ``softmask_grounding`` or
            ``multimodal_classification``.
        split: The split to compare.

    Raises:
        UserError: A folder has no such results, or the runs have other items or other tasks.
    """
    (kind, one), (other_kind, two) = (_read(Path(folder), split) for folder in (first, second))
    if kind is not other_kind:
        raise UserError(f"{first} is a run of {kind.name}, {second} one of {other_kind.name}")
    if one.keys() != two.keys():
        example = min(one.keys() ^ two.keys())
        raise UserError(
            f"{first} and {second} do not share their items: {len(one)} and {len(two)}, "
            f"and only one has item {example}"
        )
    for item in one:
        for key in kind.same:
            if one[item].get(key) != two[item].get(key):
                a, b = (repr(each[item].get(key)) for each in (one, two))
                raise UserError(
                    f"{first} and {second} do not share their items: {key} of item {item} is "
                    f"{a:.80} and {b:.80}"
                )
    pairs = [one[item] for item in one], [two[item] for item in one]
    before, after = map(kind.scores, pairs)
    units = units_of(pairs[0])
    return [
        _difference(metric + suffix, before[metric][rows], after[metric][rows], units[rows])
        for suffix, rows in _parts(pairs[0])
        for metric in before
    ]


def table(differences: list[Difference]) -> str:
    """The differences in lines of a console."""
    head = ["metric", "items", "first", "second", "difference", "95% interval", "worse", "better"]
    rows = [[*head, "p"]]
    for each in differences:
        interval = "" if each.low is None else f"{each.low:+.2f} to {each.high:+.2f}"
        means = f"{each.first:.2f}", f"{each.second:.2f}", f"{each.second - each.first:+.2f}"
        counts = str(each.worse), str(each.better)
        p = "" if each.p is None else f"{each.p:.2g}"
        rows.append([each.metric, str(each.items), *means, interval, *counts, p])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def _parts(results: list[Result]) -> Iterator[tuple[str, Any]]:
    """All results, then those of each group, with the suffix of their metrics."""
    yield "", slice(None)
    suffixes = [group_suffixes(row.get("group")) for row in results]
    for suffix in sorted({each for own in suffixes for each in own}):
        yield suffix, np.array([suffix in own for own in suffixes])


def _read(run: Path, split: str) -> tuple[Kind, Results]:
    """The results of a split: those of the best epoch, if each has a file, or else the newest."""
    if not run.is_dir():
        raise UserError(f"there is no folder {run}: give that of a run")
    files = [file for file in (run / "result").glob(f"{split}_*.json") if "_rank" not in file.stem]
    log = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    best = f"{split}_epoch{best_epoch(log, split)}"
    for file in sorted(files, key=lambda f: (f.stem == best, f.stat().st_mtime), reverse=True):
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {file}: {reason_of(error)}") from error
        known = {*rows[0]} if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
        for kind in KINDS:
            if {"instance_id", *kind.keys} <= {*known}:
                return kind, {str(row["instance_id"]): row for row in rows}
    names = ", ".join(kind.name for kind in KINDS)
    raise UserError(f"{run} has no results of each item of split '{split}', as {names} save them")


def _difference(metric: str, first: Any, second: Any, units: np.ndarray) -> Difference:
    change, whole = second - first, {0.0, 0.5, 1.0}
    worse, better = int((change < 0).sum()), int((change > 0).sum())
    p = None
    if whole.issuperset({*first, *second}):
        p = scipy.stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    low, high = _interval(change, units)
    means = 100 * float(first.mean()), 100 * float(second.mean())
    return Difference(metric, len(change), *means, low, high, worse, better, p)


def _interval(change: np.ndarray, units: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    _, unit = np.unique(units, return_inverse=True)
    sums, counts = np.bincount(unit, change), np.bincount(unit)
    if len(counts) < 2:
        return None, None
    rng = np.random.default_rng(0)
    draws = (rng.integers(len(counts), size=len(counts)) for _ in range(RESAMPLES))
    means = [sums[drawn].sum() / counts[drawn].sum() for drawn in draws]
    low, high = np.percentile(means, [2.5, 97.5])
    return 100 * float(low), 100 * float(high)
