"""Grounding without boxes in training: which box do the words of an expression point at?

ALBEF's evaluation on RefCOCO+ (arXiv 2107.07651, 4.4) and the pointing game (Zhang et al., ECCV
2016), also on phrases of captions, all with the word maps that the soft mask trains with.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops.boxes import box_iou

from softmask_plugin.config.run_options import setting
from softmask_plugin.errors import require_finite_scores
from softmask_plugin.explain.lavis_models import WITH_HEAD, matcher_of
from softmask_plugin.explain.maps import phrase_maps, word_maps
from softmask_plugin.pointing import Box, energy_inside, group_suffixes, hits
from softmask_plugin.registry import register
from softmask_plugin.tasks.items import ItemTask

POINTING = ("pointing", "pointing_chance", "pointing_center", "pointing_other", "pointing_gap")
METRICS = ("acc", "acc_chance", *POINTING)
TOLD = ("image", "text", "phrase", "group")  # of the annotation, to keep with results
TIED = 1 - 1e-9  # scores that differ by rounding alone are equal


@register("task", "softmask_grounding")
class GroundingTask(ItemTask):
    """Find the object that an expression refers to, by the maps of its words.

    ``run.grounding_alpha`` weighs size: a candidate box scores the map's mass inside it divided by
    ``area ** grounding_alpha``, so 0 favours large boxes and 1 small ones.

    A data set has an attribute ``annotation``, a list of ``{"box": the true box, "boxes":
    candidates, "group": name}`` with boxes ``(x0, y0, x1, y1)`` in [0, 1], and samples ``{"image",
    "text_input", "instance_id", "index": position in annotation}``.

    Or it has phrases: ``{"image": name, "boxes": those of all phrases of the image, "phrases":
    [{"words": numbers of the phrase's words in the text, "box": list of its boxes, "group": list
    of names}]}``. A phrase's map is the mean over its words, and one pass maps all phrases of a
    text. A phrase of several things is found in any of their boxes, as the literature counts it
    (Gupta et al., arXiv 2006.09920), and has no ``acc``, for which the literature needs a
    detector's boxes.

    Metrics are in percent, for all items and for each group, with the suffix ``_<group>`` or,
    for phrases, ``/<group>``:

    - ``acc``: the best candidate's IoU with the true box is above 0.5 (ALBEF's code: 0.5 or more);
    - ``acc_chance``: the same for a candidate drawn at random;
    - ``pointing``: the map's peak, the centre of a patch, lies in the true box;
    - ``pointing_chance``: the same for a patch drawn at random;
    - ``pointing_center``: the same for the centre of the image, where photographers put things;
    - ``pointing_other``: the peak lies in another candidate's box instead, one whose IoU with the
      true box is at most 0.5;
    - ``pointing_gap``: ``pointing`` less ``pointing_other``. On a plain ground even maps that
      ignore the words prefer things to the ground; only the gap is due to the words.

    Each of n tied candidates or peaks counts 1/n. ``agg_metrics`` is ``acc``, for phrases
    ``pointing``.

    Raises:
        UserError: ``grounding_alpha`` is not a number >= 0, the model has no matching head, the
            data set has no boxes, or a map is NaN or infinite.
    """

    KIND = "grounding"
    NEEDED = ("boxes", "refcoco_plus_grounding")
    MODELS = WITH_HEAD

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.items: list[dict[str, Any]] = []  # what each map has to find

    @classmethod
    def setup_task(cls, cfg: Any) -> GroundingTask:
        """Build the task from the ``run:`` section of a YAML."""
        return cls(setting(cfg.run_cfg, "grounding_alpha"))

    def is_suitable(self) -> bool:
        """Number the expressions or phrases of all items; whether these have boxes."""
        self.items = [item for entry in self.annotation for item in _items(entry)]
        self.starts = [0, *accumulate(len(_items(entry)) for entry in self.annotation)]
        return {"box", "boxes", "group"} <= {*chain(*self.items[:1])}

    def valid_step(self, model: Any, samples: dict[str, Any]) -> list[dict[str, Any]]:
        """Score one batch.

        Returns:
            For each expression or phrase its ``index`` among all, which is its ``instance_id`` too,
            and what the annotation says of it; ``peak`` (x, y) of its map in [0, 1], the first one
            if several are tied; ``hit`` and ``chance``, see ``pointing.hits``; ``other``, the share
            of peaks in other boxes; and, unless it is a phrase, ``scores`` of the candidate boxes,
            in their order, and ``acc``, whether the best of them is right.
        """
        entries = samples["index"].tolist()
        indices = [n for i in entries for n in range(self.starts[i], self.starts[i + 1])]
        items = [self.items[index] for index in indices]
        heat = _maps(model, samples, [self.annotation[i] for i in entries]).double()
        require_finite_scores("a heat map", heat)
        maps = heat.cpu().numpy()
        hit, chance = hits(maps, [item["box"] for item in items])
        both = [[*_boxes(item["box"]), *_boxes(item["boxes"])[~_right(item)]] for item in items]
        other = hits(maps, both)[0] - hit
        height, width = maps.shape[1:]
        row, column = np.divmod(maps.reshape(len(maps), -1).argmax(axis=1), width)
        peaks = np.stack([(column + 0.5) / width, (row + 0.5) / height], axis=1)
        results = [
            {
                self.inst_id_key: str(index),
                "index": index,
                **{key: items[i][key] for key in TOLD if key in items[i]},
                "peak": peaks[i].tolist(),
                "hit": float(hit[i]),
                "chance": float(chance[i]),
                "other": float(other[i]),
            }
            for i, index in enumerate(indices)
        ]
        if "words" in items[0]:
            return results
        scores = box_scores(maps, [item["boxes"] for item in items], self.alpha)
        return [
            {**result, "scores": own.tolist(), "acc": _accuracy(own.tolist(), item)[0]}
            for result, item, own in zip(results, items, scores, strict=True)
        ]

    def metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Metrics of the results of all items, see above."""
        return grounding_metrics(results, self.items)


