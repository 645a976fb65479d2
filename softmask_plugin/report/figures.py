"""The style of all figures, and the curves of a run, drawn without pyplot's global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

INK = "#1f2328"  # on the page replaced by its text colour, so that figures follow a dark theme
MUTED = "#848b94"  # legible on white and on black
ACCENT = "#3d7fd0"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # captions may contain dollar signs
    "text.usetex": False,  # captions must never reach LaTeX, whatever the user's matplotlibrc says
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}

CURVES = {
    "loss": "Total loss",
    "loss_itc": "Contrast (ITC)",
    "loss_itm": "Matching (ITM)",
    "loss_mlm": "Masked words (MLM)",
    "loss_soft": "Soft-masked matching",
    "grad_norm": "Gradient norm",
    "temp": "Temperature",
    "lr": "Learning rate",
    "pairs_per_s": "Pairs per second",
    "skipped_steps": "Skipped steps",
    "mask_hidden": "Mask: share attenuated",
    "mask_spread": "Mask: spread",
    "mask_no_word": "Captions without a word",
    "queue_filled": "Queue: share filled",
    "queue_image_mean": "Queue: mean image feature",
    "queue_text_mean": "Queue: mean text feature",
}


def loss_curves(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw each quantity that was logged in training over the steps.

    Args:
        records: Lines of ``metrics.jsonl``; only those of split ``train`` are drawn.
    """
    train = [record for record in records if record.get("split") == "train"]
    logged = {key for record in train for key, value in record.items() if value is not None}
    extra = sorted(key for key in logged - CURVES.keys() if key.startswith("loss"))
    series = {
        CURVES.get(key, key): [(r["step"], r[key]) for r in train if r.get(key) is not None]
        for key in (*CURVES, *extra)
        if key in logged
    }
    return _curves("Training curves", series)


def validation_curves(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw each metric of the splits but ``train`` that were evaluated more than once."""
    series: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if record.get("split") != "train" and record.get("step") is not None:
            for name, value in numbers_of(record).items():
                series.setdefault(f"{record['split']}: {name}", []).append((record["step"], value))
    return _curves("Validation curves", {k: v for k, v in series.items() if len(v) > 1})


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics in a line of ``metrics.jsonl``."""
    return {
        name: value
        for name, value in record.items()
        if name not in ("epoch", "step", "time") and isinstance(value, (int, float))
    }


def _curves(label: str, series: Mapping[str, list[tuple[float, float]]]) -> Figure:
    """A small plot of (step, value) for each title, with the last value written at its end."""
    columns = 4
    rows = max(1, -(-len(series) // columns))
    with mpl.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(wspace=0.06, hspace=0.1)
        figure = Figure(figsize=(11, 2.15 * rows), layout=layout)
        figure.set_label(label)
        for position, (title, points) in enumerate(series.items(), start=1):
            axes = figure.add_subplot(rows, columns, position)
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=ACCENT, linewidth=1.4, solid_capstyle="round")
            axes.plot(steps[-1:], values[-1:], "o", color=ACCENT, markersize=3.5, clip_on=False)
            axes.set_title(title)
            axes.set_title(f"{values[-1]:.3g}", loc="right", color=ACCENT)
            if min(values) >= 0:
                axes.set_ylim(bottom=0, top=None if max(values) > 0 else 1)
            axes.margins(x=0)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.6)
            axes.tick_params(length=0)
    return figure
