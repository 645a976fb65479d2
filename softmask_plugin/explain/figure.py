"""Figures a paper could print: what each word of a caption looks at, and what its mask does."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from softmask_plugin.pointing import Box
from softmask_plugin.report.figures import ACCENT, INK, MUTED, STYLE

if TYPE_CHECKING:
    from softmask_plugin.explain.pairs import Explanation

# Measures in inches: what lies between and around pictures.
PAD, GAP, LABEL, TITLE, GAUGE, LINE = 0.05, 0.08, 0.3, 0.2, 0.34, 0.15
CELL, LEAST = 1.4, 0.62  # a picture's width: where the figure's is not given, and at least
FLAT, TALL = 0.6, 1.6  # heights: the least of a row of pictures; the most of one, over its width
FONT, SMALL = 8, 6.5  # points, whatever the figure's width: it is not to be scaled any more
LETTER = 0.62 / 72  # inches that a letter takes for each point of its size
COLUMNS = 7  # words side by side: a caption of 30 then has the shape of a page
DPI = 140  # pictures are scaled to as many pixels, so that a 64-pixel scene looks well on a page
COLOUR_MAP = "inferno"
HIDDEN = np.array([0.13, 0.14, 0.17])  # what a wholly hidden patch turns to


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
        The caption, as far as it was read, above the image; in each column the heat map (brightest
        at its own maximum), the image with each patch darkened as far as the mask hides it, and
        the match score with the mask as a bar beside the score without it as a tick. The mask is
        called by its kind and strength. The columns of more than ``COLUMNS`` words are wrapped
        into rows.
    """
    return word_panels([Shown(image, explanation, words, boxes)])


def word_panels(pairs: Sequence[Shown], dpi: int = DPI, width: float | None = None) -> Figure:
    """Draw several pairs below each other, each as :func:`word_panel` does.

    Args:
        pairs: what to draw, one at least.
        dpi: pixels per inch that pictures are scaled to.
        width: of the figure, inches, 2 or more; rows hold as many words as it has room for. None:
            pictures are ``CELL`` wide. Letters have the same size in points either way.
    """
    if width is not None:
        columns = min(COLUMNS, int((width - 2 * PAD - LABEL + GAP) / (LEAST + GAP)) - 1)
    else:
        columns = COLUMNS
    rows_of = [_rows(pair.words, columns) for pair in pairs]
    longest = max(1, *(len(row) for rows in rows_of for row in rows))
    around = 2 * PAD + LABEL + (longest - 1) * GAP
    cell = CELL if width is None else (width - around) / (longest + 1)
    width = around + (longest + 1) * cell
    captions = [_wrapped(pair.explanation, width) for pair in pairs]
    sizes = [_size(pair.image, cell) for pair in pairs]
    strips = [TITLE + 2 * max(height, FLAT) + GAP + GAUGE for _, height in sizes]
    heights = [
        len(lines) * LINE + len(rows) * strip
        for lines, rows, strip in zip(captions, rows_of, strips, strict=True)
    ]
    with mpl.rc_context(STYLE | {"font.size": SMALL, "axes.titlesize": FONT}):
        figure = Figure(figsize=(width, 2 * PAD + sum(heights)))
        figure.set_label("; ".join(pair.explanation.caption for pair in pairs))
        top = PAD
        for pair, lines, rows, size, strip in zip(
            pairs, captions, rows_of, sizes, strips, strict=True
        ):
            _write(figure, PAD, top, "\n".join(lines), va="top", size=FONT, linespacing=1.3)
            top += len(lines) * LINE
            panel = _Panel(figure, pair, _scale(pair.image, round(size[0] * dpi)), size, cell)
            panel.subject(top)
            for row in rows:
                panel.words(row, top)
                top += strip
    return figure


