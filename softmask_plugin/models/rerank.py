"""Retrieval scores: ITC ranks all candidates, ITM re-ranks the best."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lavis.common import dist_utils
from torch import Tensor
from torch.utils.data import DistributedSampler
from tqdm import tqdm

from softmask_plugin.config.run_options import setting
from softmask_plugin.errors import UserError, require_finite_scores
from softmask_plugin.nn.image_memory import ImageMemory, View
from softmask_plugin.nn.tokens import Tokens

NOT_A_CANDIDATE = -100.0  # LAVIS's score of a pair that ITC did not propose


class Reranker:
    """Scores every candidate pair of both directions once, image by image.

    It projects an image's keys and values once for all its candidates, encodes a caption once for
    all images, and spends nothing on padding.

    Args:
        model: A model with a matching head, an ``AlignedBase``.
        run: A ``run:`` section, for ``k_test``, ``rerank_scoring`` and ``rerank_memory``.
        text_batch: How many captions to encode at once.
    """

    def __init__(
        self, model: Any, run: Mapping[str, Any] | None = None, text_batch: int = 256
    ) -> None:
        run = run or {}
        self.model, self.text_batch = model, text_batch
        self.k_test = int(setting(run, "k_test"))
        self.scoring: str = setting(run, "rerank_scoring")
        self.memory = float(setting(run, "rerank_memory"))  # GiB

    @torch.no_grad()
    def scores(self, data_loader: Any) -> tuple[np.ndarray, np.ndarray]:
        """Score (images, texts) and (texts, images); UserError if a score is NaN or infinite, so
        that ranks would mean nothing."""
        if self.k_test == 0:
            similarity = self.similarity(data_loader)
            return similarity.numpy(), similarity.T.numpy()
        texts, text_feats = self.encode_texts(data_loader.dataset.text)
        images, image_feats = self.encode_images(data_loader)
        similarity = cosines(image_feats, text_feats)
        for gallery, count in zip(("images", "texts"), similarity.shape, strict=True):
            if self.k_test > count:
                what = "run.k_test is %d, but there are %d %s: all are candidates"
                logging.warning(what, self.k_test, count, gallery)
        for_image = candidates(similarity, self.k_test)
        for_text = candidates(similarity.T, self.k_test).T
        score = self.match(images, texts, for_image | for_text)
        require_finite_scores("a retrieval score", similarity, score)
        score += self.itc_part(similarity)
        i2t = score.masked_fill(~for_image, NOT_A_CANDIDATE)
        t2i = score.masked_fill(~for_text, NOT_A_CANDIDATE).T
        return i2t.numpy(), t2i.numpy()

    def itc_part(self, cosines: Tensor) -> Tensor:
        """What ITC adds to the matching logit, from cosines of any shape."""
        weight = {"itm": 0.0, "itm+itc": 1.0, "itm+logit": 1 / float(self.model.temp)}
        return weight[self.scoring] * cosines

    @torch.no_grad()
    def similarity(self, data_loader: Any) -> Tensor:
        """Cosine of every image with every text, (images, texts), on the CPU: the ranking by ITC
        alone; UserError as for ``scores``."""
        _, texts = self.encode_texts(data_loader.dataset.text)
        similarity = cosines(self.encode_images(data_loader)[1], texts)
        require_finite_scores("a retrieval score", similarity)
        return similarity

    def encode_texts(self, texts: list[str]) -> tuple[Tokens, Tensor]:
        """Encode N captions: what ``fuse`` takes, and unit features (N, embed_dim)."""
        batches, feats = [], []
        for start in range(0, len(texts), self.text_batch):
            captions = self.model.tokenize(texts[start : start + self.text_batch])
            text, _, features = self.model.encode_captions(captions.ids, captions.packing)
            batches.append(text)
            feats.append(features)
        return Tokens.cat(batches), torch.cat(feats)

    def encode_images(self, data_loader: Any) -> tuple[dict[int, Tensor], Tensor]:
        """Encode M images: this rank's share of their states (S, width), by index and on the CPU,
        and unit features of all, (M, embed_dim). UserError if each process would see only a part.
        """
        if isinstance(getattr(data_loader, "sampler", None), DistributedSampler):
            raise UserError(
                "retrieval ranks the whole gallery, but each process would see only part of it: "
                "set run.use_dist_eval_sampler=false"
            )
        states, feats, count = {}, [], 0
        for samples in progress_bar(data_loader, desc="images", unit="batch"):
            image = self.model.visual_encoder(samples["image"].to(self.model.device))
            feats.append(self.model.image_features(image[:, 0]))
            for i, state in enumerate(image, start=count):
                if i % dist_utils.get_world_size() == dist_utils.get_rank():
                    states[i] = state.cpu()
            count += len(image)
        return states, torch.cat(feats)

    def match(self, images: dict[int, Tensor], texts: Tokens, wanted: Tensor) -> Tensor:
        """Matching logits of the ``wanted`` pairs (M, N), 0 elsewhere; each rank does its share.

        Both matrices are on the CPU, which has room for a large gallery.
        """
        device, scores = self.model.device, torch.zeros(wanted.shape)
        mine = list(images)
        with progress_bar(total=int(wanted[mine].sum()), desc="re-ranking", unit="pair") as bar:
            for i in mine:
                memory = self.model.bert.remember(images[i][None].to(device))
                for captions in wanted[i].nonzero().squeeze(1).split(self.pairs_at_once(texts)):
                    scores[i, captions] = self.match_image(memory, texts, captions.to(device)).cpu()
                    bar.update(len(captions))
        if dist_utils.is_dist_avail_and_initialized():
            total = scores.to(device)
            dist.all_reduce(total)
            scores = total.cpu()
        return scores

    def match_image(self, memory: ImageMemory, texts: Tokens, captions: Tensor) -> Tensor:
        """Matching logits of one image with some captions, (captions,)."""
        chosen = texts.take(captions, trim=True)
        view = View(captions_per_image=len(captions))
        fused = self.model.bert.fuse(chosen, memory, (view,), chosen.packing.cls_only)
        return self.model.match(fused.cls)[:, 1].float()

    def pairs_at_once(self, texts: Tokens) -> int:
        """How many captions of the longest length fit into ``rerank_memory``."""
        shape = self.model.text_encoder.shape
        # Per token: the feed-forward's input and output, besides queries, contexts and residuals,
        # which attention needs padded and unpadded
        token_bytes = texts.states.element_size() * (2 * shape.intermediate + 10 * shape.width)
        caption_bytes = token_bytes * texts.packing.mask.shape[1]
        return max(1, int(self.memory * 2**30 / caption_bytes))


def candidates(similarity: Tensor, k: int) -> Tensor:
    """True for the k most similar entries of each row, (rows, columns)."""
    best = similarity.topk(min(int(k), similarity.shape[1]), dim=1).indices
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, best, True)


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """Cosines (M, N) of unit features (M, d) and (N, d), on the CPU; in float32 under autocast too,
    since bf16 would tie what ranks tell apart."""
    with torch.autocast(images.device.type, enabled=False):
        return (images @ texts.T).cpu()


def progress_bar(items: Any = None, **options: Any) -> Any:
    """Show progress on the first rank if standard error is a terminal; gone when done."""
    disable = None if dist_utils.is_main_process() else True
    return tqdm(items, leave=False, disable=disable, **options)
