"""The whole story in minutes: render scenes, pretrain, retrieve, and show what the masks hide."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
from lavis.tasks.retrieval import RetrievalTask
from matplotlib.figure import Figure

from softmask_plugin import launch, report
from softmask_plugin.config.check import option
from softmask_plugin.datasets.scenes.builders import SceneEvalDataset
from softmask_plugin.datasets.scenes.render import render
from softmask_plugin.explain.figure import word_panel
from softmask_plugin.explain.pairs import Explanation, explain
from softmask_plugin.host.environment import environment
from softmask_plugin.models.rerank import Reranker
from softmask_plugin.pointing import pointing_game, swapped

TRAIN = "lavis_configs/projects/scenes/train/pretrain_tiny.yaml"
EVALUATE = "lavis_configs/projects/scenes/eval/retrieval_tiny.yaml"
PANELS = 6  # scenes shown
POINTED = 200  # scenes whose words play the pointing game


def main(output_dir: str | Path = "outputs/demo", options: list[str] | None = None) -> Path:
    """Pretrain a tiny SoftMask++ on scenes, evaluate retrieval on held-out ones, write a report.

    Args:
        output_dir: gets ``report.html``, ``metrics.json`` and the folders of the two runs.
        options: overrides of the pretraining YAML, each "section.key=value".

    Returns:
        The report's path.
    """
    began, output = time.perf_counter(), Path(output_dir)
    trained, _ = launch.run(
        TRAIN, [option("run.output_dir", output / "pretrain"), *(options or [])]
    )
    weights = trained.output_dir / f"checkpoint_{trained.max_epoch - 1}.pth"
    given = [option("run.output_dir", output / "retrieval"), option("model.pretrained", weights)]
    given += [each for each in options or [] if each.startswith(("model.", "run.device"))]
    evaluated, results = launch.run(EVALUATE, given, evaluate=True)

    model, loader = evaluated.unwrap_dist_model(evaluated.model), evaluated.dataloaders["test"]
    scenes: SceneEvalDataset = loader.dataset
    explained = [_explain(model, scenes, image) for image in range(min(POINTED, len(scenes)))]
    metrics = {
        "retrieval": {
            "chance": report.retrieval_chance(scenes.img2txt),
            "itc": _itc_alone(model, loader),
            "itm": results["test"] if results else {},
        },
        "images": len(scenes.image),
        "texts": len(scenes.text),
        **_pointing(scenes, explained),
        "seconds": round(time.perf_counter() - began, 1),
    }
    records = report.read_metrics(trained.output_dir)
    page = report.write_report(
        output / "report.html",
        title="SoftMask++ on rendered scenes",
        summary="A tiny model, pretrained from nothing on rendered scenes, matches scenes that it "
        "never saw with their captions. The pictures show where it looks for a word, and what the "
        "soft mask hides when training picks that word.",
        metrics=metrics,
        records=records,
        panels=_panels(scenes, explained),
        config=trained.config.to_dict(),
        environment=environment(trained.device),
    )
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    _say(page, metrics)
    return page


def _itc_alone(model: Any, loader: Any) -> dict[str, float]:
    """Recalls by the contrastive similarity alone, counted by LAVIS's retrieval task."""
    similarity = Reranker(model).similarity(loader).cpu().numpy()
    data = loader.dataset
    return RetrievalTask._report_metrics(similarity, similarity.T, data.txt2img, data.img2txt)


def _explain(model: Any, scenes: SceneEvalDataset, image: int) -> tuple[int, Explanation]:
    """Explain one scene by its first caption; returns that caption's index as well."""
    text = scenes.img2txt[image][0]
    return text, explain(model, scenes[image]["image"][None], [scenes.text[text]])[0]


def _pointing(scenes: SceneEvalDataset, explained: list[tuple[int, Explanation]]) -> dict[str, Any]:
    """Pointing game of the words' maps: on their own object, and on the scene's other one."""
    own, other = [], []
    for text, explanation in explained:
        boxes = scenes.boxes(text)
        own += [(explanation.cams[word], box, role) for word, box, role in boxes]
        other += [(explanation.cams[word], box, role) for word, box, role in swapped(boxes)]
    return {
        "pointing": pointing_game(own),
        "pointing_other": pointing_game(other),
    }


def _panels(scenes: SceneEvalDataset, explained: list[tuple[int, Explanation]]) -> list[Figure]:
    """Pictures of the first scenes: for each word of an object, its heat map and its mask."""
    panels = []
    for text, explanation in explained[:PANELS]:
        boxes = scenes.boxes(text)
        picture = np.asarray(render(scenes.scenes[scenes.txt2img[text]], 256))
        words = [word for word, _, role in boxes if role in ("colour", "shape")]
        panels.append(word_panel(picture, explanation, words, boxes))
    return panels


def _say(page: Path, metrics: dict[str, Any]) -> None:
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
