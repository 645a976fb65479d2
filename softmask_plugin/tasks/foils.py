"""Caption against foil: does an image match its caption better than a false one?

The measure of FOIL-COCO (Shekhar et al., ACL 2017), VALSE, ARO and SugarCrepe, and that of
Winoground (arXiv 2204.03162), where two images and two captions form a pair. Images may also be
seen through the mask of the word that is false, which tells whether a mask gives a match away.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import chain
from typing import Any

import torch

from softmask_plugin.config.run_options import setting
from softmask_plugin.errors import require_finite_scores
from softmask_plugin.explain.lavis_models import matcher_of
from softmask_plugin.explain.maps import map_words, phrase_maps
from softmask_plugin.explain.matcher import Pairs, Seen
from softmask_plugin.explain.pairs import match_through, words_of
from softmask_plugin.foil_metrics import foil_metrics
from softmask_plugin.models.aligned import AlignedBase
from softmask_plugin.nn.image_memory import View
from softmask_plugin.registry import register
from softmask_plugin.tasks.items import ItemTask
from softmask_plugin.tokenization import FUNCTION_WORDS


@register("task", "softmask_foils")
class FoilsTask(ItemTask):
    """Tell the caption of an image from a foil.

    ``run.foil_mask``, a kind of mask, shows the image through the mask of what is false: for the
    caption the mean map of its words that the foil lacks, for the foil of those that the caption
    lacks. Function words count only if nothing else differs, and a text with no such word is
    matched unmasked. Similarities for ITC are never masked.

    A data set has an attribute ``annotation``, a list of ``{"image": name, "caption", "foil",
    "group": name}`` and perhaps ``"pair"``, which two items share: the second has another image,
    with caption and foil exchanged. Samples are ``{"image", "caption", "foil", "instance_id",
    "index": position in annotation}``.

    Metrics are in percent, for all items and, with the suffix ``_<group>``, for each group:

    - ``acc``: the caption matches better than the foil (ITM); a tie counts half;
    - ``acc_itc``: the same by similarity (ITC);
    - ``right``, ``wrong``: mean probability of a match of captions and of foils.

    With pairs there are Winoground's scores, where ties count as wrong: ``text`` (both images match
    their caption better than the other's), ``image`` (both captions match their image better than
    the other) and ``group`` (both). ``<metric>_interval`` and ``<metric>_interval_<group>`` are
    half of the 95% confidence interval, with a standard error that is robust to dependence within
    an image or a pair. ``agg_metrics`` is ``acc``.

    Raises:
        UserError: ``foil_mask`` is unknown, the model has no matching head, the data set has no
            foils, or a score is NaN or infinite.
    """

    KIND = "foils"
    NEEDED = ("foils", "scenes_foils")

    def __init__(self, mask: Any) -> None:
        super().__init__()
        self.mask = mask

    @classmethod
    def setup_task(cls, cfg: Any) -> FoilsTask:
        """Build the task from the ``run:`` section of a YAML."""
        return cls(setting(cfg.run_cfg, "foil_mask"))

    def is_suitable(self) -> bool:
        """Whether the items have foils."""
        return {"image", "caption", "foil", "group"} <= {*chain(*self.annotation[:1])}

    @torch.no_grad()
    def valid_step(self, model: AlignedBase, samples: dict[str, Any]) -> list[dict[str, Any]]:
        """Score one batch.

        Returns:
            For each item its ``instance_id``; ``itm``, the log-odds of a match of the caption and
            of the foil; ``itc``, their cosines with the image; and what the annotation says of it.
        """
        both = zip(samples["caption"], samples["foil"], strict=True)
        texts = [text for pair in both for text in pair]
        tokenized = model.tokenize(texts)
        text, _, features = model.encode_captions(tokenized.ids, tokenized.packing)
        states = model.visual_encoder(samples["image"].to(model.device))
        memory = model.bert.remember(states)
        if self.mask == "none":
            view = View(captions_per_image=2)
            fused = model.bert.fuse(text, memory, (view,), text.packing.cls_only)
            logits = model.match(fused.cls).double()
        else:  # each text through its own mask
            matcher = matcher_of(model)
            owners = torch.arange(len(texts), device=model.device) // 2
            pairs = Pairs(tokenized, text, Seen(states, memory), model.visual_encoder.grid, owners)
            changed = [*enumerate(changed_words([words_of(matcher, each) for each in texts]))]
            maps = phrase_maps(map_words(matcher, pairs, changed)).flatten(1)
            seed = int(samples["index"][0])
            logits = match_through(matcher, pairs, maps, self.mask, seed=seed)[1].double()
        with torch.autocast(states.device.type, enabled=False):  # bf16 would tie close captions
            features = features.unflatten(0, (-1, 2))
            itc = (features @ model.image_features(states[:, 0])[:, :, None]).squeeze(2)
        itm = (logits[:, 1] - logits[:, 0]).view(-1, 2)
        require_finite_scores("a match or a similarity", itm, itc)
        items = [self.annotation[index] for index in samples["index"].tolist()]
        told = ("image", "caption", "foil", "group", "pair")
        return [
            {
                self.inst_id_key: instance,
                **{key: item[key] for key in told if item.get(key) is not None},
                "itm": match,
                "itc": cosine,
            }
            for instance, item, match, cosine in zip(
                samples[self.inst_id_key], items, itm.tolist(), itc.tolist(), strict=True
            )
        ]

    def metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Metrics of the results of all items, see above."""
        return foil_metrics(results)


def changed_words(texts: Sequence[Sequence[str]]) -> list[list[int]]:
    """Number the words of each text that its partner lacks.

    Args:
        texts: The words of 2 B texts, partners side by side.

    Returns:
        Numbers for each text; those of function words only if no other word differs.
    """
    found = []
    for a, b in zip(texts[::2], texts[1::2], strict=True):
        blocks = SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
        spans = [span for kind, *span in blocks if kind != "equal"]
        for text, start in ((a, 0), (b, 2)):
            numbers = [n for span in spans for n in range(*span[start : start + 2])]
            named = [n for n in numbers if text[n] not in FUNCTION_WORDS]
            found.append(named or numbers)
    return found
