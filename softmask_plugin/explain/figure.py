"""Figures fit for a paper: where each word of a caption looks, and what its mask does."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from softmask_plugin.pointing import Box
from softmask_plugin.style import ACCENT, INK, MUTED, STYLE

if TYPE_CHECKING:  # matplotlib takes long to import, and few runs draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from softmask_plugin.explain.pairs import Explanation

# Inches: between and around pictures
PAD, GAP, LABEL, TITLE, GAUGE, LINE = 0.05, 0.08, 0.3, 0.2, 0.34, 0.15
CELL, LEAST = 1.4, 0.62  # a picture's width: by default, and at least
FLAT, TALL = 0.6, 1.6  # a row's height at least; a picture's height at most, over its width
FONT, SMALL = 8, 6.5  # points, whatever the figure's width
LETTER = 0.62 / 72  # a letter's width in inches for each point of its size
COLUMNS = 7  # words in a row: a caption of 30 then has the shape of a page
DPI = 140  # pictures are scaled to this, so that a 64-pixel scene looks good on a page
WHOLE: dict[str, Any] = {"extent": (0, 1, 1, 0), "aspect": "auto", "interpolation": "none"}
COLOUR_MAP = "inferno"
HIDDEN = np.array([0.13, 0.14, 0.17])  # colour of a wholly masked patch


@dataclass(frozen=True)
class Shown:
    """A pair to draw.

    Attributes:
        image: (H, W, 3) uint8.
        words: Indices in ``explanation.words``, one column each.
        boxes: Ground truth to outline, ``(word index, (x0, y0, x1, y1) in [0, 1], role)``.
    """

    image: np.ndarray
    explanation: Explanation
    words: Sequence[int]
    boxes: Collection[tuple[int, Box, str]] = ()


def word_panels(*pairs: Shown, dpi: int = DPI, width: float | None = None) -> Figure:
    """Draw pairs, one below the other: for some words the heat map, the mask and its effect.

    A pair's caption (as far as it was kept) is above its image. Each column shows a word's heat
    map, brightest at its own maximum; the image, each patch as dark as the mask makes it; and the
    match as a bar with the mask and a tick without it. More than ``COLUMNS`` words take several
    rows.

    Args:
        pairs: At least one.
        dpi: Pixels per inch that pictures are scaled to.
        width: Inches, 2 or more; a row holds as many words as fit. None: pictures are ``CELL``
            wide. Letters keep their size in points.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns = COLUMNS
    if width is not None:
        columns = min(columns, int((width - 2 * PAD - LABEL + GAP) / (LEAST + GAP)) - 1)
    rows_of = [np.array_split(p.words, max(1, math.ceil(len(p.words) / columns))) for p in pairs]
    longest = max(1, *(len(row) for rows in rows_of for row in rows))
    around = 2 * PAD + LABEL + (longest - 1) * GAP
    cell = CELL if width is None else (width - around) / (longest + 1)
    width = around + (longest + 1) * cell
    with mpl.rc_context(STYLE | {"font.size": SMALL, "axes.titlesize": FONT}):
        figure, top = Figure(figsize=(width, 1)), PAD
        panels = [_Panel(figure, *each, cell, dpi) for each in zip(pairs, rows_of, strict=True)]
        figure.set_figheight(2 * PAD + sum(panel.height for panel in panels))
        figure.set_label("; ".join(pair.explanation.caption for pair in pairs))
        for panel in panels:
            panel.draw(top)
            top += panel.height
    return figure


