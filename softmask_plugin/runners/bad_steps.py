"""Skip steps with numbers that are not finite; count and name them, and save the last one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lavis.common.dist_utils import get_rank, is_main_process
from torch import Tensor, nn

from softmask_plugin.errors import OF_ANY_PROCESS, UserError, reason_of

Batches = Sequence[dict[str, Any]]
SHOWN = 8  # samples named in a message
IDS = ("instance_id", "image_id")  # a sample's keys, the most telling first


@dataclass
class BadSteps:
    """Counts steps that were skipped because a loss or gradient was NaN or infinite."""

    limit: int  # number of skipped steps in a row that ends the run
    total: int = 0  # skipped steps so far
    in_a_row: int = 0  # skipped since the last good step; the runner resets it

    def skipped(
        self,
        step: int,
        terms: Mapping[str, float],
        batches: Batches,
        model: nn.Module,
        folder: Path,
        config: dict[str, Any],
    ) -> None:
        """Count and report a skipped step, which left no trace in ``model`` but its gradients;
        UserError if it is one too many in a row.

        Args:
            step: Its number in the run.
            terms, batches: This process's losses and accumulated batches.
            model: The model without wrappers.
            folder: Gets a file that reproduces the step, if this one ends the run.
            config: The run's configuration.
        """
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        what, who = _blame(terms, model), _samples(batches)
        # The process whose losses are bad has the samples; a bad gradient may be anyone's.
        mine = is_main_process() or not all(map(math.isfinite, terms.values()))
        if self.in_a_row < self.limit:
            if mine:
                OF_ANY_PROCESS.warning("skipped step %d: %s; samples %s", step, what, who)
            return
        file = folder / f"bad_step_{step}_rank{get_rank()}.pth"
        if mine:
            weights = {name: value.cpu() for name, value in model.state_dict().items()}
            content = {"model": weights, "batches": list(batches), "step": step, "config": config}
            try:
                torch.save({**content, "rank": get_rank()}, file)
            except (OSError, RuntimeError) as error:  # a full disk: torch raises the latter
                OF_ANY_PROCESS.warning("cannot save %s: %s", file, reason_of(error)[:200])
                mine = False
        raise UserError(
            f"stopped: {self.in_a_row} steps in a row had numbers that are not finite, last step "
            f"{step}: {what}; samples {who}; lower run.init_lr, lengthen run.warmup_steps or set "
            "run.clip_grad_norm=1"
            + (f"; 'softmask replay {file}' repeats the step" if mine else "")
        )


def _blame(terms: Mapping[str, float], model: nn.Module) -> str:
    """Name the losses that are not finite, or else the gradients."""
    losses = [f"{name} is {value}" for name, value in terms.items() if not math.isfinite(value)]
    if losses:
        return ", ".join(losses)
    grads = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    bad = [name for name, grad in grads if not bool(grad.isfinite().all())]
    if not bad:
        return "the gradient's norm overflows"
    return f"the gradient of {len(bad)} parameters is not finite, first {bad[0]}"


def _samples(batches: Batches) -> str:
    """Names of the first samples."""
    names = [str(name) for batch in batches for name in _names(batch)]
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" * (len(names) > SHOWN))


def _names(batch: Mapping[str, Any]) -> list[Any]:
    for key in IDS:
        if (found := batch.get(key)) is not None:
            return found.tolist() if isinstance(found, Tensor) else list(found)
    return ["without names"]
