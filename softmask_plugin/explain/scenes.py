"""Where the maps of words lie on rendered scenes, whose boxes are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from softmask_plugin.datasets.scenes.grammar import Box
from softmask_plugin.datasets.scenes.tasks import name_things
from softmask_plugin.datasets.task_datasets import RetrievalDataset
from softmask_plugin.explain.maps import word_maps
from softmask_plugin.pointing import own_and_other, pointing_game

BATCH = 50  # texts; each of their words takes a pass of its own with map_score word

Item = tuple[int, str, Sequence[tuple[int, Box, str]]]  # image, text, and boxes of its words


class Word(NamedTuple):
    """A word's map, the box of the thing that it names, its role, and the boxes of the others."""

    heat: np.ndarray
    box: Box
    role: str
    others: list[Box]


def pointing(model: Any, scenes: RetrievalDataset) -> dict[str, Any]:
    """Play the pointing game on scenes.

    Returns:
        ``pointing`` and ``pointing_other``: ``pointing_game`` of the words of each scene's first
        caption, with their own things and with the others. ``named``: ``own_and_other`` of words
        for colours and shapes ``"in a caption"`` and in a phrase ``"alone"``, such as "a red
        circle"; only for scenes of several things.
    """
    captions: list[Item] = []
    phrases: list[Item] = []
    for image, entry in enumerate(scenes.annotation):
        captions.append((image, entry["caption"][0], entry["word_boxes"][0]))
        for item in name_things(entry["scenes"][0], alone=True):
            boxes = [(*each["words"], *each["box"], *each["group"]) for each in item["phrases"]]
            phrases.append((image, item["text"], boxes))
    words = {
        name: list(_map(model, scenes, items))
        for name, items in {"in a caption": captions, "alone": phrases}.items()
    }
    first = words["in a caption"]
    named = {
        name: [
            (w.heat, w.box, w.others) for w in each if w.role in ("colour", "shape") and w.others
        ]
        for name, each in words.items()
    }
    return {
        "pointing": pointing_game((w.heat, w.box, w.role) for w in first),
        "pointing_other": pointing_game((w.heat, box, w.role) for w in first for box in w.others),
        "named": {name: own_and_other(each) for name, each in named.items() if each},
    }


def _map(model: Any, scenes: RetrievalDataset, items: Sequence[Item]) -> Iterator[Word]:
    for start in range(0, len(items), BATCH):
        batch = items[start : start + BATCH]
        images = torch.stack([scenes[image]["image"] for image, _, _ in batch])
        maps = word_maps(model, images, [text for _, text, _ in batch]).maps.cpu().numpy()
        for heat, (image, _, boxes) in zip(maps, batch, strict=True):
            things = [thing.box for thing in scenes.annotation[image]["scenes"][0].things]
            for word, box, role in boxes:
                yield Word(heat[word], box, role, [each for each in things if each != box])
