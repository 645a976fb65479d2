"""The demo: pretrain on rendered scenes, rank held-out ones, and show what the mask hides."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lavis.tasks.retrieval import RetrievalTask
from matplotlib.figure import Figure

from softmask_plugin import launch, report
from softmask_plugin.config.check import option
from softmask_plugin.datasets.scenes.render import render
from softmask_plugin.datasets.task_datasets import RetrievalDataset
from softmask_plugin.explain.figure import Shown, word_panels
from softmask_plugin.explain.pairs import Explanation, explain
from softmask_plugin.explain.scenes import pointing
from softmask_plugin.files.checkpoint import furthest_first
from softmask_plugin.files.whole import write_json
from softmask_plugin.host.environment import environment
from softmask_plugin.models.rerank import Reranker
from softmask_plugin.report.pairs import DPI, WIDTH

TRAIN = "lavis_configs/projects/scenes/train/pretrain_tiny.yaml"
EVALUATE = "lavis_configs/projects/scenes/eval/retrieval_tiny.yaml"
PANELS = 6  # scenes in the report


def main(output_dir: str | Path = "outputs/demo", options: Sequence[str] = ()) -> Path:
    """Pretrain a tiny SoftMask++ on scenes, evaluate retrieval on held-out ones, write a report.

    Args:
        output_dir: Folder for ``report.html``, ``metrics.json`` and the folders of the two runs.
        options: Overrides of the pretraining YAML, each "section.key=value".

    Returns:
        The report's path.
    """
    start, output = time.perf_counter(), Path(output_dir)
    trained, _ = launch.run(TRAIN, [option("run.output_dir", output / "pretrain"), *options])
    (weights, *_) = furthest_first(trained.output_dir)
    shared = [each for each in options if each.startswith(("model.", "run.device"))]
    given = [option("run.output_dir", output / "retrieval"), option("model.pretrained", weights)]
    evaluated, results = launch.run(EVALUATE, [*given, *shared], evaluate=True)

    model, loader = evaluated.unwrap_dist_model(evaluated.model), evaluated.dataloaders["test"]
    scenes: RetrievalDataset = loader.dataset
    texts = [each[0] for each in scenes.img2txt.values()][:PANELS]
    images = torch.stack([scenes[scenes.txt2img[text]]["image"] for text in texts])
    explained = explain(model, images, [scenes.text[text] for text in texts])
    cosines, _ = Reranker(model, {"k_test": 0}).scores(loader)
    chance = report.retrieval_chance(scenes.img2txt)
    itc = RetrievalTask._report_metrics(cosines, cosines.T, scenes.txt2img, scenes.img2txt)
    itm: Any = results["test"] if results else {}
    guess = {f"{name}_chance": value for name, value in chance.items()}
    ranked = {"By contrast alone (ITC)": itc | guess, "Re-ranked by matching (ITM)": itm | guess}
    metrics = {
        "retrieval": {"chance": chance, "itc": itc, "itm": itm},
        "images": len(scenes.image),
        "texts": len(scenes.text),
        **pointing(model, scenes),
        "seconds": round(time.perf_counter() - start, 1),
    }
    page = report.write_report(
        output / "report.html",
        title="SoftMask++ on rendered scenes",
        summary="A tiny model, pretrained from scratch on rendered scenes, matches unseen scenes "
        "with their captions. The pictures show where it looks for a word, and what the soft mask "
        "hides when training picks that word.",
        metrics={**metrics, "results": ranked},
        records=report.read_metrics(trained.output_dir),
        panels=[_panel(scenes, *each) for each in zip(texts, explained, strict=True)],
        config=trained.config.to_dict(),
        environment=environment(trained.device),
    )
    write_json(output / "metrics.json", metrics)
    _print(page, metrics)
    return page


def _panel(scenes: RetrievalDataset, text: int, explanation: Explanation) -> Figure:
    entry = scenes.annotation[scenes.txt2img[text]]
    (boxes, *_), (scene,) = entry["word_boxes"], entry["scenes"]  # of its first caption
    picture = np.asarray(render(scene, 256))
    words = [word for word, _, role in boxes if role in ("colour", "shape")]
    return word_panels(Shown(picture, explanation, words, boxes), dpi=DPI, width=WIDTH)


def _print(page: Path, metrics: dict[str, Any]) -> None:
    best, chance = metrics["retrieval"]["itm"], metrics["retrieval"]["chance"]
    logging.info("finished after %.0f s", metrics["seconds"])
    print(
        f"\nReport: {page}\n"
        f"Retrieval R@1 on {metrics['images']} held-out scenes: text {best['txt_r1']:.1f}%, "
        f"image {best['img_r1']:.1f}% (chance {chance['txt_r1']:.1f}%, {chance['img_r1']:.1f}%)\n"
    )
    for where, named in metrics["named"].items():
        print(
            f"Maps of colours and shapes, {where}: {named['own']:.0%} peak on the named thing, "
            f"{named['other']:.0%} on another one (chance {named['chance']:.0%}); of two boxes, "
            f"{named['chosen']:.0%} choose the right one"
        )
