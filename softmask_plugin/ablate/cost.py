"""What a variant's training step costs, relative to the baseline's."""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from softmask_plugin import launch
from softmask_plugin.ablate.plan import Plan
from softmask_plugin.check import timed_steps
from softmask_plugin.config.check import option
from softmask_plugin.config.values import comparable


def relative_cost(plan: Plan, variant: str, rounds: int = 15) -> list[float] | None:
    """Time a variant's pretraining step, data loading included, over the baseline's.

    The two take turns in one process, so that other load on the machine slows both alike. The first
    step of each is not counted. What starts later in training, a mask, ITM or the momentum model's
    targets, is on from the start.

    Returns:
        Quartiles of the ratio over the rounds; None if two models do not fit into memory.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            own, other = (take_steps(plan, name, folder) for name in (variant, plan.baseline))
            ratios = [next(own) / next(other) for _ in range(rounds + 1)]
    except torch.OutOfMemoryError:
        logging.warning("step time not measured: two models do not fit into memory")
        return None
    return statistics.quantiles(ratios[1:], n=4, method="inclusive")


def take_steps(plan: Plan, variant: str, folder: str) -> Iterator[float]:
    """Take a variant's pretraining steps; yield the duration of each, in seconds."""
    options, asked = plan.options(variant, plan.base), plan.asked[variant, plan.base.name]
    # The timed steps are the first
    late = ("model.alpha_epochs", "model.itc_steps", "model.soft_mask.start_iter")
    options += [f"{key}=0" for key in late if key in comparable(asked)]
    options += ["run.max_epoch=0", "run.valid_splits=[]", "run.test_splits=[]"]  # only set up
    options += [option("run.output_dir", folder)]
    runner: Any = launch.run(plan.base.config, options)[0]
    yield from timed_steps(runner)
