"""Row 4: our retrieval scores against LAVIS's compute_sim_matrix.

LAVIS needs hours for this gallery, so it is timed on one distributed shard, as one rank of many,
and ours on two images with all their candidates. Both times are scaled to the whole gallery.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any
from unittest.mock import patch

import torch
from lavis.common import dist_utils
from lavis.models.albef_models import compute_sim_matrix
from lavis.tasks.retrieval import RetrievalTask

from benchmarks.baseline import albef_retrieval
from benchmarks.harness import Row, alternate, compare, timed
from benchmarks.material import build, texts
from softmask_plugin.models.rerank import NOT_A_CANDIDATE, Reranker, candidates

IMAGES, PER_IMAGE, K = 64, 5, 64
TRIAL = 16  # images for LAVIS to rank in full, in a trial


class Gallery(list):
    """Batches of images, and what LAVIS needs from a retrieval data set."""

    def __init__(self, images: int, image_size: int, captions: list[str]) -> None:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(images, 3, image_size, image_size, generator=generator)
        super().__init__({"image": part} for part in pixels.split(8))
        self.dataset = self
        self.text, self.image = captions, [str(i) for i in range(images)]
        self.img2txt = {i: [*range(i * PER_IMAGE, (i + 1) * PER_IMAGE)] for i in range(images)}
        self.txt2img = {text: text // PER_IMAGE for text in range(len(captions))}


def albef(small: bool, captions: str | None) -> Any:
    """Ours at 384 px, without a large queue."""
    return build(small, captions, queue_size=256, **({} if small else {"image_size": 384}))


class Rivals:
    """Both re-rankers on one gallery that is encoded once for both.

    Args:
        small, captions: As in ``build``.
        images: Size of the gallery.
        make: Function of ``small`` and ``captions`` that builds ours.
        twin: Function that makes LAVIS's from ours.
    """

    def __init__(
        self,
        small: bool,
        captions: str | None,
        images: int = IMAGES,
        make: Callable[..., Any] = albef,
        twin: Callable[..., Any] = albef_retrieval,
    ) -> None:
        self.model = make(small, captions).eval()
        sentences = texts(self.model, captions, images * PER_IMAGE)
        self.gallery = Gallery(images, self.model.options.image_size, sentences)
        self.ours = Reranker(self.model, {"k_test": min(K, images)})
        self.lavis = twin(self.model).eval()

    @torch.no_grad()
    def encode(self) -> tuple[float, float]:
        """Encode the gallery with both; return the seconds of ours and of LAVIS."""

        def ours() -> None:
            self.texts = self.ours.encode_texts(self.gallery.text)
            self.images = self.ours.encode_images(self.gallery)
            self.similarity = self.ours.similarity(self.images, self.texts)
            for_text = candidates(self.similarity.T, K).T
            self.wanted = candidates(self.similarity, K) | for_text

        def lavis() -> None:
            # The encoders' outputs, which LAVIS's function gets from memory while it is timed
            self.text_outputs = []
            for start in range(0, len(self.gallery.text), 256):
                tokens = self.lavis.tokenizer(
                    self.gallery.text[start : start + 256],
                    padding="max_length",
                    truncation=True,
                    max_length=35,
                    return_tensors="pt",
                )
                self.text_outputs.append(self.lavis.text_encoder.forward_text(tokens))
            self.image_states = [
                self.lavis.visual_encoder.forward_features(batch["image"]) for batch in self.gallery
            ]

        return timed(ours), timed(lavis)

    @torch.no_grad()
    def match(self) -> float:
        """Our seconds for all pairs, from those for two images."""
        few = {i: self.images.states[i] for i in (0, 1)}
        seconds = timed(lambda: self.ours.match(few, self.texts.tokens, self.wanted))
        return seconds * int(self.wanted.sum()) / int(self.wanted[:2].sum())

    @torch.no_grad()
    def compute(self) -> float:
        """LAVIS's seconds for all queries, from those for one shard of many."""
        # LAVIS's shard has 1 + gallery // ranks queries, of images and of texts
        ranks = len(self.gallery.text)
        images = len(self.gallery.image)
        queries = 1 + images // ranks + 1 + len(self.gallery.text) // ranks

        def shard() -> None:
            texts, states = iter(self.text_outputs), iter(self.image_states)
            with (
                patch.object(dist_utils, "get_world_size", lambda: ranks),
                patch.object(self.lavis.text_encoder, "forward_text", lambda _: next(texts)),
                patch.object(self.lavis.visual_encoder, "forward_features", lambda _: next(states)),
            ):
                self.scores = compute_sim_matrix(self.lavis, self.gallery, k_test=K)

        return timed(shard) * (images + len(self.gallery.text)) / queries

    @torch.no_grad()
    def difference(self) -> float:
        """Largest difference between LAVIS's and our scores for the shard's pairs."""
        i2t, t2i = (torch.from_numpy(scores) for scores in self.scores)
        scored = (i2t != NOT_A_CANDIDATE) | (t2i.T != NOT_A_CANDIDATE)
        theirs = torch.where(i2t != NOT_A_CANDIDATE, i2t, t2i.T)
        ours = self.ours.match(self.images.states, self.texts.tokens, scored) + self.similarity
        return float((ours - theirs)[scored].abs().max())


def recalls_are_identical(images: int, **models: Callable[..., Any]) -> bool:
    """Whether both rank a whole gallery alike with the small model, where LAVIS takes seconds."""
    rivals = Rivals(small=True, captions=None, images=images, **models)
    gallery = rivals.gallery
    with torch.no_grad():
        theirs = compute_sim_matrix(rivals.lavis, gallery, k_test=min(K, images))
    with patch("lavis.tasks.retrieval.os.path.join", lambda *_: "/dev/null"):
        recalls = [
            RetrievalTask._report_metrics(*scores, gallery.txt2img, gallery.img2txt)
            for scores in (rivals.ours.scores(gallery), theirs)
        ]
    return recalls[0] == recalls[1]


def run(
    small: bool,
    captions: str | None,
    rounds: int,
    name: str = "retrieval scores: time",
    **models: Callable[..., Any],
) -> list[Row]:
    """Measure the row; ``models`` are those of ``Rivals``."""
    rivals = Rivals(small, captions, **models)
    encoding = rivals.encode()
    with redirect_stdout(io.StringIO()):  # LAVIS prints progress
        times = alternate({"ours": rivals.match, "lavis": rivals.compute}, rounds, "re-ranking")
        trial = TRIAL if small else IMAGES
        same = "identical" if recalls_are_identical(trial, **models) else "DIFFERENT"
    ours, lavis = (
        [seconds + matching for matching in times[name]]
        for seconds, name in zip(encoding, ("ours", "lavis"), strict=True)
    )
    note = f"scores within {rivals.difference():.0e}, recalls {same}"
    return [compare(name, "s", ours, lavis, target=0.12, note=note)]
