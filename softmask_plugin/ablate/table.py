"""The table: means over seeds, and what each variant is worth against the baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from softmask_plugin.ablate.check import METRICS, SHARES
from softmask_plugin.ablate.job import Job
from softmask_plugin.ablate.losses import Losses, losses_table
from softmask_plugin.ablate.plan import Plan
from softmask_plugin.errors import UserError

FEWEST = 3  # seeds of which an interval is told


@dataclass(frozen=True)
class Measured:
    """One metric of one variant.

    Attributes:
        percent: whether it is told in percent, as those of known tasks are.
        values: by seed.
        mean, deviation: over the seeds; the standard deviation is that of a sample, None of a
            single seed.
        differences: the variant's value less the baseline's, for each seed that both have; none
            for the baseline itself.
        difference: their mean.
        interval: how far from it the 95% confidence interval of the mean reaches, by Student's t of
            the differences; None of fewer than ``FEWEST`` seeds, of which it tells nothing.
        wins: in how many of these seeds the variant is above the baseline.
    """

    percent: bool
    values: dict[int, float]
    mean: float
    deviation: float | None
    differences: dict[int, float] = field(default_factory=dict)
    difference: float | None = None
    interval: float | None = None
    wins: int = 0

    @property
    def tells(self) -> bool:
        """Whether the interval of the difference leaves out zero."""
        if self.difference is None or self.interval is None:
            return False
        return abs(self.difference) > self.interval


@dataclass(frozen=True)
class Row:
    """A variant.

    Attributes:
        name: in the plan.
        options: what it changes.
        metrics: by the plan's names of them; those that no seed has are left out.
        cost: seconds of a step of pretraining over those of the plan's baseline, quartiles; None
            where it is not measured.
        losses: that its pretraining ended with, by term and seed.
        ran_on: the environments of its runs, each once.
        refused: why its results do not count, where they do not.
    """

    name: str
    options: tuple[str, ...]
    metrics: dict[str, Measured] = field(default_factory=dict)
    cost: list[float] | None = None
    losses: Losses = field(default_factory=dict)
    ran_on: list[dict[str, Any]] = field(default_factory=list)
    refused: str | None = None

    @property
    def measured(self) -> bool:
        """Whether any seed is through any of its evaluation."""
        return bool(self.metrics)


def rows(plan: Plan, folder: Path, baseline: str) -> list[Row]:
    """Read the results that there are, in the plan's order of variants.

    Args:
        plan: which variants, seeds, stages and metrics.
        folder: the ablation's.
        baseline: the variant to compare with.
    """
    table: dict[str, Row] = {}
    found: dict[str, dict[str, dict[int, float]]] = {}
    for name, options in plan.variants.items():
        try:
            found[name], losses, ran_on = _by_seed(plan, folder, name)
            cost = Job(plan, name, plan.seeds[0], folder).cost
            table[name] = Row(name, options, cost=cost, losses=losses, ran_on=ran_on)
        except UserError as error:
            table[name] = Row(name, options, refused=str(error))
    known = {stage.name for stage in plan.evaluate if plan.task(stage) in METRICS}
    for name, row in table.items():
        if row.refused is None:
            other = {} if name == baseline else found.get(baseline, {})
            metrics = {
                metric: measure(values, other.get(metric, {}), metric.split()[0] in known)
                for metric, values in found[name].items()
                if values
            }
            table[name] = replace(row, metrics=metrics)
    return [*table.values()]


def measure(
    values: Mapping[int, float], baseline: Mapping[int, float], percent: bool = True
) -> Measured:
    """Mean and spread of values by seed, and their differences to the baseline's."""
    differences = {seed: values[seed] - baseline[seed] for seed in values if seed in baseline}
    return Measured(
        percent=percent,
        values=dict(values),
        mean=statistics.fmean(values.values()),
        deviation=statistics.stdev(values.values()) if len(values) > 1 else None,
        differences=differences,
        difference=statistics.fmean(differences.values()) if differences else None,
        interval=_interval([*differences.values()]) if len(differences) >= FEWEST else None,
        wins=sum(difference > 0 for difference in differences.values()),
    )


