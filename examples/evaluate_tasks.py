"""Evaluate every downstream task through LAVIS's own tasks, on held-out scenes.

python examples/evaluate_tasks.py [FOLDER]

FOLDER is what `make tasks` wrote, outputs/tasks if not given: the fine-tuned model of each task.
Prints one line of metrics per task.
"""

import sys
from pathlib import Path

from softmask_plugin import launch

YAML = "lavis_configs/projects/scenes/eval/{}_tiny.yaml"
TASKS = ("retrieval", "entailment", "nlvr", "vqa", "grounding")


def main(folder: str = "outputs/tasks", *options: str) -> None:
    lines = []
    for task in TASKS:
        # Grounding reads the word maps of the model that retrieval was fine-tuned to
        trained = "retrieval" if task == "grounding" else task
        checkpoint = max(Path(folder, f"{trained}_pretrained").glob("*/checkpoint_best.pth"))
        given = [f"model.pretrained={checkpoint}", f"run.output_dir={folder}/evaluate"]
        if task == "retrieval":
            given.append("model.arch=softmask_retrieval")
        _, results = launch.run(YAML.format(task), [*given, *options], evaluate=True)
        metrics = results["test"] if results else {}
        shown = ", ".join(f"{name} {value:.3g}" for name, value in sorted(metrics.items()))
        lines.append(f"{task}: {shown}")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
