"""Retrieval scores: ITC, or words and patches, rank all candidates; ITM re-ranks the best."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from lavis.common import dist_utils
from torch import Tensor
from torch.utils.data import DistributedSampler
from tqdm import tqdm

from softmask_plugin.config.run_options import setting
from softmask_plugin.errors import UserError, require_finite_scores
from softmask_plugin.losses import WORDS_SCALE, what_words_find, words_similarity
from softmask_plugin.nn.image_memory import ImageMemory, View
from softmask_plugin.nn.tokens import Tokens

NOT_A_CANDIDATE = -100.0  # LAVIS's score of a pair that ITC did not propose
PARTLY = (
    "retrieval ranks the whole gallery, but each process would see only part of it: set "
    "run.use_dist_eval_sampler=false"
)


class Texts(NamedTuple):
    """N encoded captions."""

    tokens: Tokens  # as ``fuse`` takes them
    features: Tensor  # unit vectors, (N, embed_dim), float32
    words: Tokens | None  # unit vectors of their tokens, if words rank


class Images(NamedTuple):
    """M encoded images."""

    states: dict[int, Tensor]  # this rank's share, (S, width) by index, on the CPU
    features: Tensor  # unit vectors of all, (M, embed_dim), float32


class Reranker:
    """Scores every candidate pair of both directions once, image by image.

    It projects an image's keys and values once for all its candidates, encodes a caption once for
    all images, and spends nothing on padding.

    Args:
        model: A model with a matching head, an ``AlignedBase``.
        run: A ``run:`` section, for ``k_test``, ``rank_by``, ``rerank_scoring`` and
            ``rerank_memory``.
        text_batch: How many captions to encode at once.

    Raises:
        UserError: An option is wrong, or words are to rank but were not trained to.
    """

    def __init__(
        self, model: Any, run: Mapping[str, Any] | None = None, text_batch: int = 256
    ) -> None:
        run = run or {}
        self.model, self.text_batch = model, text_batch
        self.k_test = setting(run, "k_test")
        self.by_words = setting(run, "rank_by") == "words"
        self.scoring: str = setting(run, "rerank_scoring")
        self.memory = 2**30 * setting(run, "rerank_memory")  # bytes
        option = model.options
        if self.by_words and not (
            getattr(option, "local_weight", 0) and option.local_negatives == "batch"
        ):
            raise UserError(
                "run.rank_by is 'words', but the model's words were not trained to find images: it "
                "needs model.local_weight above 0 and model.local_negatives=batch"
            )

    @torch.no_grad()
    def scores(self, data_loader: Any) -> tuple[np.ndarray, np.ndarray]:
        """Score (images, texts) and (texts, images); UserError if a score is NaN or infinite, so
        that ranks would mean nothing."""
        texts = self.encode_texts(data_loader.dataset.text)
        images = self.encode_images(data_loader)
        similarity = self.similarity(images, texts)
        require_finite_scores("a retrieval score", similarity)
        if self.k_test == 0:
            return similarity.numpy(), similarity.T.numpy()
        for gallery, count in zip(("images", "texts"), similarity.shape, strict=True):
            if self.k_test > count:
                what = "run.k_test is %d, but there are %d %s: all are candidates"
                logging.warning(what, self.k_test, count, gallery)
        if self.k_test < min(10, max(similarity.shape)):
            what = "run.k_test is %d: recalls at more depend on the order of the file"
            logging.warning(what, self.k_test)
        for_image = candidates(similarity, self.k_test)
        for_text = candidates(similarity.T, self.k_test).T
        score = self.match(images.states, texts.tokens, for_image | for_text)
        require_finite_scores("a retrieval score", score)
        score += self.similarity_part(similarity)
        i2t = score.masked_fill(~for_image, NOT_A_CANDIDATE)
        t2i = score.masked_fill(~for_text, NOT_A_CANDIDATE).T
        return i2t.numpy(), t2i.numpy()

    def similarity_part(self, similarity: Tensor) -> Tensor:
        """What similarities, of any shape, add to the matching logit."""
        logit = (WORDS_SCALE if self.by_words else 1) / float(self.model.temp)
        weight = {"itm": 0.0, "itm+itc": 1.0, "itm+logit": logit}
        return weight[self.scoring] * similarity

    @torch.no_grad()
    def similarity(self, images: Images, texts: Texts) -> Tensor:
        """How similar each image is to each text, (M, N), float32, on the CPU: their cosine or, if
        words rank, the mean cosine of the text's words with what they find in the image."""
        # In float32 under autocast too, since bf16 would tie what ranks tell apart
        with torch.autocast(images.features.device.type, enabled=False):
            if texts.words is None:
                return (images.features @ texts.features.T).cpu()
            return self.similarity_by_words(images.states, texts.words, len(images.features))

    def similarity_by_words(self, images: dict[int, Tensor], words: Tokens, count: int) -> Tensor:
        """Late interaction of the ``count`` images with words; each rank does its share."""
        packing, mine = words.packing, list(images)
        captions, columns = packing.mask.shape
        caption, counts = packing.index // columns, packing.index % columns > 0  # all but [CLS]
        scores = torch.zeros(count, captions)
        option = self.model.options
        patches = (option.image_size // option.vit.patch_size) ** 2
        # Bytes in float32. A word has, for each patch, a similarity, its weight and two temporary
        # copies; a patch has its state, and its projection in three stages.
        word_bytes = 4 * 4 * patches
        image_bytes = 4 * patches * (option.vit.width + 3 * option.embed_dim)
        # On a CPU, the page faults of larger tensors take as long as the products
        memory = min(self.memory, 2**24) if words.states.device.type == "cpu" else self.memory
        at_once = min(len(words.states), max(1, int(memory / word_bytes)))
        step = max(1, int(memory / (image_bytes + at_once * word_bytes)))
        with progress_bar(total=len(mine), desc="words in images", unit="image") as bar:
            for some in (mine[start : start + step] for start in range(0, len(mine), step)):
                states = torch.stack([images[i] for i in some]).to(self.model.device)
                grid = self.model.image_features(states[:, 1:])
                parts = words.states.split(at_once)
                found = [what_words_find(part, grid, self.model.temp) for part in parts]
                means, _ = words_similarity(torch.cat(found, dim=1), caption, counts, captions)
                scores[some] = means.cpu()
                bar.update(len(some))
        return self.of_all_ranks(scores)

    def encode_texts(self, texts: list[str]) -> Texts:
        """Encode N captions."""
        batches, feats, words = [], [], []
        for start in range(0, len(texts), self.text_batch):
            captions = self.model.tokenize(texts[start : start + self.text_batch])
            text, alone, features = self.model.encode_captions(captions.ids, captions.packing)
            batches.append(text)
            feats.append(features)
            if self.by_words:
                words.append(Tokens(self.model.text_features(alone.states), alone.packing))
        return Texts(Tokens.cat(batches), torch.cat(feats), Tokens.cat(words) if words else None)

    def encode_images(self, data_loader: Any) -> Images:
        """Encode M images; UserError if each process would see only a part."""
        if isinstance(getattr(data_loader, "sampler", None), DistributedSampler):
            raise UserError(PARTLY)
        rank, world = dist_utils.get_rank(), dist_utils.get_world_size()
        states: dict[int, Tensor] = {}
        feats, count = [], 0
        for samples in progress_bar(data_loader, desc="images", unit="batch"):
            image = self.model.visual_encoder(samples["image"].to(self.model.device))
            feats.append(self.model.image_features(image[:, 0]))
            first = (rank - count) % world  # of the batch that is this rank's
            mine = range(count + first, count + len(image), world)
            states.update(zip(mine, image[first::world].cpu(), strict=True))
            count += len(image)
        return Images(states, torch.cat(feats))

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
        return self.of_all_ranks(scores)

    def of_all_ranks(self, scores: Tensor) -> Tensor:
        """The sum of scores on the CPU over all ranks, each of which has its share."""
        if not dist_utils.is_dist_avail_and_initialized():
            return scores
        total = scores.to(self.model.device)
        dist.all_reduce(total)
        return total.cpu()

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
        return max(1, int(self.memory / caption_bytes))


def check_ranking(model: Any, run: Mapping[str, Any]) -> None:
    """Raise UserError, before training, if a run could not rank the splits that it is to rank."""
    if run["task"] == "retrieval" and (setting(run, "valid_splits") or setting(run, "test_splits")):
        Reranker(model, run)
        if setting(run, "distributed") and setting(run, "use_dist_eval_sampler"):
            raise UserError(PARTLY)


def candidates(similarity: Tensor, k: int) -> Tensor:
    """True for the k most similar entries of each row, (rows, columns)."""
    best = similarity.topk(min(int(k), similarity.shape[1]), dim=1).indices
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, best, True)


def progress_bar(items: Any = None, **options: Any) -> Any:
    """Show progress on the first rank if standard error is a terminal; gone when done."""
    disable = None if dist_utils.is_main_process() else True
    return tqdm(items, leave=False, disable=disable, **options)
