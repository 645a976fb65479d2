"""A run's own images, as its checkpoint sees them: word panels and the worst retrievals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from lavis.common.registry import registry
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from PIL import Image

from softmask_plugin.datasets.builder import Builder
from softmask_plugin.datasets.task_datasets import ItemDataset, RetrievalDataset
from softmask_plugin.explain.figure import Shown, word_panels
from softmask_plugin.explain.gallery import Gallery
from softmask_plugin.explain.pairs import explain
from softmask_plugin.explain.trained import Trained
from softmask_plugin.models.rerank import candidates

GALLERY, RERANKED = 128, 16  # images to rank, and those that ITM ranks again: minutes on a CPU
PANELS, WORDS = 3, 6  # pairs drawn, and words of each
WIDTH, DPI = 3.6, 300  # of a panel, inches: legible on a phone
MISSES = 6


@dataclass(frozen=True)
class Miss:
    """A caption for which another image ranks above its own."""

    caption: str
    rank: int  # of its own image, from 2
    own: Image.Image
    first: Image.Image


def build_datasets(config: Mapping[str, Any]) -> dict[str, ItemDataset]:
    """The data sets of a run, by split; ``train`` only if no other.

    Raises:
        UserError: Their files are not found, or malformed.
    """
    datasets: dict[str, ItemDataset] = {}
    for name, section in (config.get("datasets") or {}).items():
        builder: Any = registry.get_builder_class(name)
        if builder is None or not issubclass(builder, Builder):
            continue
        section = OmegaConf.create(section)
        splits = section.get(getattr(builder, "FILES", "num")) or {}
        if any(splits.get(split) for split in ("val", "test")):
            splits.pop("train", None)
        datasets |= builder(section).build()
    if len(datasets) > 1:
        datasets.pop("train", None)
    return datasets


def draw_pairs(trained: Trained, dataset: ItemDataset) -> list[Figure]:
    """Word panels of the first pairs of a data set of captions."""
    figures = []
    for index in range(min(PANELS, len(dataset))):
        item, (picture,) = dataset.open(index)
        text = trained.text_processor(item["caption"][0])
        (found,) = explain(trained.model, trained.image_processor(picture)[None], [text])
        shown = Shown(np.asarray(picture), found, found.content_words[:WORDS])
        figures.append(word_panels(shown, dpi=DPI, width=WIDTH))
    return figures


@torch.no_grad()
def worst_retrievals(
    trained: Trained, dataset: RetrievalDataset, run: Mapping[str, Any]
) -> list[Miss]:
    """The captions whose own image ranks lowest among the first ``GALLERY`` images, worst first;
    one for each image.

    As in the evaluation, ``run.rank_by`` ranks all images, and ITM re-ranks the best
    ``run.k_test``, here at most ``RERANKED``.
    """
    count = min(GALLERY, len(dataset))
    owners = [image for image in range(count) for _ in dataset.img2txt[image]]
    captions = [dataset.text[text] for image in range(count) for text in dataset.img2txt[image]]
    pictures = (dataset.open(image)[1][0] for image in range(count))
    gallery = Gallery(replace(trained, run=run), pictures)
    reranker, images = gallery.reranker, gallery.images
    texts = reranker.encode_texts(captions)
    scores = reranker.similarity(images, texts).T
    again = candidates(scores, min(reranker.k_test, RERANKED))
    proposed = {i: images.states[i] for i in again.any(dim=0).nonzero().flatten().tolist()}
    matches = reranker.match(proposed, texts.tokens, again.T).T
    matches += reranker.similarity_part(scores)
    if again.any():
        scores[again] = matches[again] - matches[again].min() + 2  # above all cosines
    own = scores.gather(1, torch.tensor(owners)[:, None])
    ranks = (scores > own).sum(dim=1) + 1
    worst: dict[int, int] = {}  # a caption for each image
    for text in ranks.argsort(descending=True, stable=True).tolist():
        worst.setdefault(owners[text], text)
    return [
        Miss(
            caption=captions[text],
            rank=int(ranks[text]),
            own=dataset.open(owners[text])[1][0],
            first=dataset.open(int(scores[text].argmax()))[1][0],
        )
        for text in list(worst.values())[:MISSES]
        if ranks[text] > 1
    ]
