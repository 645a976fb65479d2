"""The table as a picture: a dot with its spread for each variant, the baseline as a band."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from softmask_plugin.ablate.table import Measured, Row
from softmask_plugin.report.figures import ACCENT, MUTED, STYLE

HEIGHT, WIDTH = 0.3, 2.6  # of a variant and of a metric, inches
COLUMNS = 3  # metrics side by side


def draw(table: Sequence[Row], metrics: Sequence[str], baseline: str) -> Figure:
    """Draw the rows that are measured, one panel for each metric.

    A dot is the mean over seeds, its bar the standard deviation, small marks are the single seeds;
    the line and the band are the baseline's mean and deviation.
    """
    shown = [row for row in table if row.measured]
    with mpl.rc_context(STYLE):
        across = min(COLUMNS, len(metrics))
        down = -(-len(metrics) // across)
        size = (1.6 + WIDTH * across, 0.4 + (0.6 + HEIGHT * len(shown)) * down)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
        for unused in panels[len(metrics) :]:
            unused.remove()
        for axes, metric in zip(panels, metrics, strict=False):
            axes.set_title(metric)
            for place, row in enumerate(shown):
                if metric in row.metrics:
                    _variant(axes, place, row.metrics[metric], row.name == baseline)
            axes.grid(axis="y", color=MUTED, alpha=0.2, linewidth=0.6)
            axes.tick_params(length=0)
        panels[0].set_yticks(range(len(shown)), [row.name for row in shown])
        panels[0].set_ylim(len(shown) - 0.5, -0.5)  # in the table's order
        figure.supxlabel(
            "mean ± standard deviation over seeds, and each seed; "
            f"line and band: {baseline}, mean ± standard deviation",
            fontsize=8,
            color=MUTED,
        )
    return figure


def _variant(axes: Axes, place: int, measured: Measured, is_baseline: bool) -> None:
    spread = measured.deviation or 0.0
    if is_baseline:
        axes.axvline(measured.mean, color=MUTED, linewidth=1)
        low, high = measured.mean - spread, measured.mean + spread
        axes.axvspan(low, high, color=MUTED, alpha=0.18, linewidth=0)
    values = [*measured.values.values()]
    axes.plot(values, [place] * len(values), "|", color=MUTED, markersize=7)
    colour = MUTED if is_baseline else ACCENT
    axes.errorbar(
        measured.mean, place, xerr=spread, fmt="o", color=colour, markersize=5, linewidth=1.4
    )
