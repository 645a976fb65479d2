"""A job, one variant (or the trunk) with one seed: its folder, its runs and their results."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softmask_plugin import launch
from softmask_plugin.ablate.cost import relative_cost
from softmask_plugin.ablate.plan import PRETRAIN, TRUNK, WEIGHTS, Plan, Stage
from softmask_plugin.config.check import option
from softmask_plugin.config.values import comparable, differences
from softmask_plugin.errors import UserError, suggest
from softmask_plugin.files.checkpoint import furthest_first
from softmask_plugin.files.whole import write_json
from softmask_plugin.host.environment import environment
from softmask_plugin.report import read_metrics
from softmask_plugin.runners.run_folder import lock, release

ASKED, RESULT = "asked.json", "result.json"  # of a stage: its part of Plan.asked, and its result


@dataclass(frozen=True)
class Job:
    """A variant, or ``TRUNK``, and a seed; ``folder`` is the ablation's."""

    plan: Plan
    variant: str
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.variant}, seed {self.seed}"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Its runs, in order."""
        trunk = self.plan.trunk
        return (trunk,) if trunk and self.variant == TRUNK else self.plan.stages

    @property
    def trunk(self) -> Job | None:
        """The job that trains the checkpoint that this one starts from; None: it starts anew."""
        forks = self.plan.trunk and self.variant != TRUNK
        return replace(self, variant=TRUNK) if forks else None

    @property
    def is_ready(self) -> bool:
        """Whether it needs no trunk, or its trunk is finished."""
        return self.trunk is None or not self.trunk.unfinished

    # ---- Its folder

    @property
    def home(self) -> Path:
        """Folder of the job's stages."""
        return self.folder / self.variant / f"seed_{self.seed}"

    @property
    def log(self) -> Path:
        """Whatever its runs print."""
        return self.home / "output.log"

    def place(self, stage: Stage) -> Path:
        """Folder of a stage's run and result."""
        return self.home / stage.name

    def asked(self, stage: Stage) -> Mapping[str, Any]:
        """A stage's part of ``Plan.asked``."""
        return self.plan.asked[self.variant, stage.name]

    def result(self, stage: Stage) -> dict[str, Any] | None:
        """The result of a stage; None if it is not finished. UserError if it is broken, or if the
        stage was begun with another configuration."""
        place = self.place(stage)
        if not (place / ASKED).exists() and not (place / RESULT).exists():
            return None
        if self.trunk and self.plan.trunk and stage is self.plan.base:
            self.trunk.result(self.plan.trunk)  # refuses one that was begun otherwise
        before, now = map(comparable, (self._load(stage, ASKED), self.asked(stage)))
        if stage.pretrained:  # earlier versions kept the value of the YAML file
            before[WEIGHTS] = now[WEIGHTS]
        for key, old, new in differences(before, now, absent="unset"):
            remedy = self._remedy(stage)
            raise UserError(f"{place} had {key} = {old}, but the plan has {new}: {remedy}")
        return self._load(stage, RESULT) if (place / RESULT).exists() else None

    def checkpoint(self, stage: Stage) -> Path | None:
        """The last checkpoint of a stage that trains; None if it is not finished."""
        result = self.result(stage)
        return None if result is None else self.place(stage) / result["run"] / result["checkpoint"]

    @property
    def unfinished(self) -> list[Stage]:
        """Stages without a result."""
        return [stage for stage in self.stages if self.result(stage) is None]

    @property
    def cost(self) -> dict[str, Any]:
        """``{"step_time": relative_cost(...)}`` of the variant; {} if it is not measured yet."""
        try:
            found = json.loads(self._cost_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        before, now = (
            {key: comparable(values) for key, values in asked.items()}
            for asked in (found.pop("asked", {}), self._compared)
        )
        return found if before == now else {}

    @property
    def has_to_time(self) -> bool:
        """Whether to measure the cost: only the first seed does, and the baseline's is 1."""
        first = self.seed == self.plan.seeds[0]
        return first and self.variant not in (self.plan.baseline, TRUNK) and not self.cost

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to run."""
        return not self.unfinished and not self.has_to_time

    def _load(self, stage: Stage, name: str) -> dict[str, Any]:
        file = self.place(stage) / name
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{file} is missing or broken: {self._remedy(stage)}") from error

    def _remedy(self, stage: Stage) -> str:
        if stage is self.plan.base:
            return f"start it anew with --only {self.variant} --again, or in another folder"
        return f"delete {self.place(stage)}, and the same command measures it again"

    @property
    def _cost_file(self) -> Path:
        return self.folder / self.variant / "cost.json"

    @property
    def _compared(self) -> dict[str, Mapping[str, Any]]:
        names = {"variant": self.variant, "baseline": self.plan.baseline}
        return {key: self.plan.asked[name, PRETRAIN] for key, name in names.items()}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if not lock(self.home):
            raise UserError(f"another command works on {self.home}: try again when it is done")
        try:
            yield
        finally:
            release(self.home)

    # ---- Its runs

    def discard(self) -> None:
        """Delete all results, and the variant's cost; UserError if another process works on it."""
        if self.home.is_dir():
            with self._locked():
                shutil.rmtree(self.home)
                self._cost_file.unlink(missing_ok=True)

    def run(self) -> Iterator[tuple[Stage, dict[str, Any]]]:
        """Run or resume the unfinished stages; yield each and its result, once that is written.

        Last, measure the cost if this job has to. UserError if another process works on the
        job, or if a stage was begun with another configuration.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        with self._locked():
            for stage in self.unfinished:
                result = self._run(stage)
                write_json(self.place(stage) / RESULT, result)
                yield stage, result
            if self.has_to_time:
                cost = relative_cost(self.plan, self.variant)
                write_json(self._cost_file, {"step_time": cost, "asked": self._compared})

    def _run(self, stage: Stage) -> dict[str, Any]:
        self.place(stage).mkdir(exist_ok=True)
        write_json(self.place(stage) / ASKED, self.asked(stage))
        began = time.monotonic()
        options = self._options(stage)
        runner, results = launch.run(stage.config, options, evaluate=not stage.train)
        result: dict[str, Any] = {
            "run": runner.output_dir.name,
            "seconds": round(time.monotonic() - began, 1),  # since it was last resumed
            "environment": environment(runner.device),
        }
        if stage.train:
            result["checkpoint"] = furthest_first(runner.output_dir)[0].name
            result["losses"] = last_losses(runner.output_dir)
        measured = next(iter((results or {}).values()), None) or {}  # of the only test split
        for metric in stage.metrics:
            if metric not in measured:
                hint = suggest(metric, measured)
                raise UserError(f"stage '{stage.name}' gave no '{metric}': {hint}")
        result["metrics"] = {metric: float(measured[metric]) for metric in stage.metrics}
        return result

    def _options(self, stage: Stage) -> list[str]:
        options = self.plan.options(self.variant, stage)
        if stage.pretrained and (checkpoint := self._origin(stage)) is not None:
            options.append(option(WEIGHTS, checkpoint))
        if stage.train:
            options.append("run.resume_ckpt_path=auto")
        return [*options, f"run.seed={self.seed}", option("run.output_dir", self.place(stage))]

    def _origin(self, stage: Stage) -> Path | None:
        """The checkpoint of the stage that another one starts from."""
        if stage in self.plan.evaluate:
            return self.checkpoint(self.plan.base)
        return self.trunk.checkpoint(self.plan.trunk) if self.trunk and self.plan.trunk else None


def last_losses(run_dir: Path) -> dict[str, float]:
    """Mean of each ``loss_<term>`` over the last epoch's log lines, by term."""
    lines = [line for line in read_metrics(run_dir) if line.get("split") == "train"]
    last = [line for line in lines if line["epoch"] == lines[-1]["epoch"]]
    terms = [name for name in last[-1] if name.startswith("loss_")] if last else []
    return {
        name.removeprefix("loss_"): statistics.fmean(line[name] for line in last if name in line)
        for name in terms
    }
