"""How the cost grows: a training step with batch, caption length and image size, re-ranking with
gallery and k. Only of ours; there is no target."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.harness import Cost, timed
from benchmarks.material import batch, build, texts
from softmask_plugin.models.rerank import Reranker

BATCHES = (1, 2, 4, 8, 16)
WORDS = (5, 10, 20, 28)
SIZES = {False: (128, 192, 256, 320, 384), True: (32, 64, 96, 128)}  # pixels; full and small
GALLERIES = (8, 16, 32)  # images, with five captions each
KS = (2, 4, 8, 16)
USUAL = {"batch": 4, "words": 10, "images": 16, "k": 4}


def step_seconds(model: Any, size: int, words: int, rounds: int) -> float:
    """Median time of forward and backward."""
    samples = batch(model, texts(model, None, size, words), 0)

    def step() -> None:
        model(samples)["loss"].backward()
        model.zero_grad()

    step()
    return statistics.median(timed(step) for _ in range(rounds))


def rerank_seconds(model: Any, images: int, k: int, rounds: int) -> float:
    """Median time of scoring a gallery, its features excluded."""
    reranker = Reranker(model, {"k_test": k})
    size, width = model.options.image_size, model.visual_encoder.vision_width
    tokens = 1 + (size // model.options.vit.patch_size) ** 2
    states = {i: torch.randn(tokens, width) for i in range(images)}
    with torch.no_grad():
        captions = reranker.encode_texts(texts(model, None, 5 * images, USUAL["words"])).tokens
        order = torch.rand(images, 5 * images).argsort(dim=1)
        wanted = (order < k) | (torch.rand(5 * images, images).argsort(dim=1) < k).T
        return statistics.median(
            timed(lambda: reranker.match(states, captions, wanted)) for _ in range(rounds)
        )


def run(small: bool, rounds: int) -> list[Cost]:
    """Measure along each axis, with everything else as in USUAL."""
    trained, still = (build(small, None, queue_size=1024) for _ in range(2))
    trained.train(), still.eval()
    size, words, costs = USUAL["batch"], USUAL["words"], []

    def add(axis: str, values: Sequence[int], measure: Callable[[int], float]) -> None:
        for value in tqdm(values, desc=f"cost by {axis}", leave=False):
            costs.append(Cost(axis, value, measure(value)))

    def at(image_size: int) -> float:
        model = build(small, None, queue_size=1024, image_size=image_size).train()
        return step_seconds(model, size, words, rounds)

    add("batch", BATCHES, lambda n: step_seconds(trained, n, words, rounds))
    add("words of a caption", WORDS, lambda n: step_seconds(trained, size, n, rounds))
    add("image size (pixels)", SIZES[small], at)
    add("gallery (images)", GALLERIES, lambda n: rerank_seconds(still, n, USUAL["k"], rounds))
    add("k", KS, lambda k: rerank_seconds(still, USUAL["images"], k, rounds))
    return costs


def draw(costs: Sequence[Cost], path: Path) -> None:
    """Draw one panel per axis, with seconds upwards."""
    axes = list(dict.fromkeys(cost.axis for cost in costs))
    figure = Figure(figsize=(3 * len(axes), 2.8), layout="constrained")
    for panel, axis in zip(figure.subplots(1, len(axes)), axes, strict=True):
        mine = [cost for cost in costs if cost.axis == axis]
        panel.plot([cost.value for cost in mine], [cost.seconds for cost in mine], "o-")
        panel.set(xlabel=axis, xlim=(0, None), ylim=(0, None))
        panel.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
