"""``make tasks``: how much pretraining helps each downstream task, on rendered scenes.

A tiny model is pretrained (for BLIP one of its own); then each task fine-tunes a copy of it and an
untrained model alike, with LAVIS's own tasks. Grounding needs no training: it uses the word maps of
the retrieval models.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from softmask_plugin import launch, report
from softmask_plugin.ablate.table import markdown_table
from softmask_plugin.config.check import option
from softmask_plugin.files.whole import write_json

PROJECTS = "lavis_configs/projects/scenes"
SMALL = ["run.max_epoch=1", "run.batch_size_train=8", "run.warmup_steps=1"]


@dataclass(frozen=True)
class Task:
    """A downstream task."""

    name: str
    data: str  # its data set
    metric: str
    scale: float  # that makes the metric a percentage
    between: str | None = None  # a second pretraining step before it
    start: str = "pretrain"  # the first


@dataclass
class Result:
    """One row, in percent."""

    task: str
    metric: str
    chance: float
    scratch: float
    pretrained: float
    seconds: float  # of fine-tuning the pretrained model


TASKS = (
    Task("retrieval", "scenes_retrieval", "txt_r1", 1),
    Task("blip_retrieval", "scenes_retrieval", "txt_r1", 1, start="blip_pretrain"),
    Task("entailment", "scenes_entailment", "acc", 100),
    Task("nlvr", "scenes_nlvr", "acc", 100, between="nlvr_pretrain"),
    Task("vqa", "scenes_vqa", "agg_metrics", 1),
)


def main() -> None:
    """Pretrain, fine-tune and evaluate; print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__)
    parser.add_argument("names", nargs="*", help="tasks, default: all")
    parser.add_argument("--small", action="store_true", help="a few steps, a trial of a minute")
    parser.add_argument("--pretrained", help="use this ALBEF instead of pretraining one")
    folder = Path("outputs/tasks")
    parser.add_argument("--output", type=Path, default=folder, help="default: %(default)s")
    given = parser.parse_args()
    known = [task.name for task in TASKS]
    for name in given.names:
        if name not in known:
            parser.error(f"there is no task '{name}': choose from {', '.join(known)}")

    began = time.perf_counter()
    weights = {"pretrain": given.pretrained} if given.pretrained else {}
    results = []
    for task in TASKS:
        if not given.names or task.name in given.names:
            if task.start not in weights:
                weights[task.start] = pretrain(task.start, [], given.output, given.small)
            results += compare(task, weights[task.start], given.output, given.small)
    print(table(results))
    seconds, rows = time.perf_counter() - began, [asdict(result) for result in results]
    file = given.output / "tasks.json"
    write_json(file, {"seconds": seconds, "small": given.small, "results": rows})
    print(f"\n{seconds:.0f} s; written: {file}")


def pretrain(name: str, options: list[str], output: Path, small: bool) -> str:
    """Pretrain a tiny model; return the path of its last checkpoint."""
    options = [option("run.output_dir", output / name), *options]
    if small:
        options += [*SMALL, "datasets.scenes_pretrain.num.train=16"]
    runner, _ = launch.run(f"{PROJECTS}/train/{name}_tiny.yaml", options)
    return str(runner.output_dir / f"checkpoint_{runner.max_epoch - 1}.pth")


def compare(task: Task, weights: str, output: Path, small: bool) -> list[Result]:
    """Train a task from scratch and from ``weights``; with retrieval comes grounding."""
    if task.between:
        weights = pretrain(task.between, [option("model.pretrained", weights)], output, small)
    starts = {"scratch": [], "pretrained": [option("model.pretrained", weights)]}
    runs = {
        start: finetune(task, options, output / f"{task.name}_{start}", small)
        for start, options in starts.items()
    }
    (_, scratch, _), (runner, metrics, seconds) = runs["scratch"], runs["pretrained"]
    chance = report.chance_of(runner.dataloaders["test"].dataset)
    row = Result(
        task.name,
        task.metric,
        task.scale * chance[task.metric],
        task.scale * scratch[task.metric],
        task.scale * metrics[task.metric],
        seconds,
    )
    if task.name != "retrieval":
        return [row]
    before, after = (ground(run.output_dir, output, small) for run, _, _ in runs.values())
    rows = [
        Result("grounding", name, after[f"{name}_chance"], before[name], after[name], 0.0)
        for name in ("acc", "pointing")
    ]
    return [row, *rows]


def finetune(
    task: Task, options: list[str], output: Path, small: bool
) -> tuple[Any, dict[str, float], float]:
    """Train and test; return the runner, the test split's metrics, and the seconds."""
    options = [option("run.output_dir", output), *options]
    if small:
        sizes = {"train": 16, "val": 8, "test": 8}
        options += [*SMALL, *(f"datasets.{task.data}.num.{s}={n}" for s, n in sizes.items())]
    began = time.perf_counter()
    runner, results = launch.run(f"{PROJECTS}/train/{task.name}_tiny.yaml", options)
    logging.info("%s: %s", task.name, results)
    return runner, dict(results["test"]) if results else {}, time.perf_counter() - began


def ground(run: Path, output: Path, small: bool) -> dict[str, float]:
    """Metrics of grounding with a run's best checkpoint."""
    options = [option("run.output_dir", output / "grounding")]
    options += [option("model.pretrained", run / "checkpoint_best.pth")]
    if small:
        options += [f"datasets.scenes_grounding.num.{split}=8" for split in ("val", "test")]
    _, results = launch.run(f"{PROJECTS}/eval/grounding_tiny.yaml", options, evaluate=True)
    return dict(results["test"]) if results else {}


def table(results: list[Result]) -> str:
    """The rows as a Markdown table."""
    head = ["task", "metric", "chance", "from scratch", "pretrained", "seconds"]
    lines = []
    for row in results:
        percents = [f"{each:.1f}" for each in (row.chance, row.scratch, row.pretrained)]
        lines.append([row.task, row.metric, *percents, f"{row.seconds:.0f}"])
    return "\n" + markdown_table(head, lines)


if __name__ == "__main__":
    main()
