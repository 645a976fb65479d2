"""One variant with one seed: its stages, each in a folder of its own with its result beside it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softmask_plugin import launch
from softmask_plugin.ablate.cost import relative_cost
from softmask_plugin.ablate.plan import PRETRAINED, Plan, Stage
from softmask_plugin.errors import UserError, suggest
from softmask_plugin.runners.environment import environment
from softmask_plugin.whole_files import write_json

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
        return self._read(self.place(stage) / RESULT, stage)

    @property
    def unfinished(self) -> list[Stage]:
        """The stages that have no result yet."""
        return [stage for stage in self.plan.stages if self.result(stage) is None]

    @property
    def cost(self) -> list[float] | None:
        """What a step of the variant costs, see ``relative_cost``; None where it is not timed."""
        found = self._read(self.cost_file, self.plan.base)
        return None if found is None else found["step_time"]

    @property
    def cost_file(self) -> Path:
        """Keeps the cost, which is the same for all seeds."""
        return self.folder / self.variant / COST

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do: the first seed's job times a step as well."""
        return not self.unfinished and not self.has_to_time

    @property
    def has_to_time(self) -> bool:
        """Whether it is this job's part to time a step; the baseline's is the unit."""
        first = self.seed == self.plan.seeds[0] and self.variant != self.plan.baseline
        return first and self.cost is None

    def discard(self) -> None:
        """Throw away all of the variant's results with this seed, and its cost."""
        shutil.rmtree(self.place(self.plan.base).parent, ignore_errors=True)
        self.cost_file.unlink(missing_ok=True)

    def _read(self, file: Path, stage: Stage) -> dict[str, Any] | None:
        if not file.is_file():
            return None
        remedy = f"start the row again with --only {self.variant} --again, or use another folder"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            asked = found["config"], found["options"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is broken: {remedy}") from error
        if asked != (stage.config, self.plan.options(self.variant, stage)):
            raise UserError(f"{file} is of another config or options than the plan's: {remedy}")
        return found


def run(job: Job) -> Iterator[tuple[Stage, dict[str, Any]]]:
    """Run the unfinished stages of a job, and give each one's result as soon as it is written; then
    measure what a step costs, where that is the job's part.

    A stage that was killed goes on from its last checkpoint.
    """
    for stage in job.unfinished:
        result = _run(job, stage)
        write_json(job.place(stage) / RESULT, result)
        yield stage, result
    if job.has_to_time:
        cost = {"step_time": relative_cost(job.plan, job.variant)}
        write_json(job.cost_file, {**_asked(job, job.plan.base), **cost})


def _run(job: Job, stage: Stage) -> dict[str, Any]:
    asked, base = _asked(job, stage), job.plan.base
    options = [*asked["options"], f"run.seed={job.seed}", f"run.output_dir={job.place(stage)}"]
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
        **asked,
        "run": runner.output_dir.name,
        "seconds": round(time.monotonic() - began, 1),  # since it last went on
        "environment": environment(runner.device),
    }
    if stage.train:
        result["checkpoint"] = f"checkpoint_{runner.max_epoch - 1}.pth"
    if stage.metrics:
        result["metrics"] = _metrics(stage, results or {})
    return result


def _asked(job: Job, stage: Stage) -> dict[str, Any]:
    """What a result is of."""
    return {"config": stage.config, "options": job.plan.options(job.variant, stage)}


def _metrics(stage: Stage, results: dict[str, Any]) -> dict[str, float]:
    found = next(iter(results.values()), None) or {}
    for metric in stage.metrics:
        if metric not in found:
            raise UserError(f"stage '{stage.name}' gave no '{metric}': {suggest(metric, found)}")
    return {metric: float(found[metric]) for metric in stage.metrics}
