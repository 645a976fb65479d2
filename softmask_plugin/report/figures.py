"""Figures a paper could print: training curves, and what each word of a caption looks at.

Plain matplotlib ``Figure`` objects, drawn without pyplot's global state.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from softmask_plugin.pointing import Box

if TYPE_CHECKING:
    from softmask_plugin.explain import Explanation

INK = "#1f2328"  # the page swaps it for its own text colour, so figures follow a dark theme
MUTED = "#848b94"  # legible on white and on black
ACCENT = "#3d7fd0"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a caption may hold any number of dollar signs
    "text.usetex": False,  # nor may it command LaTeX, whatever the user's matplotlibrc says
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
    "mask_hidden": "Mask: share hidden",
    "mask_spread": "Mask: spread",
    "mask_no_word": "Captions without a word",
    "queue_filled": "Queue: share written",
    "queue_image_mean": "Queue: mean image feature",
    "queue_text_mean": "Queue: mean text feature",
}

# Measures of a word panel, in inches: a picture's width, and what lies between and around pictures.
CELL, GAP, LABEL, TITLE, GAUGE = 1.4, 0.09, 0.26, 0.22, 0.4
LINE = 0.17  # of a line of a caption
COLUMNS = 7  # words side by side: a caption of 30 then has the shape of a page
PIXELS = 192  # pictures are scaled to this width, so that a 64-pixel scene looks well on a page
COLOUR_MAP = "inferno"
HIDDEN = np.array([0.13, 0.14, 0.17])  # what a wholly hidden patch turns to


def loss_curves(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw each loss term, gradient norm, temperature, learning rate and speed against the step.

    Args:
        records: the lines of ``metrics.jsonl``; those of other splits than ``train`` are ignored.

    Returns:
        One small plot for each quantity that was logged, the last value written at its end.
    """
    train = [record for record in records if record.get("split") == "train"]
    logged = {key for record in train for key, value in record.items() if value is not None}
    extra = sorted(key for key in logged - CURVES.keys() if key.startswith("loss"))
    keys = [key for key in CURVES if key in logged] + extra
    series = {
        CURVES.get(key, key): [(r["step"], r[key]) for r in train if r.get(key) is not None]
        for key in keys
    }
    return _curves("Training curves", series)


