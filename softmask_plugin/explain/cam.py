"""Word maps in the manner of pytorch-grad-cam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softmask_plugin.explain.lavis_models import matcher_of
from softmask_plugin.explain.maps import Method, Phrases, phrase_maps, word_maps
from softmask_plugin.explain.matcher import Target, match_logit
from softmask_plugin.explain.pairs import evaluating, numbers_of, words_of
from softmask_plugin.tokenization import as_list


class WordCam:
    """Maps the words of captions, batch by batch: ``word_maps`` as pytorch-grad-cam has it.

    >>> with WordCam(model, method="gradcam") as cam:  # doctest: +SKIP
    ...     maps = cam(images, captions, words=["red ring", "heart"])

    Between calls it holds nothing and the model is as it was, so ``with`` is optional.

    Args:
        model: A model with a matching head, of this plugin or of LAVIS.
        method: ``gradcam``, ``attention``, ``word``, ``similarity`` or ``occlusion``; ``word_maps``
            has their equations.
        layer: BERT layer of ``gradcam`` and ``attention``; None: the model's own.
        target: Score of the matching logits (N, 2) that is explained, (N,); by default the logit of
            a match.
        batch_size: Captions mapped at once.

    Raises:
        UserError: The model has no matching head.
    """

    def __init__(
        self,
        model: Any,
        method: Method = "gradcam",
        layer: int | None = None,
        target: Target = match_logit,
        batch_size: int = 32,
    ) -> None:
        self.matcher, self.batch_size = matcher_of(model), batch_size
        self.asked: dict[str, Any] = {"method": method, "layer": layer, "target": target}

    def __enter__(self) -> WordCam:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(
        self, images: Tensor, captions: Sequence[str], words: Sequence[str] | None = None
    ) -> Tensor:
        """Map words of B captions in B processed images, (B, 3, H, W).

        Args:
            words: For each caption a word or phrase in it; None: every word.

        Returns:
            Maps over the patch grid, float32, >= 0, on the model's device: with ``words`` one for
            each caption, the mean over the phrase's words, (B, h, w); else (B, W, h, w), with W
            words in the longest caption, and zeros behind shorter ones.

        Raises:
            ValueError: Images, captions and words do not pair, or the layer has no cross-attention.
            UserError: A caption lacks its word, or the model cannot do the method.
        """
        captions, maps = as_list(captions), []
        words = None if words is None else as_list(words)
        if {len(captions), len(captions if words is None else words)} != {len(images)}:
            given = f"{len(captions)} captions" + (f" and {len(words)} words" if words else "")
            raise ValueError(f"{len(images)} images do not pair with {given}")
        with evaluating(self.matcher.model):
            for start in range(0, len(captions), self.batch_size):
                some = slice(start, start + self.batch_size)
                phrases = None if words is None else self._phrases(captions[some], words[some])
                found = word_maps(
                    self.matcher, images[some], captions[some], phrases=phrases, **self.asked
                )
                maps.append(found.maps if phrases is None else phrase_maps(found, phrases))
        if words is None:
            width = max(each.shape[1] for each in maps)
            maps = [F.pad(each, (0, 0, 0, 0, 0, width - each.shape[1])) for each in maps]
        return torch.cat(maps)

    def _phrases(self, captions: Sequence[str], words: Sequence[str]) -> Phrases:
        pairs = zip(captions, words, strict=True)
        split = ([words_of(self.matcher, each) for each in pair] for pair in pairs)
        return [(i, numbers_of(*each)) for i, each in enumerate(split)]
