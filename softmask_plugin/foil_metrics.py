"""Metrics of captions against foils, with intervals: pure functions of saved scores.

A result is ``{"itm", "itc", "image", "group"}`` and perhaps ``"pair"``, as ``softmask_foils`` saves
it: ``itm`` are the log-odds of a match of the caption and of the foil, ``itc`` their cosines with
the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, stdtrit  # scipy.stats takes most of a second to import

from softmask_plugin.errors import one_line

Result = Mapping[str, Any]


def foil_metrics(results: Sequence[Result]) -> dict[str, float]:
    """Metrics of the task, in percent: see :class:`softmask_plugin.tasks.foils.FoilsTask`."""
    metrics = _metrics(results)
    for group in sorted({str(row["group"]) for row in results}):
        found = _metrics([row for row in results if str(row["group"]) == group])
        named = {f"{name}_{one_line(group)}": value for name, value in found.items()}
        metrics = {**metrics, **named, **metrics}  # even if a group is called itc
    return {**metrics, "agg_metrics": metrics["acc"]}


def _metrics(results: Sequence[Result]) -> dict[str, float]:
    members: dict[Any, list[Result]] = {}
    for row in results:
        members.setdefault(row.get("pair"), []).append(row)
    members.pop(None, None)
    whole = {name: rows for name, rows in members.items() if len(rows) == 2}  # both were readable
    scores, pair_scores = item_scores(results), _pair_scores([*whole.values()])
    units = units_of(results)
    unit = {row.get("pair"): each for row, each in zip(results, units, strict=True)}
    return _means(scores, units) | _means(pair_scores, np.array([unit[name] for name in whole]))


def units_of(results: Sequence[Result]) -> np.ndarray:
    """Number of each result's unit, (N,): those that share an image or a pair, or are linked by
    others that do, are not independent."""
    names = (
        [f"{n}, alone" if row.get(key) is None else str(row[key]) for n, row in enumerate(results)]
        for key in ("image", "pair")
    )
    image, pair = (np.unique(each, return_inverse=True)[1] for each in names)
    pair = pair + len(results)
    links = coo_matrix((np.ones(len(image)), (image, pair)), shape=(2 * len(image),) * 2)
    return connected_components(links, directed=False)[1][image]


def item_scores(results: Sequence[Result]) -> dict[str, np.ndarray]:
    """``acc``, ``acc_itc``, ``right`` and ``wrong`` of each of N results, (N,), in [0, 1]."""
    itm, itc = (np.array([row[key] for row in results], dtype=float) for key in ("itm", "itc"))
    acc, acc_itc = (np.heaviside(each[:, 0] - each[:, 1], 0.5) for each in (itm, itc))
    right, wrong = expit(itm).T
    return {"acc": acc, "acc_itc": acc_itc, "right": right, "wrong": wrong}


def _pair_scores(pairs: Sequence[Sequence[Result]]) -> dict[str, np.ndarray]:
    """Winoground's scores of each pair."""
    itm = np.array([[row["itm"] for row in rows] for rows in pairs], dtype=float)
    caption, foil = itm.reshape(-1, 2, 2).transpose(2, 0, 1)  # (pairs, images) each
    text, image = (caption > foil).all(axis=1), (caption > foil[:, ::-1]).all(axis=1)
    scores = {"text": text, "image": image, "group": text & image}
    return {name: each.astype(float) for name, each in scores.items()}


def _means(values: Mapping[str, np.ndarray], units: np.ndarray) -> dict[str, float]:
    """Means in percent and, if there are two units or more, half of their 95% intervals.

    The standard error is the cluster-robust one of a mean (Liang & Zeger, 1986).
    """
    if not len(units):
        return {}
    found = {name: 100 * float(each.mean()) for name, each in values.items()}
    kept, unit = np.unique(units, return_inverse=True)
    if (count := len(kept)) > 1:
        wide = stdtrit(count - 1, 0.975) * np.sqrt(count / (count - 1)) / len(units)
        for name, each in values.items():
            sums = np.bincount(unit, each - each.mean())
            found[f"{name}_interval"] = 100 * float(wide * np.sqrt((sums**2).sum()))
    return found
