"""The table: means over seeds, and the differences of each variant to the baseline."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import scipy.stats

from softmask_plugin.ablate.job import Job
from softmask_plugin.ablate.plan import FRACTIONS, METRICS, Plan
from softmask_plugin.errors import UserError

FEWEST = 3  # seeds that an interval needs

BySeed = dict[int, float]


@dataclass(frozen=True)
class Measured:
    """One metric of one variant."""

    percent: bool  # whether the values are percentages, as those of known tasks are
    values: BySeed
    mean: float
    deviation: float | None  # standard deviation of the sample; None for a single seed
    differences: BySeed  # to the baseline, for the seeds that both have; empty for the baseline
    difference: float | None  # mean of the differences
    interval: float | None  # half of its 95% confidence interval; None below FEWEST seeds
    wins: int  # seeds in which the variant is above the baseline

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval, and it excludes zero."""
        return self.interval is not None and abs(fmean(self.differences.values())) > self.interval


@dataclass
class Row:
    """One variant."""

    name: str
    options: tuple[str, ...]  # its overrides
    metrics: dict[str, Measured] = field(default_factory=dict)  # by the plan's names
    cost: list[float] | None = None  # quartiles of relative_cost
    losses: dict[str, BySeed] = field(default_factory=dict)  # at the end of pretraining, by term
    ran_on: list[dict[str, Any]] = field(default_factory=list)  # environments of its runs
    refused: str | None = None  # why its results do not count


def rows(plan: Plan, folder: Path, baseline: str) -> list[Row]:
    """Load the results in an ablation's folder, and compare all variants with the baseline."""
    base = _row(plan, folder, baseline, {})
    against = {metric: each.values for metric, each in base.metrics.items()}
    return [
        base if name == baseline else _row(plan, folder, name, against) for name in plan.variants
    ]


def _row(plan: Plan, folder: Path, name: str, against: Mapping[str, BySeed]) -> Row:
    row, values = Row(name, plan.variants[name]), dict[str, BySeed]()
    try:
        for seed in plan.seeds:
            job = Job(plan, name, seed, folder)
            row.cost = job.cost.get("step_time")
            for stage in plan.stages:
                if (result := job.result(stage)) is None:
                    continue
                for metric in stage.metrics:
                    if metric in result["metrics"]:  # the plan may have it only since
                        by_seed = values.setdefault(f"{stage.name} {metric}", {})
                        scale = 100 if plan.task(stage) in FRACTIONS else 1
                        by_seed[seed] = scale * result["metrics"][metric]
                for term, value in result["losses"].items() if stage is plan.base else ():
                    row.losses.setdefault(term, {})[seed] = value
                if result["environment"] not in row.ran_on:
                    row.ran_on.append(result["environment"])
    except UserError as error:
        return Row(name, plan.variants[name], refused=str(error))
    known = {stage.name for stage in plan.evaluate if plan.task(stage) in METRICS}
    for metric, by_seed in values.items():
        percent = metric.split()[0] in known
        row.metrics[metric] = measure(by_seed, against.get(metric, {}), percent)
    return row


def measure(values: BySeed, baseline: BySeed, percent: bool = True) -> Measured:
    """Mean and spread of values, and of their differences to the baseline with the same seed."""
    differences = {seed: values[seed] - baseline[seed] for seed in values if seed in baseline}
    interval = None
    if len(differences) >= FEWEST:
        quantile = scipy.stats.t.ppf(0.975, len(differences) - 1)
        interval = float(quantile * scipy.stats.sem([*differences.values()]))
    return Measured(
        percent=percent,
        values=dict(values),
        mean=fmean(values.values()),
        deviation=stdev(values.values()) if len(values) > 1 else None,
        differences=differences,
        difference=fmean(differences.values()) if differences else None,
        interval=interval,
        wins=sum(difference > 0 for difference in differences.values()),
    )


def markdown(table: Sequence[Row], metrics: Sequence[str], baseline: str) -> str:
    """The table of metrics, how to read it, the table of losses, and what is missing."""
    lines, shown = [], [row for row in table if row.metrics]
    for row in shown:
        name = f"**{row.name}**" if row.name == baseline else row.name
        cells = [cell(row.metrics[m]) if m in row.metrics else "" for m in metrics]
        seeds = max(len(each.values) for each in row.metrics.values())
        cost = "{1:.2f} ({0:.2f} to {2:.2f})".format(*row.cost) if row.cost else ""
        lines.append([name, *cells, str(seeds), cost])
    parts = [
        markdown_table(["variant", *metrics, "seeds", "time of a step"], lines),
        _legend([each for row in shown for each in row.metrics.values()], baseline),
    ]
    losses = {row.name: row.losses for row in shown if row.losses}
    if losses:
        parts += [
            "Losses at the end of pretraining: mean of the last epoch's log lines, over seeds, and "
            "range. Those of masked captions cannot be compared with those of clean ones.",
            range_table(losses, digits=3),
        ]
    missing = [row.name for row in table if not row.metrics and row.refused is None]
    if missing:
        parts.append(f"Not measured yet: {', '.join(missing)}.")
    parts += [f"Left out: {row.refused}" for row in table if row.refused is not None]
    return "\n\n".join(parts) + "\n"


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
    if measured.excludes_zero:
        difference = f"**{difference}**"
    return f"{text} ({difference}, {measured.wins}/{len(measured.differences)})"


def _legend(found: Sequence[Measured], baseline: str) -> str:
    """How to read the cells, and how many bold ones to expect by chance."""
    unit = "In percent: mean" if all(each.percent for each in found) else "Mean"
    intervals = sum(each.interval is not None for each in found)
    bold = (
        f" ± half of its 95% confidence interval (Student's t, paired by seed, {FEWEST} or more "
        f"seeds), bold if that excludes zero, as about {intervals * 0.05:.2g} of these {intervals} "
        "would by chance,"
    )
    return (
        f"{unit} ± standard deviation over seeds; in brackets the difference to {baseline}"
        f"{bold if intervals else ''} and in how many of the shared seeds the variant is above. "
        "Time of a step: relative to the plan's baseline, median and quartiles over steps in turns."
    )


def range_table(table: Mapping[str, Mapping[str, BySeed]], digits: int) -> str:
    """A Markdown table of variants: mean and range over seeds of each of their values."""

    def text(values: Collection[float]) -> str:
        mean, *ends = (f"{x:.{digits}f}" for x in (fmean(values), min(values), max(values)))
        return mean if len(values) == 1 else f"{mean} ({' to '.join(ends)})"

    columns = [*dict.fromkeys(column for row in table.values() for column in row)]
    lines = []
    for name, row in table.items():
        cells = [text(row[column].values()) if column in row else "" for column in columns]
        lines.append([name, *cells, str(max(map(len, row.values())))])
    return markdown_table(["variant", *columns, "seeds"], lines)


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table of texts."""
    rule = "|---" * len(head) + "|"
    top, *rest = (f"| {' | '.join(cells)} |" for cells in (head, *lines))
    return "\n".join([top, rule, *rest])
