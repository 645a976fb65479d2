"""A variant with a seed: where its stages lie, what they left, and whether that is of this plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softmask_plugin.ablate.plan import Plan, Stage
from softmask_plugin.config.values import differences
from softmask_plugin.errors import UserError, reason_of
from softmask_plugin.runners.run_folder import lock, release

ASKED = "asked.json"  # what a stage was begun with: nothing else goes on with it, or counts it
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

    @property
    def home(self) -> Path:
        """What holds all of the job's stages; locked while a process works on it."""
        return self.folder / self.variant / f"seed_{self.seed}"

    def place(self, stage: Stage) -> Path:
        """The folder that holds a stage's run and result."""
        return self.home / stage.name

    def asked(self, stage: Stage) -> Mapping[str, Any]:
        """What the plan asks of a stage."""
        return self.plan.asked[self.variant, stage.name]

    def result(self, stage: Stage) -> dict[str, Any] | None:
        """What a finished stage left; None where it is not finished.

        Raises:
            UserError: the result is broken, or the plan asks for something else.
        """
        if not (self.place(stage) / RESULT).is_file():
            return None
        self.require_same(stage)
        return self._read(stage, RESULT)

    def checkpoint(self, stage: Stage) -> Path | None:
        """The last checkpoint of a finished stage that trains; None where it is not finished."""
        result = self.result(stage)
        if result is None:
            return None
        return self.place(stage) / result["run"] / result["checkpoint"]

    def require_same(self, stage: Stage) -> None:
        """Raise UserError where a stage was begun with something else than the plan asks for."""
        before, now = self._read(stage, ASKED), self.asked(stage)
        for key, old, new in differences(before, now, absent="unset"):
            raise UserError(
                f"{self.place(stage)} had {key} = {old}, but the plan has {new}: "
                f"{self._remedy(stage)}"
            )

    @property
    def unfinished(self) -> list[Stage]:
        """The stages that have no result yet."""
        return [stage for stage in self.plan.stages if self.result(stage) is None]

    @property
    def cost(self) -> list[float] | None:
        """What a step of the variant costs, see ``relative_cost``; None where it is not known."""
        return (self._timed or {}).get("step_time")

    @property
    def cost_file(self) -> Path:
        """Keeps the cost, which is the same for all seeds."""
        return self.folder / self.variant / COST

    @property
    def pair(self) -> dict[str, Mapping[str, Any]]:
        """What the two that a step's time compares are asked to do."""
        plan = self.plan
        names = {"variant": self.variant, "baseline": plan.baseline}
        return {key: plan.asked[name, plan.base.name] for key, name in names.items()}

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do: the first seed's job times a step as well."""
        return not self.unfinished and not self.has_to_time

    @property
    def has_to_time(self) -> bool:
        """Whether it is this job's part to time a step; the baseline's is the unit."""
        first = self.seed == self.plan.seeds[0] and self.variant != self.plan.baseline
        return first and self._timed is None

    @property
    def _timed(self) -> dict[str, Any] | None:
        """What ``cost_file`` says; None where there is none yet, or of another pair."""
        try:
            found = json.loads(self.cost_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return found if found.get("asked") == self.pair else None

    def discard(self) -> None:
        """Throw away all of the variant's results with this seed, and its cost.

        Raises:
            UserError: another process works on it, or a file cannot be deleted.
        """
        if not self.home.is_dir():
            return
        self.take()
        try:
            shutil.rmtree(self.home)
            self.cost_file.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{self.home} cannot be deleted: {reason_of(error)}") from error
        finally:
            self.release()

    def take(self) -> None:
        """Lock the job's folder until ``release``; UserError where another process has it."""
        if not lock(self.home):
            raise UserError(
                f"another command works on {self.home}: give this one again when it is through"
            )

    def release(self) -> None:
        """Let other processes work on the job."""
        release(self.home)

    def _read(self, stage: Stage, name: str) -> dict[str, Any]:
        file = self.place(stage) / name
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{file} is missing or broken: {self._remedy(stage)}") from error

    def _remedy(self, stage: Stage) -> str:
        if stage is self.plan.base:
            return f"start the row again with --only {self.variant} --again, or in another folder"
        return f"delete {self.place(stage)}, and the same command measures it again"