class _Panel:
    """One pair in a figure. All measures are in inches, from the figure's top left corner."""

    def __init__(
        self, figure: Figure, pair: Shown, rows: list[np.ndarray], cell: float, dpi: int
    ) -> None:
        self.figure, self.pair, self.rows, self.cell = figure, pair, rows, cell
        caption = pair.explanation.kept + (" […]" if pair.explanation.cut else "")
        width = figure.get_figwidth() - 2 * PAD
        self.lines = textwrap.wrap(caption, int(width / (LETTER * FONT)))
        ratio = pair.image.shape[0] / pair.image.shape[1]
        height = min(ratio, TALL) * cell
        self.size = height / ratio, height  # a very tall picture is narrower than its cell
        self.room = max(height, FLAT)  # height of a row of pictures
        self.strip = TITLE + 2 * self.room + GAP + GAUGE
        self.height = len(self.lines) * LINE + len(rows) * self.strip
        pixels = [max(1, round(side * dpi)) for side in self.size]
        scaled = Image.fromarray(pair.image).resize(pixels, Image.Resampling.LANCZOS)
        self.picture = np.asarray(scaled) / 255

    def draw(self, top: float) -> None:
        self.write(PAD, top, "\n".join(self.lines), color=INK, size=FONT, linespacing=1.3)
        top += len(self.lines) * LINE
        self.draw_image(top + TITLE)
        for row in self.rows:
            self.draw_words(row, top + TITLE)
            top += self.strip

    def draw_image(self, top: float) -> None:
        score = f"match {self.pair.explanation.score:.2f}"
        self.show(PAD, top, self.picture).set_title(score, loc="center", color=ACCENT, pad=3)
        left, right, low = PAD, PAD + self.cell, top + self.room + GAP
        scale = heat_overlay(np.full((1, 256, 3), 0.9), np.linspace(0, 1, 256)[None])
        self.place(left, low, self.cell, 0.06).imshow(scale, **WHOLE)
        self.write(left, low + 0.09, "0")
        self.write(right, low + 0.09, "own max.", ha="right")

    def draw_words(self, row: np.ndarray, heat: float) -> None:
        """A column for each word, with the heat maps' top at ``heat``."""
        if not len(row):
            return
        mask = heat + self.room + GAP
        x, gauge = PAD + self.cell + LABEL / 2, mask + self.room
        mask_name = self.pair.explanation.mask_name.replace(" ×", "\n×")  # a row may be low
        for y, label in ((heat, "heat map"), (mask, mask_name)):
            self.write(x, y + self.room / 2, label, rotation=90, ha="center", va="center")
        self.write(x + LABEL / 3, gauge + 0.03, "match:\nplain → masked", ha="right")
        for column, word in enumerate(row.tolist()):
            x = PAD + self.cell + LABEL + column * (self.cell + GAP)
            self.draw_word(word, x, heat, mask)

    def draw_word(self, word: int, x: float, heat: float, mask: float) -> None:
        explanation, text = self.pair.explanation, self.pair.explanation.words[word]
        boxes = [box for index, box, _ in self.pair.boxes if index == word]
        overlay = heat_overlay(self.picture, explanation.cams[word].numpy())
        fitting = (self.cell + GAP) / (len(text) * 1.1 * LETTER)  # points; bold is wider
        title = self.show(x, heat, overlay, boxes)
        title.set_title(text, loc="center", pad=3, size=min(FONT, fitting))
        self.show(x, mask, soft_masked(self.picture, explanation.masks[word].numpy()), boxes)
        score, masked = explanation.score, float(explanation.masked_scores[word])
        gauge = self.place(x, mask + self.room, self.cell, GAUGE)
        gauge.set(xlim=(0, 1), ylim=(0, 1))
        gauge.barh(0.75, 1, height=0.1, color=MUTED, alpha=0.3)
        gauge.barh(0.75, masked, height=0.1, color=ACCENT)
        gauge.plot([score, score], [0.65, 0.85], color=INK, linewidth=1.2)
        gauge.text(0.5, 0.55, f"{score:.2f} → {masked:.2f}", ha="center", va="top")

    def show(self, x: float, y: float, picture: np.ndarray, boxes: Sequence[Box] = ()) -> Axes:
        from matplotlib.patches import Rectangle

        width, height = self.size
        x, y = x + (self.cell - width) / 2, y + (self.room - height) / 2  # in the cell's middle
        axes = self.place(x, y, width, height)
        axes.imshow(picture, **WHOLE)
        for x0, y0, x1, y1 in boxes:
            for colour, linewidth in (("black", 2.0), ("white", 1.0)):  # on light and on dark
                frame = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=colour, lw=linewidth)
                axes.add_patch(frame)
        return axes

    def place(self, x: float, y: float, width: float, height: float) -> Axes:
        whole_width, whole = self.figure.get_size_inches()
        at = (x / whole_width, 1 - (y + height) / whole, width / whole_width, height / whole)
        axes = self.figure.add_axes(at)
        axes.set_axis_off()
        return axes

    def write(self, x: float, y: float, text: str, **style: Any) -> None:
        width, height = self.figure.get_size_inches()
        self.figure.text(x / width, 1 - y / height, text, **{"va": "top", "color": MUTED} | style)


def heat_overlay(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lay a heat map (h, w), scaled to its maximum, over the greyed picture (H, W, 3) in [0, 1]."""
    from matplotlib import colormaps

    height, width, _ = picture.shape
    scaled = Image.fromarray((heat / (heat.max() or 1)).astype(np.float32))
    smooth = np.asarray(scaled.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
    grey = picture @ np.array([0.299, 0.587, 0.114])
    return 0.3 * grey[..., None] + 0.7 * colormaps[COLOUR_MAP](smooth)[..., :3]


def soft_masked(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Darken each patch of the picture (H, W, 3) by the mask's (h, w) share; all in [0, 1]."""
    height, width, _ = picture.shape
    patches = Image.fromarray(mask.astype(np.float32))
    share = np.asarray(patches.resize((width, height), Image.Resampling.NEAREST))[..., None]
    return (1 - share) * picture + share * HIDDEN
