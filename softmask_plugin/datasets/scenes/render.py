"""Draw a scene: flat shapes with soft edges on a light, slightly grainy ground."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from softmask_plugin.datasets.scenes.grammar import COLOURS, Box, Scene

_CANVAS = 512  # each shape is drawn once at this size, then reduced, which smooths its edges


def _circle(radius: float = 1.0, x: float = 0.0) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 181)
    return np.stack([x + radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _star() -> np.ndarray:
    angle, radius = np.arange(10) * np.pi / 5, np.tile([1.0, 0.42], 5)
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


def _cross() -> np.ndarray:
    a = 0.34  # half the width of an arm
    right = [(a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1)]
    return np.array(right + [(-x, y) for x, y in reversed(right)])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 181)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([np.sin(t) ** 3, -y / 17], axis=1)


# Outlines within [-1, 1], y down. A second outline is cut out of the first.
OUTLINES: dict[str, tuple[np.ndarray, ...]] = {
    "circle": (_circle(),),
    "square": (np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),),
    "triangle": (np.array([(0, -1), (1, 1), (-1, 1)]),),
    "star": (_star(),),
    "cross": (_cross(),),
    "ring": (_circle(), _circle(0.56)),
    "heart": (_heart(),),
    "diamond": (np.array([(0, -1), (1, 0), (0, 1), (-1, 0)]),),
    "crescent": (_circle(), _circle(0.82, x=0.5)),
}


@lru_cache(maxsize=4096)
def stencil(shape: str, width: int, height: int) -> Image.Image:
    """Coverage of a shape, 0 to 255, on ``width`` × ``height`` pixels, which it fills."""
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    draw = ImageDraw.Draw(canvas)
    for outline, fill in zip(OUTLINES[shape], (255, 0), strict=False):
        corners = (outline + 1) / 2 * (_CANVAS - 1)
        draw.polygon([tuple(corner) for corner in corners.tolist()], fill=fill)
    return canvas.crop(canvas.getbbox()).resize((width, height), Image.Resampling.BOX)


def render_item(size: int, item: dict[str, Any], min_side: int | None) -> list[Image.Image]:
    """Draw the ``scenes`` of a data set's item, the first behind its ``curtain`` if it has one."""
    images = [render(scene, size) for scene in item["scenes"]]
    if "curtain" in item:
        _draw_curtain(images[0], item["curtain"])
    return images


def render(scene: Scene, size: int) -> Image.Image:
    """Draw a scene as an RGB image of ``size`` × ``size`` pixels; boxes are exact to half a pixel.

    The scene's ``texture`` seeds grain and shades.
    """
    rng = np.random.default_rng(scene.texture)
    shades = rng.integers(-7, 8, size=(len(scene.things) + 1, 3)).tolist()
    ground = int(rng.integers(212, 230))
    image = Image.new("RGB", (size, size), _shaded((ground, ground, ground), shades[-1]))
    for thing, shade in zip(scene.things, shades, strict=False):
        x0, y0, x1, y1 = (round(edge * size) for edge in thing.box)
        shape = stencil(thing.shape, x1 - x0, y1 - y0)
        image.paste(_shaded(COLOURS[thing.colour], shade), (x0, y0), shape)
    grain = rng.integers(0, 10, size=(size, size, 1), dtype=np.uint8)
    return Image.fromarray(np.asarray(image) + grain)


def _shaded(colour: tuple[int, int, int], shade: list[int]) -> tuple[int, ...]:
    # At most 245, which leaves the grain room below 255.
    return tuple(min(245, max(0, c + s)) for c, s in zip(colour, shade, strict=True))


def _draw_curtain(image: Image.Image, box: Box) -> None:
    """Cover a part of the image with an opaque grey curtain, pleated lest it look like a square."""
    x0, y0, x1, y1 = (round(edge * image.width) for edge in box)
    pleats = np.arange(x1 - x0) * 30 // image.width % 2
    greys = np.where(pleats, 150, 95).astype(np.uint8)
    image.paste(Image.fromarray(np.tile(greys, (y1 - y0, 1))), (x0, y0))
