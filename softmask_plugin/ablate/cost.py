"""What a step of a variant costs: timed in turns with the baseline's, in one process."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from softmask_plugin import launch
from softmask_plugin.ablate.plan import Plan
from softmask_plugin.config.check import option

ROUNDS = 15  # steps of each that count
# A run that builds all that a step needs, and ends
NOTHING = ["run.max_epoch=0", "run.valid_splits=[]", "run.test_splits=[]"]
LATE = "model.soft_mask.start_iter="  # an option with which the timed steps would have no mask


def relative_cost(plan: Plan, variant: str, rounds: int = ROUNDS) -> list[float]:
    """Seconds of a pretraining step, its data's included, over the baseline's.

    The two take turns, so that whatever else the machine does slows both alike. A first step of
    each is not counted. A mask that starts later in training is on from the first of these steps.

    Returns:
        The quartiles over the rounds, the median in the middle.
    """
    with tempfile.TemporaryDirectory() as folder:
        own, other = (Stepper(plan, name, Path(folder)) for name in (variant, plan.baseline))
        ratios = [own.seconds() / other.seconds() for _ in range(rounds + 1)]
    return statistics.quantiles(ratios[1:], n=4, method="inclusive")


class Stepper:
    """Takes optimizer steps on successive batches as a variant's pretraining does.

    Args:
        plan: what is trained how.
        variant: which of its variants.
        folder: gets the folder of a run.
    """

    def __init__(self, plan: Plan, variant: str, folder: Path) -> None:
        asked = [each for each in plan.options(variant, plan.base) if not each.startswith(LATE)]
        options = [*asked, option("run.output_dir", folder), *NOTHING]
        self.runner: Any = launch.run(plan.base.config, options)[0]
        self.runner.model.train()
        loader = self.runner.train_loader
        self.batches = itertools.chain.from_iterable(
            loader.batches(epoch, 0) for epoch in itertools.count()
        )

    def seconds(self) -> float:
        """Take a step; return its duration."""
        runner, began = self.runner, _now()
        runner._step(runner._accumulate(self.batches, range(runner.accum_grad_iters), 0))
        return _now() - began


def _now() -> float:
    """The clock in seconds, once a GPU has done all that was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
