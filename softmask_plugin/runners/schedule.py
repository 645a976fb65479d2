"""Learning-rate schedule: linear warm-up, then a cosine, both by step."""

from __future__ import annotations

import logging
import math
from typing import Any

import lavis.common.optims  # noqa: F401  LAVIS registers its own schedules only when imported
from torch.optim import Optimizer

from softmask_plugin.errors import UserError
from softmask_plugin.registry import register


@register("lr_scheduler", "softmask_cosine_lr")
class CosineLRScheduler:
    """Linear warm-up from ``warmup_start_lr`` to ``init_lr``, then a cosine to ``min_lr``.

    LAVIS's ``linear_warmup_cosine_lr`` keeps the rate constant within an epoch and ends the warm-up
    with the first epoch; here the rate changes at every step.

    Args:
        optimizer: All its parameter groups get the same rate.
        iters_per_epoch: Optimizer steps per epoch. Only ``softmask_runner`` passes it, LAVIS
            1.0.2's own runner does not: UserError.
        total_steps: Optimizer steps of the run; None: those of ``max_epoch`` epochs.
        warmup_steps: Optimizer steps of the warm-up, which may be longer than an epoch.
        warmup_start_lr: Rate of the first step (``run.warmup_lr``); 0 if negative.
        kwargs: Options of LAVIS's other schedules (``decay_rate``), unused here.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_epoch: int,
        min_lr: float,
        init_lr: float,
        iters_per_epoch: int | None = None,
        total_steps: int | None = None,
        warmup_steps: int = 0,
        warmup_start_lr: float = -1,
        **kwargs: Any,
    ) -> None:
        if iters_per_epoch is None:
            raise UserError(
                "run.lr_sched 'softmask_cosine_lr' needs the number of steps per epoch, which this "
                "runner does not give: set run.runner to 'softmask_runner', or run.lr_sched to "
                "'linear_warmup_cosine_lr'"
            )
        self.optimizer, self.iters_per_epoch = optimizer, iters_per_epoch
        self.total_steps = total_steps or max_epoch * iters_per_epoch
        self.warmup_steps = int(warmup_steps)
        self.min_lr, self.init_lr = min_lr, init_lr
        self.warmup_start_lr = max(float(warmup_start_lr), 0.0)  # LAVIS passes -1 for "not given"
        if self.warmup_steps >= self.total_steps:
            logging.warning(
                f"the warm-up ({self.warmup_steps} steps) is not shorter than the run "
                f"({self.total_steps} steps): the learning rate never reaches run.init_lr = "
                f"{init_lr:g}; lower run.warmup_steps"
            )

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0 over the whole run."""
        if step < self.warmup_steps:
            rise = self.init_lr - self.warmup_start_lr
            return self.warmup_start_lr + rise * step / self.warmup_steps
        decay_steps = max(self.total_steps - self.warmup_steps, 1)
        progress = min((step - self.warmup_steps) / decay_steps, 1.0)
        return self.min_lr + (self.init_lr - self.min_lr) * (1 + math.cos(math.pi * progress)) / 2

    def step(self, cur_epoch: int, cur_step: int) -> None:
        """Set the rate for the next step, ``cur_step`` of epoch ``cur_epoch``."""
        lr = self.lr_at(cur_epoch * self.iters_per_epoch + cur_step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
