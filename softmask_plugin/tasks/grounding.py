"""Grounding without boxes in training: which candidate box do an expression's words point at?

ALBEF's evaluation on RefCOCO+ (arXiv 2107.07651, 4.4) and the pointing game (Zhang et al., ECCV
2016), both with the word maps that the soft mask trains with.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lavis.common.dist_utils import is_main_process
from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask
from torchvision.ops.boxes import box_iou

from softmask_plugin.config.run_options import setting
from softmask_plugin.errors import UserError, require_finite_scores
from softmask_plugin.explain.maps import phrase_maps, word_maps
from softmask_plugin.models.aligned import AlignedBase
from softmask_plugin.pointing import Box, energy_inside, hits
from softmask_plugin.registry import register

POINTING = ("pointing", "pointing_chance", "pointing_other", "pointing_gap")
METRICS = ("acc", "acc_chance", *POINTING)
TIED = 1 - 1e-9  # scores that differ by rounding alone are equal


@register("task", "softmask_grounding")
class GroundingTask(BaseTask):
    """Find the object that an expression refers to, by the maps of its words.

    ``run.grounding_alpha`` weighs size: a candidate box scores the map's mass inside it divided by
    ``area ** grounding_alpha``, so 0 favours large boxes and 1 small ones.

    A data set has an attribute ``annotation``, a list of ``{"box": the true box, "boxes":
    candidates, "group": name}`` with boxes ``(x0, y0, x1, y1)`` in [0, 1], and samples ``{"image",
    "text_input", "instance_id", "index": position in annotation}``.

    Metrics are in percent, for all items and, with the suffix ``_<group>``, for each group:

    - ``acc``: the best candidate's IoU with the true box is above 0.5 (ALBEF's code: 0.5 or more);
    - ``acc_chance``: the same for a candidate drawn at random;
    - ``pointing``: the map's peak, the centre of a patch, lies in the true box;
    - ``pointing_chance``: the same for a patch drawn at random;
    - ``pointing_other``: the peak lies in another candidate's box instead, one whose IoU with the
      true box is at most 0.5;
    - ``pointing_gap``: ``pointing`` less ``pointing_other``. On a plain ground even maps that
      ignore the words prefer things to the ground; only the gap is due to the words.

    Each of n tied candidates or peaks counts 1/n. ``agg_metrics`` is ``acc``.

    Raises:
        UserError: ``grounding_alpha`` is not a number >= 0, the model has no matching head, the
            data set has no boxes, or a map is NaN or infinite.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not alpha >= 0:
            raise UserError(f"run.grounding_alpha is {alpha!r}: it must be a number >= 0")
        self.alpha = alpha
        self.annotation: list[dict[str, Any]] = []

    @classmethod
    def setup_task(cls, cfg: Any) -> GroundingTask:
        """Build the task from the ``run:`` section of a YAML."""
        return cls(setting(cfg.run_cfg, "grounding_alpha"))

    def before_evaluation(self, model: Any, dataset: Any, **rest: Any) -> None:
        """Keep the boxes of the data set that is evaluated next."""
        if not isinstance(model, AlignedBase):
            raise UserError(
                f"run.task softmask_grounding cannot evaluate {type(model).__name__}, which has no "
                "matching head to explain: use softmask_pretrain, softmask_retrieval or "
                "softmask_image_text_matching"
            )
        annotation = getattr(dataset, "annotation", None)
        if not annotation or not {"box", "boxes", "group"} <= annotation[0].keys():
            raise UserError(
                f"run.task softmask_grounding cannot evaluate {type(dataset).__name__}, which has "
                "no boxes: use a data set made for it, such as refcoco_plus_grounding"
            )
        self.annotation = annotation
        super().before_evaluation(model, dataset, **rest)

    def valid_step(self, model: Any, samples: dict[str, Any]) -> list[dict[str, Any]]:
        """Score one batch.

        Returns:
            For each item its ``instance_id`` and ``index``, ``text`` and ``group``; ``peak`` (x, y)
            of its map in [0, 1], the first one if several are tied; ``hit`` and ``chance``, see
            ``pointing.hits``; ``other``, the share of peaks in other boxes; ``scores`` of the
            candidate boxes, in their order; and ``acc``, whether the best of them is right.
        """
        heat = phrase_maps(word_maps(model, samples["image"], samples["text_input"])).double()
        require_finite_scores("a heat map", heat)
        maps, indices = heat.cpu().numpy(), samples["index"].tolist()
        items = [self.annotation[index] for index in indices]
        hit, chance = hits(maps, [item["box"] for item in items])
        other = hits(maps, [[item["box"], *_others(item)] for item in items])[0] - hit
        scores = box_scores(maps, [item["boxes"] for item in items], self.alpha)
        height, width = maps.shape[1:]
        row, column = np.divmod(maps.reshape(len(maps), -1).argmax(axis=1), width)
        peaks = np.stack([(column + 0.5) / width, (row + 0.5) / height], axis=1)
        return [
            {
                self.inst_id_key: samples[self.inst_id_key][i],
                "index": index,
                **{key: items[i][key] for key in ("image", "group") if key in items[i]},
                "text": samples["text_input"][i],
                "peak": peaks[i].tolist(),
                "hit": float(hit[i]),
                "chance": float(chance[i]),
                "other": float(other[i]),
                "scores": scores[i].tolist(),
                "acc": _accuracy(scores[i].tolist(), items[i])[0],
            }
            for i, index in enumerate(indices)
        ]

    def after_evaluation(
        self, val_result: list[dict[str, Any]], split_name: str, **_: Any
    ) -> dict[str, float] | None:
        """Merge the results of all processes; metrics on the main process, None on the others."""
        file = self.save_result(
            val_result,
            result_dir=registry.get_path("result_dir"),
            filename=f"{split_name}_grounding",
            remove_duplicate=self.inst_id_key,
        )
        if not is_main_process():
            return None
        results = json.loads(Path(file).read_text(encoding="utf-8"))
        metrics = grounding_metrics(results, self.annotation)
        logging.info("grounding: %s", metrics)
        # Where LAVIS's own tasks write theirs
        file = Path(registry.get_path("output_dir"), "evaluate.txt")
        with file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(metrics) + "\n")
        return metrics


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
    results: list[dict[str, Any]], annotation: list[dict[str, Any]]
) -> dict[str, float]:
    """Metrics of :class:`GroundingTask` from the results of its ``valid_step``."""
    rows: dict[str, list[tuple[float, ...]]] = {}
    for result in results:
        item = annotation[result["index"]]
        pointing = (result["hit"], result["chance"], result["other"])
        row = (*_accuracy(result["scores"], item), *pointing, result["hit"] - result["other"])
        for suffix in ("", f"_{item['group']}"):
            rows.setdefault(suffix, []).append(row)
    metrics = {
        name + suffix: 100 * value
        for suffix, values in rows.items()
        for name, value in zip(
            METRICS,
            np.mean(values, axis=0).tolist(),
            strict=True,
        )
    }
    return {**metrics, "agg_metrics": metrics["acc"]}


def _accuracy(scores: list[float], item: dict[str, Any]) -> tuple[float, float]:
    """Whether the best candidate is right, and the share of right ones; 0 without candidates."""
    if not scores:
        return 0.0, 0.0
    right = _right(item).astype(float)
    best = np.asarray(scores) >= TIED * max(scores)
    return float(right[best].mean()), float(right.mean())


def _others(item: dict[str, Any]) -> list[Box]:
    """The candidates that are not right."""
    return [box for box, right in zip(item["boxes"], _right(item), strict=True) if not right]


def _right(item: dict[str, Any]) -> np.ndarray:
    """Whether the IoU of each candidate with the true box is above 0.5."""
    boxes = (
        torch.tensor(each, dtype=torch.float64).view(-1, 4) for each in (item["boxes"], item["box"])
    )
    return (box_iou(*boxes)[:, 0] > 0.5).numpy()