def validation_curves(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw each metric of the splits that were evaluated more than once against the step.

    Args:
        records: the lines of ``metrics.jsonl``; those of ``train`` are ignored.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if record.get("split") != "train" and record.get("step") is not None:
            for name, value in numbers_of(record).items():
                series.setdefault(f"{record['split']}: {name}", []).append((record["step"], value))
    return _curves("Validation curves", {k: v for k, v in series.items() if len(v) > 1})


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics in a line of ``metrics.jsonl``, without where it belongs."""
    return {
        name: value
        for name, value in record.items()
        if name not in ("epoch", "step", "time") and isinstance(value, (int, float))
    }


def _curves(label: str, series: Mapping[str, list[tuple[float, float]]]) -> Figure:
    """A small plot of the points (step, value) under each title."""
    columns = 4
    rows = max(1, -(-len(series) // columns))
    with mpl.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(wspace=0.06, hspace=0.1)
        figure = Figure(figsize=(11, 2.15 * rows), layout=layout)
        figure.set_label(label)
        for position, (title, points) in enumerate(series.items(), start=1):
            _curve(figure.add_subplot(rows, columns, position), title, points)
    return figure


def _curve(axes: Axes, title: str, points: list[tuple[float, float]]) -> None:
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


@dataclass(frozen=True)
class Shown:
    """What a panel shows of one pair.

    Attributes:
        image: (H, W, 3) uint8.
        explanation: what the model makes of the image and its caption.
        words: which of ``explanation.words``, one column each.
        boxes: the ground truth, ``(word index, (x0, y0, x1, y1) in [0, 1], role)``; a shown word's
            box is outlined.
    """

    image: np.ndarray
    explanation: Explanation
    words: Sequence[int]
    boxes: Collection[tuple[int, Box, str]] = ()


def word_panel(
    image: np.ndarray,
    explanation: Explanation,
    words: Sequence[int],
    boxes: Collection[tuple[int, Box, str]] = (),
) -> Figure:
    """Draw an image, and for some words their heat map, their soft mask and what it does.

    Args:
        image, explanation, words, boxes: see :class:`Shown`.

    Returns:
        The image and its caption on the left; in each column the heat map (brightest at its own
        peak), the image with each patch darkened as far as the mask hides it, and the match score
        with the mask as a bar beside the score without it as a tick. The mask is called by its
        kind and strength. The columns of more than ``COLUMNS`` words are wrapped into rows.
    """
    return word_panels([Shown(image, explanation, words, boxes)])


def word_panels(pairs: Sequence[Shown], pixels: int = PIXELS) -> Figure:
    """Draw several pairs below each other, each as :func:`word_panel` does.

    Args:
        pairs: what to draw, one at least.
        pixels: width to which each picture is scaled; of the figure's 1.4 inches.
    """
    rows_of = [_rows(pair.words) for pair in pairs]
    sides = [CELL * pair.image.shape[0] / pair.image.shape[1] for pair in pairs]
    strips = [TITLE + 2 * side + GAP + GAUGE for side in sides]  # heights of one row of words
    longest = max(len(row) for rows in rows_of for row in rows)
    width = CELL + LABEL + longest * (CELL + GAP) - GAP
    height = sum(len(rows) * strip for rows, strip in zip(rows_of, strips, strict=True))
    top = 0.0
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        figure.set_label("; ".join(pair.explanation.caption for pair in pairs))
        for pair, rows, side, strip in zip(pairs, rows_of, sides, strips, strict=True):
            picture = _scale(pair.image, pixels)
            _subject(figure, pair, picture, top, side, len(rows) * strip - TITLE - side - GAP)
            for row in rows:
                _word_columns(figure, pair, row, picture, top, side)
                top += strip
    return figure


def _rows(words: Sequence[int]) -> list[Sequence[int]]:
    """Words in rows of about the same length; one row where there is none."""
    count = max(1, -(-len(words) // COLUMNS))
    length = max(1, -(-len(words) // count))
    return [words[first : first + length] for first in range(0, max(1, len(words)), length)]


def _place(figure: Figure, x: float, y: float, height: float) -> Axes:
    """Add axes one picture wide, their top left corner x, y inches from the figure's."""
    width, whole = figure.get_size_inches()
    return figure.add_axes((x / width, 1 - (y + height) / whole, CELL / width, height / whole))


def _subject(
    figure: Figure, pair: Shown, picture: np.ndarray, top: float, side: float, room: float
) -> None:
    """The image, and below it, in ``room`` inches, the match score and the caption."""
    _picture(_place(figure, 0, top + TITLE, side), picture)
    axes = _place(figure, 0, top + TITLE + side + GAP, room)
    axes.set_axis_off()
    score = f"match {pair.explanation.score:.2f}"
    axes.text(0, 1 - 0.02 / room, score, color=ACCENT, weight="bold", va="top")
    caption = pair.explanation.read + (" […]" if pair.explanation.cut else "")
    lines = textwrap.wrap(caption, 19, max_lines=max(1, int(room / LINE) - 2), placeholder=" …")
    axes.text(0, 1 - 1.4 * LINE / room, "\n".join(lines), va="top", linespacing=1.35)


def _word_columns(
    figure: Figure, pair: Shown, row: Sequence[int], picture: np.ndarray, top: float, side: float
) -> None:
    explanation = pair.explanation
    box_of = {index: box for index, box, _ in pair.boxes}
    heat_top, mask_top = top + TITLE, top + TITLE + side + GAP
    width, height = figure.get_size_inches()
    for y, label in ((heat_top, "heat map"), (mask_top, explanation.mask_name)) if row else ():
        at = ((CELL + 0.6 * LABEL) / width, 1 - (y + side / 2) / height)
        figure.text(*at, label, color=MUTED, rotation=90, ha="center", va="center")
    for column, word in enumerate(row):
        x, box = CELL + LABEL + column * (CELL + GAP), box_of.get(word)
        heat = _place(figure, x, heat_top, side)
        heat.set_title(explanation.words[word], loc="center", pad=4)
        _picture(heat, heat_overlay(picture, explanation.cams[word].numpy()), box)
        masked = soft_masked(picture, explanation.masks[word].numpy())
        _picture(_place(figure, x, mask_top, side), masked, box)
        masked_score = float(explanation.masked_scores[word])
        _gauge(_place(figure, x, mask_top + side, GAUGE), explanation.score, masked_score)


def heat_overlay(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lay a heat map (h, w), scaled to its maximum, over the greyed picture (H, W, 3) in [0, 1]."""
    height, width, _ = picture.shape
    scaled = Image.fromarray((heat / (heat.max() or 1)).astype(np.float32))
    smooth = np.asarray(scaled.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
    grey = picture @ np.array([0.299, 0.587, 0.114])
    return 0.3 * grey[..., None] + 0.7 * mpl.colormaps[COLOUR_MAP](smooth)[..., :3]


def soft_masked(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Darken each patch of the picture (H, W, 3) by the mask's (h, w) share; all in [0, 1]."""
    height, width, _ = picture.shape
    patches = Image.fromarray(mask.astype(np.float32))
    hidden = np.asarray(patches.resize((width, height), Image.Resampling.NEAREST))[..., None]
    return (1 - hidden) * picture + hidden * HIDDEN


def _scale(image: np.ndarray, pixels: int) -> np.ndarray:
    size = (pixels, round(pixels * image.shape[0] / image.shape[1]))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)) / 255


def _picture(axes: Axes, picture: np.ndarray, box: Box | None = None) -> None:
    axes.imshow(picture, extent=(0, 1, 1, 0), aspect="auto", interpolation="none")
    axes.set_axis_off()
    if box is not None:
        x0, y0, x1, y1 = box
        for colour, linewidth in (("black", 2.0), ("white", 1.0)):  # seen on light and on dark
            frame = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=colour, lw=linewidth)
            axes.add_patch(frame)


def _gauge(axes: Axes, score: float, masked_score: float) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_axis_off()
    axes.barh(0.75, 1, height=0.1, color=MUTED, alpha=0.3)
    axes.barh(0.75, masked_score, height=0.1, color=ACCENT)
    axes.plot([score, score], [0.65, 0.85], color=INK, linewidth=1.2)
    axes.text(0.5, 0.5, f"{score:.2f} → {masked_score:.2f}", ha="center", va="top", fontsize=8.5)