def _rows(words: Sequence[int], columns: int) -> list[Sequence[int]]:
    """Words in rows of about the same length; one row where there is none."""
    count = max(1, -(-len(words) // columns))
    length = max(1, -(-len(words) // count))
    return [words[first : first + length] for first in range(0, max(1, len(words)), length)]


def _wrapped(explanation: Explanation, width: float) -> list[str]:
    """The lines of a caption, as far as it was read."""
    caption = explanation.read + (" […]" if explanation.cut else "")
    return textwrap.wrap(caption, int((width - 2 * PAD) / (LETTER * FONT)))


def _size(image: np.ndarray, cell: float) -> tuple[float, float]:
    """Width and height of a picture, of which one that is very tall does not fill its cell."""
    ratio = image.shape[0] / image.shape[1]
    height = min(ratio, TALL) * cell
    return height / ratio, height


def _write(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Put a text x, y inches from the figure's top left corner."""
    width, height = figure.get_size_inches()
    figure.text(x / width, 1 - y / height, text, **style)


def _place(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Add axes with their top left corner x, y inches from the figure's."""
    whole_width, whole = figure.get_size_inches()
    at = (x / whole_width, 1 - (y + height) / whole, width / whole_width, height / whole)
    return figure.add_axes(at)


@dataclass(frozen=True)
class _Panel:
    """One pair in a figure: its picture (H, W, 3) in [0, 1], of this size in inches, in cells."""

    figure: Figure
    pair: Shown
    picture: np.ndarray
    size: tuple[float, float]
    cell: float

    @property
    def room(self) -> float:
        """Height of a row of pictures."""
        return max(self.size[1], FLAT)

    def subject(self, top: float) -> None:
        """The image under its match score, and the scale of the heat maps below it."""
        axes = self.place(PAD, top + TITLE)
        _picture(axes, self.picture)
        score = f"match {self.pair.explanation.score:.2f}"
        axes.set_title(score, loc="center", color=ACCENT, pad=3)
        x, y = PAD, top + TITLE + self.room + GAP
        bar = _place(self.figure, x, y, self.cell, 0.06)
        ramp = np.linspace(0, 1, 256)[None]
        _picture(bar, heat_overlay(np.full((1, 256, 3), 0.9), ramp))
        style = {"va": "top", "color": MUTED}
        _write(self.figure, x, y + 0.09, "0", **style)
        _write(self.figure, x + self.cell, y + 0.09, "own max.", ha="right", **style)

    def words(self, row: Sequence[int], top: float) -> None:
        """A column for each word."""
        if not row:
            return
        heat, mask = top + TITLE, top + TITLE + self.room + GAP
        x, gauge = PAD + self.cell + LABEL / 2, mask + self.room
        mask_name = self.pair.explanation.mask_name.replace(" ×", "\n×")  # a row may be low
        for y, label in ((heat, "heat map"), (mask, mask_name)):
            style = {"rotation": 90, "ha": "center", "va": "center", "color": MUTED}
            _write(self.figure, x, y + self.room / 2, label, **style)
        told = "match:\nplain → masked"
        _write(self.figure, x + LABEL / 3, gauge + 0.03, told, ha="right", va="top", color=MUTED)
        for column, word in enumerate(row):
            self.word(word, PAD + self.cell + LABEL + column * (self.cell + GAP), heat, mask)

    def word(self, word: int, x: float, heat: float, mask: float) -> None:
        """Heat map, masked picture and scores of a word."""
        explanation, text = self.pair.explanation, self.pair.explanation.words[word]
        box = next((box for index, box, _ in self.pair.boxes if index == word), None)
        axes = self.place(x, heat)
        fitting = (self.cell + GAP) / (len(text) * 1.1 * LETTER)  # points; bold is wider
        axes.set_title(text, loc="center", pad=3, size=min(FONT, fitting))
        _picture(axes, heat_overlay(self.picture, explanation.cams[word].numpy()), box)
        masked = soft_masked(self.picture, explanation.masks[word].numpy())
        _picture(self.place(x, mask), masked, box)
        gauge = _place(self.figure, x, mask + self.room, self.cell, GAUGE)
        _gauge(gauge, explanation.score, float(explanation.masked_scores[word]))

    def place(self, x: float, y: float) -> Axes:
        """Axes of the picture's size, in the middle of its cell."""
        width, height = self.size
        x, y = x + (self.cell - width) / 2, y + (self.room - height) / 2
        return _place(self.figure, x, y, width, height)


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
    size = (max(1, pixels), max(1, round(pixels * image.shape[0] / image.shape[1])))
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
    axes.text(0.5, 0.55, f"{score:.2f} → {masked_score:.2f}", ha="center", va="top")
