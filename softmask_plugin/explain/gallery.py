"""What the app shows, apart from its page: wrong captions, search by text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
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
    """The scene's first caption, with another colour for its first thing."""
    first, *others = scene.things
    shown = {thing.colour for thing in scene.things}
    colour = next(colour for colour in COLOURS if colour not in shown)
    return captions(replace(scene, things=(replace(first, colour=colour), *others)))[0].text


@dataclass(frozen=True)
class Hit:
    """An image that a search found.

    Attributes:
        index: of the image in its gallery.
        match: probability that the text describes it.
        cosine: of text and image, which ITC compares.
        rank: its place by cosine alone, from 1.
    """

    index: int
    match: float
    cosine: float
    rank: int


class Gallery:
    """Images that are encoded once, to be searched by any number of texts.

    Args:
        trained: what encodes them.
        images: the images; taken in batches, so that an iterator need not hold them all.
    """

    def __init__(self, trained: Trained, images: Iterable[Image.Image], batch: int = 64) -> None:
        self.trained, self.reranker = trained, Reranker(trained.model)
        with torch.no_grad():
            batches = _batches((trained.image_processor(image) for image in images), batch)
            states, self.features = self.reranker.encode_images(batches)
        self.states = torch.stack([*states.values()])

    @torch.no_grad()
    def search(self, text: str, count: int = 8, candidates: int = 32) -> list[Hit]:
        """Find the images that a text describes best.

        Args:
            text: as a user types it.
            count: how many to return, best first.
            candidates: how many of the most similar images (ITC) the matching head (ITM) compares.

        Raises:
            UserError: a score is NaN or infinite.
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
    batch: list[Tensor] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield {"image": torch.stack(batch)}
            batch = []
    if batch:
        yield {"image": torch.stack(batch)}


def readable_images(folder: Path, limit: int) -> tuple[list[Path], int]:
    """The image files in a folder and those below it, by name.

    Returns:
        At most ``limit`` files that can be decoded, and how many more there are or cannot be.

    Raises:
        UserError: no such folder, or nothing in it can be decoded.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give one that holds images")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    good = [file for file in files[:limit] if _is_readable(file)]
    if not good:
        raise UserError(f"no image that can be read in {folder} ({', '.join(SUFFIXES)})")
    return good, len(files) - len(good)


def _is_readable(file: Path) -> bool:
    try:
        open_rgb(file, min_side=1)
    except UnreadableImageError:
        return False
    return True
