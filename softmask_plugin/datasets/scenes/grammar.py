"""Scenes: a few coloured shapes on a plain ground, with captions that are true.

Everything about a scene follows from a seed, so the ground truth is exact: which captions are true,
and where in the image the thing lies that a word names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from softmask_plugin.errors import UserError, suggest

Box = tuple[float, float, float, float]
Composition = tuple[str, str]

COLOURS = {
    "red": (214, 40, 40),
    "orange": (243, 140, 22),
    "yellow": (238, 212, 40),
    "green": (44, 150, 62),
    "cyan": (60, 200, 216),
    "blue": (44, 74, 204),
    "pink": (240, 128, 186),
    "black": (34, 34, 38),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond", "crescent")
SIZES = ("small", "large")
LEFT, RIGHT, ABOVE, BELOW = "to the left of", "to the right of", "above", "below"
COMPOSITIONS: tuple[Composition, ...] = tuple((c, s) for c in COLOURS for s in SHAPES)

SPLITS = ("train", "val", "test")
MAX_OBJECTS = 4  # with more, some relations would be ambiguous
_BOARD = 3  # cells along a side of the board
_MARGIN = 0.02  # least distance of a thing from the image's edge
GAP = 0.03  # least distance between two things along the axis of their relation
_DOMINANCE = 1.5  # centres are at least this much farther apart along that axis than across it


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things may stand, and how large they are, in shares of the image's side."""

    diameters: dict[str, float]
    spread: float  # a diameter varies by up to this share of itself
    shrinks: bool  # whether more than two things are drawn smaller
    centres: Callable[[np.random.Generator, np.ndarray, int], np.ndarray]


def _on_board(rng: np.random.Generator, diameter: np.ndarray, tries: int) -> np.ndarray:
    cells = rng.integers(_BOARD, size=(tries, len(diameter), 2))
    return (cells + 0.5) / _BOARD


def _anywhere(rng: np.random.Generator, diameter: np.ndarray, tries: int) -> np.ndarray:
    low = diameter[:, None] / 2 + _MARGIN
    return low + (1 - 2 * low) * rng.random((tries, len(diameter), 2))


LAYOUTS = {
    # In the middle of the cells of a 3 x 3 board: shapes can be learned in minutes.
    "board": Layout({"small": 0.19, "large": 0.29}, 0, False, _on_board),
    # Anywhere: a small vision transformer takes several times as long to tell shapes apart.
    "free": Layout({"small": 0.26, "large": 0.42}, 0.07, True, _anywhere),
}


@dataclass(frozen=True, slots=True)
class Thing:
    """One object. ``x``, ``y`` (centre) and ``diameter`` are shares of the image's side."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    diameter: float

    @property
    def composition(self) -> Composition:
        """Colour and shape."""
        return self.colour, self.shape

    @property
    def box(self) -> Box:
        """Tight box (x0, y0, x1, y1) in [0, 1]: every shape is drawn to fill its square."""
        r = self.diameter / 2
        return self.x - r, self.y - r, self.x + r, self.y + r


@dataclass(frozen=True, slots=True)
class Scene:
    """Things of different (colour, shape), with a clear relation between any two."""

    things: tuple[Thing, ...]
    texture: int  # seed of the image's grain and shades

    @property
    def compositions(self) -> frozenset[Composition]:
        """The (colour, shape) pairs shown; no two scenes of val or test show the same set."""
        return frozenset(thing.composition for thing in self.things)


@dataclass(frozen=True, slots=True)
class Caption:
    """A sentence and, for each word that names a thing, its index in ``text.split()``, the thing's
    box (x0, y0, x1, y1) in [0, 1], and the word's role: "size", "colour" or "shape"."""

    text: str
    boxes: tuple[tuple[int, Box, str], ...]


def heldout_compositions(fraction: float) -> frozenset[Composition]:
    """Return the (colour, shape) pairs that training never shows, whatever the seed.

    ``fraction``, in [0, 0.5], is their share of all pairs. They lie along the diagonals of the
    colour × shape table, so every colour and shape loses about the same share of its partners.
    """

    def diagonal(pair: Composition) -> int:
        return (SHAPES.index(pair[1]) - list(COLOURS).index(pair[0])) % len(SHAPES)

    ordered = sorted(COMPOSITIONS, key=diagonal)
    return frozenset(ordered[: round(fraction * len(ordered))])


def allowed_compositions(split: str, heldout: float) -> list[Composition]:
    """Return the (colour, shape) pairs that a split may show: ``train`` shows none held out."""
    kept_back = heldout_compositions(heldout) if split == "train" else ()
    return [pair for pair in COMPOSITIONS if pair not in kept_back]