def box_scores(maps: np.ndarray, boxes: Sequence[Sequence[Box]], alpha: float) -> list[np.ndarray]:
    """Score the candidate boxes of each map: ``energy_inside`` a box, over ``area ** alpha``.

    ALBEF does not scale maps to a mass of 1, which changes no ranking within an image, and resizes
    them to pixels.

    Args:
        maps: (B, h, w), finite, >= 0.
        boxes: (K_i, 4) for each map, ``(x0, y0, x1, y1)`` in [0, 1], none empty.

    Returns:
        (K_i,) for each map.
    """
    counts = [len(candidates) for candidates in boxes]
    flat = np.concatenate([np.reshape(candidates, (-1, 4)) for candidates in boxes])
    area = (flat[:, 2:] - flat[:, :2]).prod(axis=1)
    scores = energy_inside(maps.repeat(counts, axis=0), flat) / area**alpha
    return np.split(scores, np.cumsum(counts)[:-1])


def grounding_metrics(
    results: list[dict[str, Any]], items: list[dict[str, Any]]
) -> dict[str, float]:
    """Metrics of :class:`GroundingTask` from the results of its ``valid_step``.

    ``items`` are the expressions, or the phrases, each with the ``boxes`` of its image.
    """
    names = METRICS if "scores" in results[0] else POINTING
    rows: dict[str, list[tuple[float, ...]]] = {}
    for result in results:
        item = items[result["index"]]
        accuracy = _accuracy(result["scores"], item) if "scores" in result else ()
        hit, chance, other = (result[key] for key in ("hit", "chance", "other"))
        ((center,), _) = hits(np.ones((1, 1, 1)), [item["box"]])  # one patch, the whole image
        row = (*accuracy, hit, chance, center, other, hit - other)
        for suffix in ("", *group_suffixes(item["group"])):
            rows.setdefault(suffix, []).append(row)
    metrics = {
        name + suffix: 100 * value
        for suffix, values in rows.items()
        for name, value in zip(names, np.mean(values, axis=0).tolist(), strict=True)
    }
    return {**metrics, "agg_metrics": metrics.get("acc", metrics["pointing"])}


def _items(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The phrases of an entry, with what it says of them all, or itself."""
    return [{**entry, **phrase} for phrase in entry.get("phrases", [entry])]


def _maps(model: Any, samples: dict[str, Any], entries: list[dict[str, Any]]) -> Tensor:
    """The maps of all items of a batch, (N, h, w)."""
    images, texts = samples["image"], samples["text_input"]
    if "phrases" not in entries[0]:
        return phrase_maps(word_maps(model, images, texts))
    phrases, matcher = [], matcher_of(model)
    for row, (text, entry) in enumerate(zip(texts, entries, strict=True)):
        split = matcher.caption_tokenizer.split_words(text)
        for phrase in entry["phrases"]:
            phrases.append((row, [number for n in phrase["words"] for number in split[n]]))
    names = [entry["image"] for entry in entries]
    _, first, owners = np.unique(names, return_index=True, return_inverse=True)
    owners = torch.as_tensor(owners, device=model.device)
    words = word_maps(matcher, images[torch.as_tensor(first)], texts, owners, phrases)
    return phrase_maps(words, phrases)


def _accuracy(scores: list[float], item: dict[str, Any]) -> tuple[float, float]:
    """Whether the best candidate is right, and the share of right ones; 0 without candidates."""
    if not scores:
        return 0.0, 0.0
    right = _right(item).astype(float)
    best = np.asarray(scores) >= TIED * max(scores)
    return float(right[best].mean()), float(right.mean())


def _right(item: dict[str, Any]) -> np.ndarray:
    """Whether the IoU of each candidate with a true box is above 0.5."""
    boxes = (torch.from_numpy(_boxes(item[key])) for key in ("boxes", "box"))
    return (box_iou(*boxes) > 0.5).any(dim=1).numpy()


def _boxes(boxes: Any) -> np.ndarray:
    """One box or several: (K, 4)."""
    return np.reshape(np.asarray(boxes, dtype=np.float64), (-1, 4))
