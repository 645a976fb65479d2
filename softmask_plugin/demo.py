"""The demo: pretrain on rendered scenes, rank held-out ones, and show what the mask hides."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lavis.tasks.retrieval import RetrievalTask
from matplotlib.figure import Figure

from softmask_plugin import launch, report
from softmask_plugin.config.check import option
from softmask_plugin.datasets.scenes.builders import SceneRetrievalDataset
from softmask_plugin.datasets.scenes.render import render
from softmask_plugin.explain.figure import Shown, word_panels
from softmask_plugin.explain.pairs import Explanation, explain
from softmask_plugin.files.checkpoint import furthest_first
from softmask_plugin.host.environment import environment
from softmask_plugin.models.rerank import Reranker
from softmask_plugin.pointing import pointing_game, swapped
from softmask_plugin.report.pairs import DPI, WIDTH

TRAIN = "lavis_configs/projects/scenes/train/pretrain_tiny.yaml"
EVALUATE = "lavis_configs/projects/scenes/eval/retrieval_tiny.yaml"
PANELS = 6  # scenes in the report
POINTED = 200  # scenes in the pointing game


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
    scenes: SceneRetrievalDataset = loader.dataset
    explained = explain_scenes(model, scenes)
    cosines = Reranker(model).similarity(loader).cpu().numpy()
    metrics = {
        "retrieval": {
            "chance": report.retrieval_chance(scenes.img2txt),
            "itc": RetrievalTask._report_metrics(
                cosines, cosines.T, scenes.txt2img, scenes.img2txt
            ),
            "itm": results["test"] if results else {},
        },
        "images": len(scenes.image),
        "texts": len(scenes.text),
        **pointing(scenes, explained),
        "seconds": round(time.perf_counter() - start, 1),
    }
    page = report.write_report(
        output / "report.html",
        title="SoftMask++ on rendered scenes",
        summary="A tiny model, pretrained from scratch on rendered scenes, matches unseen scenes "
        "with their captions. The pictures show where it looks for a word, and what the soft mask "
        "hides when training picks that word.",
        metrics={**metrics, "results": _results(**metrics["retrieval"])},
        records=report.read_metrics(trained.output_dir),
        panels=[_panel(scenes, *each) for each in islice(explained.items(), PANELS)],
        config=trained.config.to_dict(),
        environment=environment(trained.device),
    )
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    _print(page, metrics)
    return page


def _results(chance: dict[str, float], itc: Any, itm: Any) -> dict[str, Any]:
    guess = {f"{name}_chance": value for name, value in chance.items()}
    return {"By contrast alone (ITC)": itc | guess, "Re-ranked by matching (ITM)": itm | guess}


def explain_scenes(model: Any, scenes: SceneRetrievalDataset) -> dict[int, Explanation]:
    """Explain the first caption of each of the first scenes; by the caption's index."""
    images = [scenes[image]["image"] for image in range(min(POINTED, len(scenes)))]
    texts = [scenes.img2txt[image][0] for image in range(len(images))]
    captions = [scenes.text[text] for text in texts]
    return dict(zip(texts, explain(model, torch.stack(images), captions), strict=True))


def pointing(scenes: SceneRetrievalDataset, explained: dict[int, Explanation]) -> dict[str, Any]:
    """Pointing game with each word's own object, and with the scene's other one."""
    own, other = [], []
    for text, explanation in explained.items():
        boxes = scenes.boxes(text)
        own += [(explanation.cams[word], box, role) for word, box, role in boxes]
        other += [(explanation.cams[word], box, role) for word, box, role in swapped(boxes)]
    return {"pointing": pointing_game(own), "pointing_other": pointing_game(other)}


def _panel(scenes: SceneRetrievalDataset, text: int, explanation: Explanation) -> Figure:
    boxes = scenes.boxes(text)
    (scene,) = scenes.annotation[scenes.txt2img[text]]["scenes"]
    picture = np.asarray(render(scene, 256))
    words = [word for word, _, role in boxes if role in ("colour", "shape")]
    return word_panels([Shown(picture, explanation, words, boxes)], DPI, WIDTH)


def _print(page: Path, metrics: dict[str, Any]) -> None:
    best, chance = metrics["retrieval"]["itm"], metrics["retrieval"]["chance"]
    point, other = metrics["pointing"]["shape"], metrics["pointing_other"]["shape"]
    logging.info("finished after %.0f s", metrics["seconds"])
    print(
        f"\nReport: {page}\n"
        f"Retrieval R@1 on {metrics['images']} held-out scenes: text {best['txt_r1']:.1f}%, "
        f"image {best['img_r1']:.1f}% (chance {chance['txt_r1']:.1f}%, {chance['img_r1']:.1f}%)\n"
        f"A shape word's map peaks on its object: {100 * point['hit']:.0f}% "
        f"(chance {100 * point['chance']:.0f}%, on the other object {100 * other['hit']:.0f}%)"
    )