def relation(a: Thing, b: Thing) -> str:
    """Return the relation that makes "a <relation> b" true, along the axis that separates more."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > abs(dy):
        return LEFT if dx < 0 else RIGHT
    return ABOVE if dy < 0 else BELOW


def captions(scene: Scene) -> list[Caption]:
    """Write the captions of a scene; each is true and names every thing by colour and shape.

    In order: the first thing's relations to the others, with sizes; the same seen from the last
    thing; the first without sizes; two lists without relations. One thing alone has only four.
    """
    there, back = scene.things, scene.things[::-1]
    drafts = (
        _write("", there),
        _write("", back),
        _write("a picture of", there, sized=False),
        _write("there is", there, related=False),
        _write("", back, sized=False, related=False),
    )
    return list({draft.text: draft for draft in drafts}.values())


def make_scenes(
    split: str,
    num: int,
    seed: int = 0,
    objects: int = 2,
    heldout: float = 0.125,
    layout: str = "board",
) -> list[Scene]:
    """Make the first ``num`` scenes of a split.

    Scene i depends only on (seed, split, i); in val and test also on the scenes before it, since
    there no two scenes show the same set of compositions, so that a caption fits only one scene.

    Args:
        split: ``train`` (never shows a held-out composition), ``val`` or ``test``.
        num, seed: How many, and the random seed, >= 0.
        objects: Things per scene, 1 to MAX_OBJECTS.
        heldout: Share of the (colour, shape) pairs kept from training, in [0, 0.5].
        layout: Where things may stand: a name in LAYOUTS.

    Raises:
        UserError: An unknown split or layout, or fewer than ``num`` different scenes.
    """
    if split not in SPLITS:
        raise UserError(f"scenes have no split '{split}': {suggest(split, SPLITS)}")
    if layout not in LAYOUTS:
        raise UserError(f"scenes have no layout '{layout}': {suggest(layout, LAYOUTS)}")
    most = math.comb(len(COMPOSITIONS), objects)
    if split != "train" and num > most:
        raise UserError(
            f"{num} {split} scenes of {objects} object(s) cannot all differ, only {most} do: "
            "ask for fewer"
        )
    allowed = allowed_compositions(split, heldout)
    scenes: list[Scene] = []
    seen: set[frozenset[Composition]] = set()
    for index in range(num):
        rng = np.random.default_rng((seed, SPLITS.index(split), index))
        while True:
            shown = [allowed[i] for i in rng.choice(len(allowed), objects, replace=False)]
            if split == "train" or frozenset(shown) not in seen:
                break
        seen.add(frozenset(shown))
        scenes.append(Scene(_place(rng, shown, LAYOUTS[layout]), int(rng.integers(2**63))))
    return scenes


def article(word: str) -> str:
    """``a`` or ``an``."""
    return "an" if word[0] in "aeiou" else "a"


def _place(
    rng: np.random.Generator, shown: Sequence[Composition], layout: Layout
) -> tuple[Thing, ...]:
    """Draw sizes and places: the first random arrangement with clear relations."""
    count = len(shown)
    sizes = [SIZES[i] for i in rng.integers(len(SIZES), size=count)]
    diameter = np.array([layout.diameters[s] for s in sizes])
    diameter *= rng.uniform(1 - layout.spread, 1 + layout.spread, count)
    if layout.shrinks:
        diameter *= min(1, 2 / count)
    while True:
        places = layout.centres(rng, diameter, 64)
        clear = np.ones(len(places), dtype=bool)
        for i, j in combinations(range(count), 2):
            apart = np.abs(places[:, i] - places[:, j])
            along, across = apart.max(axis=1), apart.min(axis=1)
            clear &= along >= _DOMINANCE * across
            clear &= along >= (diameter[i] + diameter[j]) / 2 + GAP
        if clear.any():
            break
    centres = places[clear.argmax()].tolist()
    things = zip(shown, sizes, centres, diameter.tolist(), strict=True)
    return tuple(Thing(*pair, size, x, y, d) for pair, size, (x, y), d in things)


def _write(
    opening: str, things: Sequence[Thing], sized: bool = True, related: bool = True
) -> Caption:
    """Name the things after an opening: the first one's relations to the others, or a list."""
    words, boxes = opening.split(), []
    for i, thing in enumerate(things):
        if i > 1 or (i == 1 and not related):
            words.append("and")
        if i and related:
            words += relation(things[0], thing).split()
        roles = ("size", "colour", "shape") if sized else ("colour", "shape")
        words.append(article(getattr(thing, roles[0])))
        for role in roles:
            boxes.append((len(words), thing.box, role))
            words.append(getattr(thing, role))
    return Caption(" ".join(words), tuple(boxes))
