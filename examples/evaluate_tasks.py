"""Evaluate every downstream task with LAVIS's own tasks, on held-out scenes.

    python examples/evaluate_tasks.py [--models outputs/tasks] [--options run.device=cuda]

The folder holds a fine-tuned model for each task, as `make tasks` writes it. Prints for each task
its metric beside chance, in percent. Chance is a random ranking or choice, or the most frequent
answer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from softmask_plugin import launch, report
from softmask_plugin.config.check import option

YAML = "lavis_configs/projects/scenes/eval/{}_tiny.yaml"
# Task, metric and scale: LAVIS reports some metrics as shares, some in percent
TASKS = (
    ("retrieval", "txt_r1", 1),
    ("blip_retrieval", "txt_r1", 1),
    ("entailment", "acc", 100),
    ("nlvr", "acc", 100),
    ("vqa", "agg_metrics", 1),
    ("grounding", "acc", 1),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, default=Path("outputs/tasks"))
    parser.add_argument("--options", nargs="*", default=[], help="overrides for every task")
    given = parser.parse_args()
    models = given.models

    checkpoints = {task: trained_model(models, task) for task, *_ in TASKS}
    rows = []
    for task, metric, scale in TASKS:
        options = [
            option("model.pretrained", checkpoints[task]),
            option("run.output_dir", models / "evaluate"),
            *given.options,
        ]
        runner, results = launch.run(YAML.format(task), options, evaluate=True)
        metrics = results["test"] if results else {}
        chance = report.chance_of(runner.dataloaders["test"].dataset)
        guess = chance.get(metric, metrics.get(f"{metric}_chance"))  # grounding measures its own
        rows.append(f"{task:16}{metric:14}{scale * metrics[metric]:6.1f}{scale * guess:10.1f}")
    print(f"{'task':16}{'metric':14}{'':4}%    chance", *rows, sep="\n")


def trained_model(models: Path, task: str) -> Path:
    """The newest model of a task; grounding uses the word maps of the one for retrieval."""
    name = "retrieval" if task == "grounding" else task
    found = sorted(models.glob(f"{name}_pretrained/*/checkpoint_best.pth"))
    if not found:
        sys.exit(f"no model for {task} in {models}: run `make tasks` first, or give --models")
    return found[-1]


if __name__ == "__main__":
    main()
