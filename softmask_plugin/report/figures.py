"""The curves of a run, drawn without pyplot's global state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from softmask_plugin.runners.meter import numbers_of
from softmask_plugin.style import COLOURS, MUTED, STYLE

CURVES = {
    "loss": "Total loss",
    "loss_itc": "Contrast (ITC)",
    "loss_itm": "Matching (ITM)",
    "loss_mlm": "Masked words (MLM)",
    "loss_lm": "Captioning (LM)",
    "loss_soft": "Soft-masked matching",
    "grad_norm": "Gradient norm",
    "temp": "Temperature",
    "lr": "Learning rate",
    "pairs_per_s": "Pairs per second",
    "skipped_steps": "Skipped steps",
    "mask_hidden": "Mask: attenuated",
    "mask_spread": "Mask: spread",
    "mask_no_word": "Captions without a word",
    "queue_filled": "Queue: share filled",
    "queue_image_mean": "Queue: image mean",
    "queue_text_mean": "Queue: text mean",
}
METRICS = {
    "img_r1": "Text finds image, R@1",
    "img_r5": "Text finds image, R@5",
    "img_r10": "Text finds image, R@10",
    "img_r_mean": "Text finds image, mean",
    "txt_r1": "Image finds text, R@1",
    "txt_r5": "Image finds text, R@5",
    "txt_r10": "Image finds text, R@10",
    "txt_r_mean": "Image finds text, mean",
    "r_mean": "Mean of all recalls",
    "acc": "Accuracy",
    "agg_metrics": "Overall, which selects the best epoch",
}


def loss_curves(*runs: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Draw each quantity that runs logged in training over the steps, a figure each.

    Args:
        runs: For each run, the lines of its ``metrics.jsonl``; only those of split ``train`` count.
    """
    series: Series = defaultdict(lambda: defaultdict(list))
    for run, records in enumerate(runs):
        for record in records:
            if record.get("split") == "train":
                for key, value in record.items():
                    if value is not None and (key in CURVES or key.startswith("loss")):
                        series[key][run].append((record["step"], value))
    order = [*CURVES, *sorted(series.keys() - CURVES.keys())]
    return [_curve(CURVES.get(key, key), series[key]) for key in order if key in series]


def validation_curves(*runs: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Draw each metric of splits other than ``train`` that were evaluated more than once."""
    series: Series = defaultdict(lambda: defaultdict(list))
    for run, records in enumerate(runs):
        for record in records:
            if record.get("split") != "train" and record.get("step") is not None:
                for key, value in numbers_of(record).items():
                    title = f"{record['split']}: {METRICS.get(key, key)}"
                    series[title][run].append((record["step"], value))
    return [
        _curve(title, points)
        for title, points in series.items()
        if any(len(each) > 1 for each in points.values())
    ]


Series = dict[str, dict[int, list[tuple[float, float]]]]  # points (step, value) by title and run


def _curve(title: str, runs: Mapping[int, list[tuple[float, float]]]) -> Figure:
    """A small plot of each run's (step, value); of a single run, the last value in the corner."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.9, 2.15))
        figure.subplots_adjust(left=0.19, right=0.96, bottom=0.1, top=0.86)
        figure.set_label(title)
        axes = figure.add_subplot()
        # From the figure's edge: it must leave room for a value
        axes.set_title(title, x=-0.24, pad=9)
        for run, points in runs.items():
            (steps, values), colour = zip(*points, strict=True), COLOURS[run % len(COLOURS)]
            axes.plot(steps, values, color=colour, linewidth=1.4, solid_capstyle="round")
            axes.plot(steps[-1:], values[-1:], "o", color=colour, markersize=3.5, clip_on=False)
        if len(runs) == 1:
            axes.set_title(f"{values[-1]:.3g}", loc="right", color=colour, pad=9)
        drawn = [value for points in runs.values() for _, value in points]
        if min(drawn) >= 0:
            axes.set_ylim(bottom=0, top=None if max(drawn) > 0 else 1)
        axes.margins(x=0)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.6)
        axes.tick_params(length=0)
    return figure
