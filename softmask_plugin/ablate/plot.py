"""The table as a picture: differences to the baseline with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from softmask_plugin.ablate.table import FEWEST, Row
from softmask_plugin.style import ACCENT, MUTED, STYLE

COLUMNS = 3  # most metrics side by side


def draw(table: Sequence[Row], metrics: Sequence[str], baseline: str) -> Figure:
    """Draw the measured rows' differences to the baseline, one panel for each metric.

    A dot is the mean over seeds and its bar the 95% confidence interval, if there is one; both are
    in colour if it excludes zero. Small marks are single seeds.
    """
    (base,) = (row for row in table if row.name == baseline)
    shown = [row for row in table if row.metrics]
    down = -(-len(metrics) // COLUMNS)
    across = -(-len(metrics) // down)
    size = (1.6 + 2.6 * across, 0.6 + (0.9 + 0.3 * len(shown)) * down)  # inches
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
        for unused in panels[len(metrics) :]:
            unused.remove()
        for axes, metric in zip(panels, metrics, strict=False):
            against = base.metrics.get(metric)
            axes.set_title(f"{metric}\n{baseline}: {against.mean:.3g}" if against else metric)
            axes.axvline(0, color=MUTED, linewidth=1)
            for place, row in enumerate(shown):
                measured = row.metrics.get(metric)
                if measured is None or measured.difference is None:
                    continue
                values = [*measured.differences.values()]
                axes.plot(values, [place] * len(values), "|", color=MUTED, markersize=7)
                color = ACCENT if measured.excludes_zero else MUTED
                dot = {"color": color, "fmt": "o", "markersize": 5, "linewidth": 1.4}
                axes.errorbar(measured.difference, place, xerr=measured.interval or 0.0, **dot)
            axes.grid(axis="y", color=MUTED, alpha=0.2, linewidth=0.6)
            axes.tick_params(length=0)
        panels[0].set_yticks(range(len(shown)), [row.name for row in shown])
        panels[0].set_ylim(len(shown) - 0.5, -0.5)  # in the table's order
        figure.supxlabel(
            f"difference to {baseline} with the same seed: mean, each seed, and with {FEWEST} or\n"
            "more seeds the 95% confidence interval (in colour if it excludes zero)",
            fontsize=8,
            color=MUTED,
        )
    return figure
