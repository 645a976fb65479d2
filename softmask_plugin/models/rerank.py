"""Retrieval scores: ITC ranks all, ITM re-ranks the best candidates."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lavis.common.dist_utils import (
    get_rank,
    get_world_size,
    is_dist_avail_and_initialized,
    is_main_process,
)
from torch import Tensor
from tqdm import tqdm

from softmask_plugin.nn.image_memory import View

if TYPE_CHECKING:
    from softmask_plugin.models.base import SoftMaskBase

NOT_A_CANDIDATE = -100.0  # LAVIS's score of a pair that ITC did not propose


class Reranker:
    """Scores every candidate pair of both directions once, image by image.

    An image's keys and values are projected once for all its candidates, and a caption's text
    states are computed once for all images.

    Args:
        model: encoders, projections and matching head.
        k_test: candidates per query; more than the gallery has means all of it.
        text_batch: captions encoded at once.
    """

    def __init__(self, model: SoftMaskBase, k_test: int, text_batch: int = 256) -> None:
        self.model, self.k_test, self.text_batch = model, k_test, text_batch

    @torch.no_grad()
    def scores(self, data_loader: Any) -> tuple[np.ndarray, np.ndarray]:
        """Score (images, texts) and (texts, images): ITM logit plus ITC similarity, as LAVIS does.

        Raises:
            FloatingPointError: a score is NaN or infinite; ranks made from it would mean nothing.
        """
        states, mask, text_feats = self.encode_texts(data_loader.dataset.text)
        images, image_feats = self.encode_images(data_loader)
        similarity = image_feats @ text_feats.T
        for_image = candidates(similarity, self.k_test)
        for_text = candidates(similarity.T, self.k_test).T
        matching = self.match(images, states, mask, for_image | for_text)
        score = matching + similarity
        if not torch.isfinite(similarity).all() or not torch.isfinite(matching).all():
            raise FloatingPointError("a retrieval score is NaN or infinite: the weights are broken")
        i2t = score.masked_fill(~for_image, NOT_A_CANDIDATE)
        t2i = score.masked_fill(~for_text, NOT_A_CANDIDATE).T
        return i2t.cpu().numpy(), t2i.cpu().numpy()

    @torch.no_grad()
    def similarity(self, data_loader: Any) -> Tensor:
        """Cosine of every image with every text, (images, texts): the ranking by ITC alone."""
        return self.encode_images(data_loader)[1] @ self.encode_texts(data_loader.dataset.text)[2].T

    def encode_texts(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Text states (N, T, width), mask (N, T) and unit features (N, embed_dim)."""
        model, captions = self.model, self.model.reader.read(texts)
        ids, mask = captions.ids.to(model.device), captions.mask.to(model.device)
        batches = zip(ids.split(self.text_batch), mask.split(self.text_batch), strict=True)
        states = torch.cat([model.bert.encode(*batch) for batch in batches])
        return states, mask, F.normalize(model.text_proj(states[:, 0]).float(), dim=-1)

    def encode_images(self, data_loader: Any) -> tuple[Tensor, Tensor]:
        """Image states (M, S, width), on the CPU, and unit features (M, embed_dim)."""
        states, feats = [], []
        for samples in progress_bar(data_loader, desc="images", unit="batch"):
            image = self.model.visual_encoder(samples["image"].to(self.model.device))
            feats.append(F.normalize(self.model.vision_proj(image[:, 0]).float(), dim=-1))
            states.append(image.cpu())
        return torch.cat(states), torch.cat(feats)

    def match(self, images: Tensor, states: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
        """Matching logits of the ``wanted`` pairs (M, N), 0 elsewhere; each rank does its share."""
        model, scores = self.model, torch.zeros(wanted.shape, device=states.device)
        mine = range(get_rank(), len(images), get_world_size())
        for i in progress_bar(mine, desc="re-ranking", unit="image"):
            texts = wanted[i].nonzero().squeeze(1)
            length = int(mask[texts].sum(dim=1).max())  # padding of longer captions is left out
            fused = model.bert.fuse(
                states[texts, :length],
                mask[texts, :length],
                model.bert.remember(images[i : i + 1].to(states.device)),
                (View(captions_per_image=len(texts)),),
            )
            scores[i, texts] = model.match(fused)[:, 1].float()
        if is_dist_avail_and_initialized():
            dist.all_reduce(scores)
        logging.info("re-ranked %d pairs", int(wanted.sum()))
        return scores


def candidates(similarity: Tensor, k: int) -> Tensor:
    """True for the k most similar entries of each row, (rows, columns)."""
    best = similarity.topk(min(k, similarity.shape[1]), dim=1).indices
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, best, True)


def progress_bar(items: Any, desc: str, unit: str) -> Any:
    """A bar on the first rank where standard error is a terminal, gone when done."""
    disable = None if is_main_process() else True
    return tqdm(items, desc=desc, unit=unit, leave=False, disable=disable)
