"""What the app shows, apart from its page: wrong captions, and search by text."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from softmask_plugin.datasets.images import UnreadableImageError, open_rgb
from softmask_plugin.datasets.scenes.grammar import COLOURS, Scene, captions
from softmask_plugin.errors import UserError, require_finite_scores
from softmask_plugin.explain.trained import Trained
from softmask_plugin.models.rerank import Reranker

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def wrong_caption(scene: Scene) -> str:
    """The scene's first caption, with a wrong colour for its first object."""
    first, *others = scene.things
    shown = {thing.colour for thing in scene.things}
    colour = next(colour for colour in COLOURS if colour not in shown)
    return captions(replace(scene, things=(replace(first, colour=colour), *others)))[0].text


@dataclass(frozen=True)
class Hit:
    """An image that a search found."""

    index: int  # in the gallery
    match: float  # probability that the text describes it
    cosine: float  # similarity of text and image, as ITC compares them
    rank: int  # by cosine alone, from 1


class Gallery:
    """Images, encoded once in batches, to be searched by any number of texts."""

    def __init__(self, trained: Trained, images: Iterable[Image.Image], batch: int = 64) -> None:
        self.trained, self.reranker = trained, Reranker(trained.model)
        with torch.no_grad():
            batches = _batches(map(trained.image_processor, images), batch)
            states, self.features = self.reranker.encode_images(batches)
        self.states = torch.stack([*states.values()])

    @torch.no_grad()
    def search(self, text: str, count: int = 8, candidates: int = 32) -> list[Hit]:
        """Find the images that a text describes best.

        Args:
            text: Any text; the text processor cleans it.
            count: Number of images to return, best first.
            candidates: Number of the most similar images (ITC) that the matching head (ITM) scores.

        Raises:
            UserError: A score is NaN or infinite.
        """
        model = self.trained.model
        texts, feature = self.reranker.encode_texts([self.trained.text_processor(text)])
        similar = (self.features @ feature[0]).topk(min(candidates, len(self.features)))
        copies = texts.take(torch.zeros_like(similar.indices))
        memory = model.bert.remember(self.states[similar.indices.cpu()].to(model.device))
        logits = model.match(model.bert.fuse(copies, memory, wanted=copies.packing.cls_only).cls)
        require_finite_scores("a retrieval score", similar.values, logits)
        matches = logits.float().softmax(dim=-1)[:, 1].tolist()
        best = (logits[:, 1] - logits[:, 0]).topk(min(count, len(logits))).indices.tolist()
        found, cosines = similar.indices.tolist(), similar.values.tolist()
        return [Hit(found[i], matches[i], cosines[i], rank=i + 1) for i in best]


def _batches(images: Iterable[Tensor], size: int) -> Iterable[dict[str, Tensor]]:
    remaining = iter(images)
    while batch := list(islice(remaining, size)):
        yield {"image": torch.stack(batch)}


def readable_images(folder: Path, limit: int) -> tuple[list[Path], int]:
    """The first ``limit`` image files in a folder and below, sorted by path.

    Returns:
        Those that can be decoded, and the number of files left out.

    Raises:
        UserError: There is no such folder, or none of the first ``limit`` files can be decoded.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give a folder of images")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    good = []
    for file in files[:limit]:
        with suppress(UnreadableImageError):
            open_rgb(file, min_side=1)
            good.append(file)
    if not good:
        raise UserError(f"no readable image in {folder} ({', '.join(SUFFIXES)})")
    return good, len(files) - len(good)
