"""BLIP's rows: steps with soft masks and focal ITC, and re-ranking, against LAVIS's own classes."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks import rerank
from benchmarks.baseline import blip_pretrain, blip_retrieval
from benchmarks.harness import Row, alternate, compare
from benchmarks.material import build
from benchmarks.step import Trainer, measurable
from softmask_plugin.models.blip import SoftMaskBlipPretrain, SoftMaskBlipRetrieval

SHAPE = {"fusion_layer": 0, "vocab_size": None}  # LAVIS cuts the embedding to the tokenizer
ON: dict[str, Any] = {"soft_mask": {"enabled": True, "negatives": True}, "itc": {"gamma": 2.0}}


def pretrain(small: bool, captions: str | None) -> Any:
    """A ``softmask_blip_pretrain`` with everything on."""
    return build(small, captions, SoftMaskBlipPretrain, bert=SHAPE, **ON)


def retrieval(small: bool, captions: str | None) -> Any:
    """A ``softmask_blip_retrieval`` with everything on, at 384 px and without a large queue."""
    size = {} if small else {"image_size": 384}
    return build(small, captions, SoftMaskBlipRetrieval, bert=SHAPE, queue_size=256, **ON, **size)


def run(small: bool, captions: str | None, rounds: int) -> list[Row]:
    """Measure the steps of both models."""
    return [
        *steps("BLIP pretraining step", rounds, small, captions, 8, pretrain, blip_pretrain),
        *steps("BLIP retrieval step", rounds, small, captions, 4, retrieval, blip_retrieval),
    ]


def steps(
    name: str, rounds: int, small: bool, captions: str | None, pairs: int, make: Any, twin: Any
) -> list[Row]:
    """Measure the steps of a model; the other arguments are those of ``Trainer``."""
    ours, lavis = (
        Trainer(who, small, captions, pairs, make=make, twin=twin) for who in ("ours", "lavis")
    )
    variants = measurable(("full", "bf16", "half the patches"), small)
    subjects = {each: partial(ours.step, each) for each in variants}
    times = alternate({**subjects, "lavis": lavis.step}, rounds, name)
    rows = [compare(f"{name}: time", "s", times["full"], times["lavis"], target=0.60)]
    for each in variants[1:]:
        label = f"{name}, {each}, against LAVIS in float32: time"
        rows.append(compare(label, "s", times[each], times["lavis"]))
    return [*rows, Row(f"{name}: FLOPs per pair", "G", ours.flops("full"), lavis.flops())]


def run_rerank(small: bool, captions: str | None, rounds: int) -> list[Row]:
    """Measure re-ranking."""
    name = "BLIP retrieval scores: time"
    return rerank.run(small, captions, rounds, name, make=retrieval, twin=blip_retrieval)
