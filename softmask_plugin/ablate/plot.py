"""The table as a picture: what each variant is worth, with its error bar, beside the baseline."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from softmask_plugin.ablate.table import FEWEST, Measured, Row
from softmask_plugin.report.figures import ACCENT, MUTED, STYLE

HEIGHT, WIDTH = 0.3, 2.6  # of a variant and of a metric, inches
COLUMNS = 3  # metrics side by side, at most


def draw(table: Sequence[Row], metrics: Sequence[str], baseline: str) -> Figure:
    """Draw the differences of the measured rows to the baseline, one panel for each metric.

    A dot is the mean over seeds, its bar the 95% confidence interval where there is one, in colour
    where that leaves out zero; small marks are the single seeds.
    """
    (base,) = (row for row in table if row.name == baseline)
    shown = [row for row in table if row.measured]
    with mpl.rc_context(STYLE):
        down = -(-len(metrics) // COLUMNS)
        across = -(-len(metrics) // down)
        size = (1.6 + WIDTH * across, 0.6 + (0.7 + HEIGHT * len(shown)) * down)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
        for unused in panels[len(metrics) :]:
            unused.remove()
        for axes, metric in zip(panels, metrics, strict=False):
            against = base.metrics.get(metric)
            axes.set_title(
                metric if against is None else f"{metric}, {baseline}: {against.mean:.3g}"
            )
            axes.axvline(0, color=MUTED, linewidth=1)
            for place, row in enumerate(shown):
                if metric in row.metrics:
                    _variant(axes, place, row.metrics[metric])
            axes.grid(axis="y", color=MUTED, alpha=0.2, linewidth=0.6)
            axes.tick_params(length=0)
        panels[0].set_yticks(range(len(shown)), [row.name for row in shown])
        panels[0].set_ylim(len(shown) - 0.5, -0.5)  # in the table's order
        figure.supxlabel(
            f"difference to {baseline} with the same seed: mean, each seed,\n"
            f"and of {FEWEST} seeds or more the 95% confidence interval "
            "(in colour: leaves out zero)",
            fontsize=8,
            color=MUTED,
        )
    return figure


def _variant(axes: Axes, place: int, measured: Measured) -> None:
    if measured.difference is None:  # the baseline itself, or no seed is shared with it
        return
    values = [*measured.differences.values()]
    axes.plot(values, [place] * len(values), "|", color=MUTED, markersize=7)
    colour = ACCENT if measured.tells else MUTED
    axes.errorbar(
        measured.difference,
        place,
        xerr=measured.interval or 0.0,
        fmt="o",
        color=colour,
        markersize=5,
        linewidth=1.4,
    )
