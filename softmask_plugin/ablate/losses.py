"""The losses that training ended with: they tell what a recall hides, such as an ITM that is
still a constant guess, or masked pairs that have become trivial."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping
from pathlib import Path

from softmask_plugin.report import read_metrics

Losses = dict[str, dict[int, float]]  # by term and seed

LEGEND = (
    "Losses that pretraining ended with: mean of the last epoch's log lines, over seeds, and their "
    "range. Those of masked captions are not to be compared with those of clean ones."
)


def last_losses(run_dir: Path) -> dict[str, float]:
    """Each ``loss_<term>`` of a run, by term: the mean of its log's lines of the last epoch."""
    lines = [line for line in read_metrics(run_dir) if line.get("split") == "train"]
    last = [line for line in lines if line["epoch"] == lines[-1]["epoch"]]
    terms = [name for name in last[-1] if name.startswith("loss_")] if last else []
    return {
        name.removeprefix("loss_"): statistics.fmean(line[name] for line in last if name in line)
        for name in terms
    }


def losses_table(table: Mapping[str, Losses]) -> list[str]:
    """Lines of Markdown: how to read the table, and a row for each variant."""
    terms = [*dict.fromkeys(term for losses in table.values() for term in losses)]
    head = [f"| variant | {' | '.join(terms)} | seeds |", "|---" * (len(terms) + 2) + "|"]
    lines = [LEGEND, "", *head]
    for name, losses in table.items():
        values = [losses.get(term, {}).values() for term in terms]
        cells = [mean_and_range(each, 3) if each else "" for each in values]
        seeds = len({seed for by_seed in losses.values() for seed in by_seed})
        lines.append(f"| {name} | {' | '.join(cells)} | {seeds} |")
    return lines


def mean_and_range(values: Collection[float], digits: int) -> str:
    """A cell of a table: the mean over seeds, and from what to what several of them range.

    >>> print(mean_and_range([0.1, 0.3], 2), mean_and_range([0.1], 2), sep=", ")
    0.20 (0.10 to 0.30), 0.10
    """
    mean, *ends = (f"{x:.{digits}f}" for x in (statistics.fmean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({' to '.join(ends)})"
