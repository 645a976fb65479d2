"""One variant with one seed: its stages, each in a folder of its own with its result beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softmask_plugin import launch
from softmask_plugin.ablate.cost import relative_cost
from softmask_plugin.ablate.plan import PRETRAINED, Plan, Stage
from softmask_plugin.errors import UserError, suggest
from softmask_plugin.whole_files import write_whole

RESULT = "result.json"
COST = "cost.json"


@dataclass(frozen=True)
class Job:
    """A variant with a seed; ``folder`` is the ablation's."""

    plan: Plan
    variant: str
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"

    def place(self, stage: Stage) -> Path:
        """The folder that holds a stage's run and result."""
        return self.folder / self.variant / f"seed_{self.seed}" / stage.name

    def result(self, stage: Stage) -> dict[str, Any] | None:
        """What a finished stage left; None where it is not finished.

        Raises:
            UserError: the result is broken, or of other options than the plan's.
        """
        file = self.place(stage) / RESULT
        if not file.is_file():
            return None
        remedy = "start the row again with --again, or name another --output-dir"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            asked = found["config"], found["options"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is broken: {remedy}") from error
        if asked != (stage.config, self.plan.options(self.variant, stage)):
            raise UserError(f"{file} is of another config or options than the plan's: {remedy}")
        return found

    @property
    def unfinished(self) -> list[Stage]:
        """The stages that have no result yet."""
        return [stage for stage in self.plan.stages if self.result(stage) is None]

    @property
    def cost_file(self) -> Path:
        """What a step of the variant costs, the same for all seeds."""
        return self.folder / self.variant / COST

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do: the first seed's job measures the cost as well."""
        return not self.unfinished and (self.seed != self.plan.seeds[0] or self.cost_file.is_file())


def run(job: Job) -> Iterator[tuple[Stage, dict[str, Any]]]:
    """Run the unfinished stages of a job, and give each one's result as soon as it is written; then
    measure what a step costs, where that is the job's part.

    A stage that was killed goes on from its last checkpoint.
    """
    for stage in job.unfinished:
        result = _run(job, stage)
        _write(job.place(stage) / RESULT, result)
        yield stage, result
    if not job.is_done:
        _write(job.cost_file, {"step_time": relative_cost(job.plan, job.variant)})


def _run(job: Job, stage: Stage) -> dict[str, Any]:
    asked, base = job.plan.options(job.variant, stage), job.plan.base
    options = [*asked, f"run.seed={job.seed}", f"run.output_dir={job.place(stage)}"]
    if stage is not base:
        pretrained = job.result(base) or {}
        folder = job.place(base) / pretrained["run"]
        options = [option.replace(f"={PRETRAINED}/", f"={folder}/") for option in options]
        if stage.pretrained:
            options.append(f"model.pretrained={folder / pretrained['checkpoint']}")
    if stage.train:
        options.append("run.resume_ckpt_path=auto")
    began = time.monotonic()
    runner, results = launch.run(stage.config, options, evaluate=not stage.train)
    result: dict[str, Any] = {
        "config": stage.config,
        "options": asked,
        "run": runner.output_dir.name,
        "seconds": round(time.monotonic() - began, 1),  # since it last went on
    }
    if stage.train:
        result["checkpoint"] = f"checkpoint_{runner.max_epoch - 1}.pth"
    if stage.metrics:
        result["metrics"] = _metrics(stage, results or {})
    return result


def _metrics(stage: Stage, results: dict[str, Any]) -> dict[str, float]:
    found = next(iter(results.values()), None) or {}
    for metric in stage.metrics:
        if metric not in found:
            raise UserError(f"stage '{stage.name}' gave no '{metric}': {suggest(metric, found)}")
    return {metric: float(found[metric]) for metric in stage.metrics}


def _write(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_whole(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