def _interval(values: Sequence[float]) -> float:
    """Half of the width of the 95% confidence interval of a mean."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return float(student_t.ppf(0.975, len(values) - 1)) * error


def markdown(table: Sequence[Row], metrics: Sequence[str], baseline: str) -> str:
    """Rows that are measured, a line each; below them how to read them, and what is missing."""
    head = ["variant", *metrics, "seeds", "time of a step"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in filter(lambda row: row.measured, table):
        name = f"**{row.name}**" if row.name == baseline else row.name
        seeds = max(len(each.values) for each in row.metrics.values())
        cells = [cell(row.metrics[m]) if m in row.metrics else "" for m in metrics]
        lines.append("| " + " | ".join([name, *cells, str(seeds), _cost(row)]) + " |")
    lines += ["", legend(table, baseline)]
    losses = {row.name: row.losses for row in table if row.measured and row.losses}
    if losses:
        lines += ["", *losses_table(losses)]
    missing = [row.name for row in table if not row.measured and row.refused is None]
    if missing:
        lines += ["", "Still to be measured: " + ", ".join(missing) + "."]
    lines += ["", *(f"Left out: {row.refused}" for row in table if row.refused is not None)]
    return "\n".join(lines).rstrip() + "\n"


def legend(table: Sequence[Row], baseline: str) -> str:
    """How to read the table, and how many of its bold cells chance alone would give."""
    found = [each for row in table for each in row.metrics.values()]
    unit = "In percent: mean" if all(each.percent for each in found) else "Mean"
    text = f"{unit} ± standard deviation over seeds; in brackets the difference to {baseline}"
    count = sum(each.interval is not None for each in found)
    if count:
        text += (
            f" ± half of its 95% confidence interval (Student's t, paired by seed; of {FEWEST} "
            f"seeds or more), bold where that leaves out zero, as about {count * 0.05:.2g} of "
            f"these {count} would by chance,"
        )
    return (
        f"{text} and in how many of the shared seeds it is above it. Time of a step: that of the "
        "plan's baseline is 1; median and quartiles of steps in turns."
    )


def _cost(row: Row) -> str:
    if row.cost is None:
        return ""
    low, median, high = row.cost
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def cell(measured: Measured) -> str:
    """One metric as text, as in "61.2 ± 1.3 (+2.4 ± 3.4, 3/3)"."""
    digits = 1 if measured.percent else 3
    text = f"{measured.mean:.{digits}f}"
    if measured.deviation is not None:
        text += f" ± {measured.deviation:.{digits}f}"
    if measured.difference is None:
        return text
    difference = f"{measured.difference:+.{digits}f}"
    if measured.interval is not None:
        difference += f" ± {measured.interval:.{digits}f}"
    if measured.tells:
        difference = f"**{difference}**"
    return f"{text} ({difference}, {measured.wins}/{len(measured.differences)})"


def as_plain(table: Sequence[Row]) -> list[dict]:
    """The rows for JSON."""
    return [asdict(row) for row in table]


def _by_seed(
    plan: Plan, folder: Path, variant: str
) -> tuple[dict[str, dict[int, float]], Losses, list[dict[str, Any]]]:
    """Metrics of a variant and its last losses, each by seed, and what its runs ran on."""
    values: dict[str, dict[int, float]] = {metric: {} for metric in plan.metrics}
    losses: Losses = {}
    ran_on: list[dict[str, Any]] = []
    for seed in plan.seeds:
        job = Job(plan, variant, seed, folder)
        for stage in plan.stages:
            result = job.result(stage) or {}
            scale = 100 if plan.task(stage) in SHARES else 1
            for metric, value in result.get("metrics", {}).items():
                values[f"{stage.name} {metric}"][seed] = scale * value
            if result and result["environment"] not in ran_on:
                ran_on.append(result["environment"])
            if stage is plan.base and result:
                for term, value in result["losses"].items():
                    losses.setdefault(term, {})[seed] = value
    return values, losses, ran_on
