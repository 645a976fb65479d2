"""The table: means over seeds, and what each variant is worth against the baseline."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from scipy.stats import t as student_t

from softmask_plugin.ablate.plan import Plan
from softmask_plugin.ablate.run import Job


@dataclass(frozen=True)
class Measured:
    """One metric of one variant.

    Attributes:
        values: by seed.
        mean, deviation: over the seeds; the standard deviation is that of a sample, None of a
            single seed.
        differences: the variant's value less the baseline's, for each seed that both have; none
            for the baseline itself.
        difference: their mean.
        interval: how far from it the 95% confidence interval of the mean reaches, by Student's t of
            the differences; None of a single seed.
        wins: in how many of these seeds the variant is above the baseline.
    """

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
        return self.interval is not None and abs(self.difference or 0) > self.interval


@dataclass(frozen=True)
class Row:
    """A variant.

    Attributes:
        name: in the plan.
        options: what it changes.
        metrics: by the plan's names of them; those that no seed has are left out.
        cost: seconds of a step of pretraining over the baseline's; None where it is not measured.
    """

    name: str
    options: tuple[str, ...]
    metrics: dict[str, Measured] = field(default_factory=dict)
    cost: float | None = None

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
    found = {name: _results(plan, folder, name) for name in plan.variants}
    costs = {name: _cost(plan, folder, name) for name in plan.variants}
    table = []
    for name, values in found.items():
        against = {} if name == baseline else found[baseline]
        metrics = {m: measure(v, against.get(m, {})) for m, v in values.items() if v}
        cost, other = costs[name], costs[baseline]
        relative = None if cost is None or other is None else cost / other
        table.append(Row(name, plan.variants[name], metrics, relative))
    return table


def measure(values: Mapping[int, float], baseline: Mapping[int, float]) -> Measured:
    """Mean and spread of values by seed, and their differences to the baseline's."""
    differences = {seed: values[seed] - baseline[seed] for seed in values if seed in baseline}
    return Measured(
        values=dict(values),
        mean=statistics.fmean(values.values()),
        deviation=statistics.stdev(values.values()) if len(values) > 1 else None,
        differences=differences,
        difference=statistics.fmean(differences.values()) if differences else None,
        interval=_interval([*differences.values()]) if len(differences) > 1 else None,
        wins=sum(difference > 0 for difference in differences.values()),
    )


def _interval(values: Sequence[float]) -> float:
    """Half of the width of the 95% confidence interval of a mean."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return float(student_t.ppf(0.975, len(values) - 1)) * error


def markdown(table: Sequence[Row], metrics: Sequence[str], baseline: str) -> str:
    """Rows that are measured, a line each; below them the names of those that are not."""
    head = ["variant", *metrics, "seeds", "time of a step"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    digits = {metric: _digits(table, metric) for metric in metrics}
    for row in filter(lambda row: row.measured, table):
        name = f"**{row.name}**" if row.name == baseline else row.name
        seeds = max(len(each.values) for each in row.metrics.values())
        cost = "" if row.cost is None else f"{row.cost:.2f}"
        cells = [cell(row.metrics[m], digits[m]) if m in row.metrics else "" for m in metrics]
        lines.append("| " + " | ".join([name, *cells, str(seeds), cost]) + " |")
    lines += [
        "",
        f"Mean ± standard deviation over seeds; in brackets the difference to {baseline} ± half of "
        "its 95% confidence interval (Student's t, paired by seed; bold where that leaves out "
        "zero), and in how many of the shared seeds it is above it. The time of a step is relative "
        f"to {baseline}.",
    ]
    missing = [row.name for row in table if not row.measured]
    if missing:
        lines += ["", "Still to be measured: " + ", ".join(missing) + "."]
    return "\n".join(lines) + "\n"


def _digits(table: Sequence[Row], metric: str) -> int:
    """Decimal places of a column: three for shares, one for percent."""
    found = [row.metrics[metric] for row in table if metric in row.metrics]
    return 3 if all(abs(value) <= 1 for each in found for value in each.values.values()) else 1


def cell(measured: Measured, digits: int = 1) -> str:
    """One metric as text, as in "61.2 ± 1.3 (+2.4 ± 3.4, 3/3)"."""
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


def _results(plan: Plan, folder: Path, variant: str) -> dict[str, dict[int, float]]:
    """Metrics of a variant, each by seed."""
    values: dict[str, dict[int, float]] = {metric: {} for metric in plan.metrics}
    for seed in plan.seeds:
        job = Job(plan, variant, seed, folder)
        for stage in plan.stages:
            for metric, value in (job.result(stage) or {}).get("metrics", {}).items():
                values[f"{stage.name} {metric}"][seed] = value
    return values


def _cost(plan: Plan, folder: Path, variant: str) -> float | None:
    """Time of a step over that of the plan's own baseline."""
    file = Job(plan, variant, plan.seeds[0], folder).cost_file
    return json.loads(file.read_text())["step_time"] if file.is_file() else None
