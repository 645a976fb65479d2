"""Search images by text, in memory or by features in a file; wrong captions for the app."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from PIL import Image
from torch import Tensor

from softmask_plugin.datasets.images import IMAGE_SUFFIXES, UnreadableImageError, open_rgb
from softmask_plugin.datasets.scenes.grammar import COLOURS, Scene, captions
from softmask_plugin.errors import UserError, require_finite_scores
from softmask_plugin.explain.image import FOREIGN, is_scene
from softmask_plugin.explain.trained import Trained
from softmask_plugin.files.whole import write_whole
from softmask_plugin.models.aligned import AlignedBase
from softmask_plugin.models.rerank import Reranker, progress_bar

CANDIDATES = 32  # most similar images (ITC), at least, that ITM's head scores for a text
BATCH = 64  # images encoded at once


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
    similarity: float  # of text and image, as the run ranks by it
    rank: int  # by similarity alone, from 1


class Gallery:
    """Images, encoded once in batches, to be searched by any number of texts, as the model's run
    ranks them: see ``run.rank_by`` and ``run.rerank_scoring``."""

    def __init__(self, trained: Trained, images: Iterable[Image.Image]) -> None:
        self.trained, self.reranker = trained, Reranker(_searching(trained), trained.run)
        with torch.no_grad():
            batches = ({"image": each} for each in _batches(trained, images))
            self.images = self.reranker.encode_images(batches)

    @torch.no_grad()
    def search(self, text: str, count: int = 8) -> list[Hit]:
        """Find the ``count`` images that a text describes best, best first.

        Raises:
            UserError: A score is NaN or infinite.
        """
        model, reranker = self.trained.model, self.reranker
        texts = reranker.encode_texts([self.trained.text_processor(text)])
        similarity = reranker.similarity(self.images, texts)[:, 0]
        similar = _most_similar(similarity, count)
        found, similarities = similar.indices.tolist(), similar.values.tolist()
        copies = texts.tokens.take(torch.zeros(len(found), dtype=torch.long, device=model.device))
        states = torch.stack([self.images.states[i] for i in found])
        memory = model.bert.remember(states.to(model.device))
        logits = model.match(model.bert.fuse(copies, memory, wanted=copies.packing.cls_only).cls)
        logits = logits.float().cpu()
        require_finite_scores("a retrieval score", similar.values, logits)
        matches = logits.softmax(dim=-1)[:, 1].tolist()
        scores = logits[:, 1] + reranker.similarity_part(similar.values)
        best = scores.topk(min(count, len(scores))).indices.tolist()
        return [Hit(found[i], matches[i], similarities[i], rank=i + 1) for i in best]


def save_features(trained: Trained, images: Path, output: Path) -> tuple[int, int]:
    """Encode the images in a folder and below for :func:`search_features`.

    Args:
        output: An NPZ file to write: ``features``, unit vectors (N, embed_dim), float32; ``names``,
            N paths below the folder; ``folder``, its own path.

    Returns:
        The number of images, and that of unreadable ones, which are left out.

    Raises:
        UserError: There is no such folder, no image in it can be read, or a feature is NaN or
            infinite.
    """
    model = _searching(trained)
    files, left_out = readable_images(images)
    if trained.bundled and not is_scene(open_rgb(files[0])):
        logging.getLogger(__name__).warning(FOREIGN)
    output.parent.mkdir(parents=True, exist_ok=True)
    opened = map(open_rgb, progress_bar(files, desc="images", unit="image"))
    with torch.no_grad():
        batches = (each.to(model.device) for each in _batches(trained, opened))
        states = map(model.visual_encoder, batches)
        features = torch.cat([model.image_features(each[:, 0]).cpu() for each in states])
    require_finite_scores("a feature", features)
    names = [file.relative_to(images).as_posix() for file in files]
    write_whole(output, partial(_save, features=features, names=names, folder=images.absolute()))
    return len(files), left_out


def _save(path: Path, folder: Path, **arrays: Any) -> None:
    with path.open("wb") as file:  # to a name, numpy would append .npz
        np.savez(file, folder=str(folder), **arrays)


def search_features(
    trained: Trained, file: Path, text: str, count: int = 8
) -> list[tuple[Path, Hit]]:
    """Find the ``count`` images that a text describes best, among those of :func:`save_features`.

    The most similar ones are opened again for the matching head.

    Raises:
        UserError: The text has no word, the file is another kind or of another model, or an image
            has changed.
    """
    model, cleaned = _searching(trained), trained.text_processor(text)
    if not cleaned or count < 1:
        raise UserError("give a text with a word, and --count 1 or more")
    try:
        opened: Any = file.open("rb")
        with opened, NpzFile(opened, allow_pickle=False) as stored:
            features = torch.from_numpy(stored["features"])
            paths = [Path(str(stored["folder"]), name) for name in stored["names"].tolist()]
        wanted = Reranker(model).encode_texts([cleaned]).features[0].cpu()
        nearest = _most_similar(features @ wanted, count).indices.tolist()
    except FileNotFoundError as error:
        raise UserError(f"no file {file}: make it with softmask features") from error
    except Exception as error:  # a damaged file can fail in any way
        hint = "; name the one it was made with by --checkpoint" if trained.bundled else ""
        raise UserError(
            f"{file} is of another model, or not made by softmask features{hint}"
        ) from error
    try:
        gallery = Gallery(trained, (open_rgb(paths[i]) for i in nearest))
    except UnreadableImageError as error:
        raise UserError(f"{error}: it has changed since {file}, so make that again") from error
    if not torch.allclose(gallery.images.features.cpu(), features[nearest], atol=1e-3):
        raise UserError(f"{file} is of another model or of other images: make it again")
    return [(paths[nearest[hit.index]], hit) for hit in gallery.search(text, count)]


def _most_similar(similarity: Tensor, count: int) -> Any:
    """The values and indices of the candidates for ``count`` hits, most similar first."""
    return similarity.topk(min(max(CANDIDATES, count), len(similarity)))


def readable_images(folder: Path, limit: int | None = None) -> tuple[list[Path], int]:
    """The first ``limit`` image files in a folder and below that can be decoded, sorted by path;
    None: all.

    Returns:
        These, and the number of files left out.

    Raises:
        UserError: There is no such folder, or no file in it can be decoded.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give a folder of images")
    suffixes = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes)
    good: list[Path] = []
    for file in files:
        if len(good) == limit:
            break
        try:
            open_rgb(file, min_side=1)
        except UnreadableImageError as error:
            logging.getLogger(__name__).warning("left out: %s", error)
        else:
            good.append(file)
    if not good:
        raise UserError(f"no readable image in {folder} ({', '.join(suffixes)})")
    return good, len(files) - len(good)


def _searching(trained: Trained) -> AlignedBase:
    if not isinstance(trained.model, AlignedBase):
        raise UserError(
            f"a {type(trained.model).__name__} can be explained, but not searched with: load its "
            "checkpoint into a model of this plugin, such as softmask_image_text_matching"
        )
    return trained.model


def _batches(trained: Trained, images: Iterable[Image.Image]) -> Iterator[Tensor]:
    processed = map(trained.image_processor, images)
    while batch := list(islice(processed, BATCH)):
        yield torch.stack(batch)
