"""The pointing game: does a word's heat map peak on the object that the word names?

After Zhang et al., "Top-down Neural Attention by Excitation Backprop" (ECCV 2016), on a patch grid.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from softmask_plugin.errors import one_line

Box = tuple[float, float, float, float]


def pointing_game(samples: Iterable[tuple[ArrayLike, Box, str]]) -> dict[str, dict[str, float]]:
    """Score heat maps against the boxes of the objects that their words name.

    Args:
        samples: ``(map, box, role)`` for each word. The map is (h, w), finite and >= 0; the box is
            ``(x0, y0, x1, y1)`` in [0, 1], from the image's top left corner; the role groups the
            results (``"shape"``, ``"colour"``, ``"size"``).

    Returns:
        A dict for each role and one for ``"all"``, with means over the words; empty if there are
        no samples:
        ``hit``: share of maps whose peak patch has its centre in the box; each of n tied peaks
        counts 1/n, so a constant map scores exactly ``chance``;
        ``chance``: share of all patch centres that lie in the box;
        ``energy_inside``: see :func:`energy_inside`;
        ``area``: share of the image that the box covers, which is a constant map's energy;
        ``count``: number of words.

    Raises:
        ValueError: A map is not 2-D, not finite or negative; a box is empty or not in [0, 1].
    """
    rows: dict[str, list[tuple[float, ...]]] = {}
    for heat, box, role in samples:
        heat = np.asarray(heat, dtype=np.float64)
        if heat.ndim != 2 or heat.size == 0 or not np.isfinite(heat).all() or heat.min() < 0:
            raise ValueError(f"a heat map must be (h, w), finite and >= 0; got shape {heat.shape}")
        if not is_box(box):
            raise ValueError(f"a box must be (x0, y0, x1, y1) with 0 <= x0 < x1 <= 1; got {box}")
        x0, y0, x1, y1 = box
        (hit,), (chance,) = hits(heat[None], [box])
        row = hit, chance, *energy_inside(heat[None], box), (x1 - x0) * (y1 - y0)
        for group in ("all", role):
            rows.setdefault(group, []).append(row)
    names = ("hit", "chance", "energy_inside", "area", "count")
    return {
        group: dict(zip(names, [*np.mean(values, axis=0).tolist(), len(values)], strict=True))
        for group, values in rows.items()
    }


def own_and_other(samples: Collection[tuple[ArrayLike, Box, Sequence[Box]]]) -> dict[str, float]:
    """Do maps lie on the thing that their word names, or on another thing of the image?

    Args:
        samples: ``(map, box of the named thing, boxes of the others)``, at least one of each.

    Returns:
        Means: ``own`` and ``other``, the shares of maps that peak on the named thing and on another
        one; ``gap``, their difference, 0 for maps that ignore their words; ``chance``, the share of
        patches on the named thing; ``chosen``, the share of maps with more mass in the named box
        than in any other, where guessing scores 1 / (number of boxes); and ``count``.
    """
    heat = np.stack([np.asarray(each, dtype=np.float64) for each, _, _ in samples])
    box, others = [own for _, own, _ in samples], [rest for _, _, rest in samples]
    own, chance = hits(heat, box)
    other = hits(heat, [[b, *rest] for b, rest in zip(box, others, strict=True)])[0] - own
    inside = energy_inside(heat, box)
    counts = [len(rest) for rest in others]
    rivals = energy_inside(heat.repeat(counts, axis=0), np.concatenate(others))
    rival = np.maximum.reduceat(rivals, np.cumsum([0, *counts[:-1]]))
    chosen = np.heaviside(inside - rival, 0.5)
    names = ("own", "other", "gap", "chance", "chosen")
    means = (float(each.mean()) for each in (own, other, own - other, chance, chosen))
    return {**dict(zip(names, means, strict=True)), "count": len(heat)}


def is_box(box: Box) -> bool:
    """Whether a box covers a part of the image, and nothing outside of it."""
    x0, y0, x1, y1 = box
    return 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


def hits(maps: np.ndarray, boxes: Sequence[ArrayLike]) -> tuple[np.ndarray, np.ndarray]:
    """Play the pointing game with N maps (N, h, w), each with a box (4,) or any number, (K_i, 4).

    Returns:
        ``hit``, the share of each map's (tied) peaks whose patch has its centre in one of the map's
        boxes, (N,); and ``chance``, the share of all patch centres that lie in them, (N,).
    """
    owned = [np.reshape(each, (-1, 4)) for each in boxes]
    x0, y0, x1, y1 = _sides(np.concatenate(owned))
    y, x = ((np.arange(n) + 0.5) / n for n in maps.shape[1:])  # centres of rows and columns
    within = ((y0 <= y) & (y <= y1))[:, :, None] & ((x0 <= x) & (x <= x1))[:, None, :]
    inside = np.zeros(maps.shape, dtype=bool)
    owners = np.repeat(np.arange(len(maps)), [len(each) for each in owned])
    np.logical_or.at(inside, owners, within)
    peaks = maps == maps.max(axis=(1, 2), keepdims=True)
    hit = (peaks & inside).sum(axis=(1, 2)) / peaks.sum(axis=(1, 2))
    return hit, inside.mean(axis=(1, 2))


def energy_inside(maps: np.ndarray, boxes: ArrayLike) -> np.ndarray:
    """Share of each map's mass that lies in its box: (N, h, w), (N, 4) -> (N,).

    A patch on the box's edge counts by its part inside; an all-zero map counts as constant.
    """
    x0, y0, x1, y1 = _sides(boxes)
    height, width = maps.shape[1:]
    rows = np.diff(np.clip(np.arange(height + 1) / height, y0, y1))  # length of each in the box
    columns = np.diff(np.clip(np.arange(width + 1) / width, x0, x1))
    overlap = height * width * rows[:, :, None] * columns[:, None, :]
    peak = maps.max(axis=(1, 2), keepdims=True)
    heat = np.where(peak > 0, maps / np.where(peak > 0, peak, 1), 1)
    return (heat * overlap).sum(axis=(1, 2)) / heat.sum(axis=(1, 2))


def group_suffixes(group: str | Sequence[str] | None) -> list[str]:
    """Suffixes of the metrics that a result counts for: ``_<group>``, or ``/<type>`` for each type.

    Types of phrases have a sign of their own: Flickr30k Entities calls one "other", and
    ``pointing_other`` is a metric. A file may call them anything, and terminals print them.
    """
    if group is None or isinstance(group, str):
        return [f"_{one_line(group)}"] if group else []
    return [f"/{one_line(name)}" for name in group]


def _sides(boxes: ArrayLike) -> np.ndarray:
    """Left, upper, right and lower sides of N boxes: (N, 4) -> (4, N, 1)."""
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4).T[..., None]
