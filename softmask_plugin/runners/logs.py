"""What a run tells: means of the loss terms, metrics.jsonl, the progress bar."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_world_size, is_main_process
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from softmask_plugin.errors import UserError


class LossMeter:
    """Means of scalars, summed on their device: only :meth:`drain` waits for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._drained: dict[str, tuple[float, int]] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Count ``value``, a 0-dim tensor, in the mean called ``name``."""
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Count each loss term (``loss_*``, 0-dim) of the output of every forward of ``model``."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Mapping):
                for name, value in output.items():
                    if name.startswith("loss_") and isinstance(value, Tensor) and value.ndim == 0:
                        self.add(name, value)

        handle = model.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def drain(self) -> dict[str, float]:
        """Means since the last drain, over all processes (each of which must call this)."""
        sums = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        mine = dict(zip(self._sums, zip(sums, self._counts.values(), strict=True), strict=True))
        self._sums, self._counts = {}, {}
        parts = [mine]
        if get_world_size() > 1:  # by name: one process may lack a term that another one has
            parts = [{}] * get_world_size()
            dist.all_gather_object(parts, mine)
        drained: dict[str, tuple[float, int]] = {}
        for part in parts:
            _add_up(drained, part)
        _add_up(self._drained, drained)
        return _means(drained)

    def means(self) -> dict[str, float]:
        """Means of all that was drained."""
        return _means(self._drained)


class RunLog:
    """metrics.jsonl, and the progress of a run: a bar on a terminal, plain lines elsewhere.

    Args:
        folder: the run's output folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"

    def write(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl (on the main process)."""
        if is_main_process():
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    @contextmanager
    def progress(self, done: int, total: int) -> Iterator[None]:
        """Show a bar over the run's optimizer steps, from ``done`` to ``total``."""
        self._bar = tqdm(
            total=total,
            initial=done,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=None if is_main_process() else True,  # None: quiet where there is no terminal
        )
        self._done, self._total, self._start = done, total, time.monotonic()
        with logging_redirect_tqdm(), self._bar:
            yield

    def advance(self) -> None:
        """Move the bar by one step."""
        self._bar.update()

    def training(self, record: dict[str, Any]) -> None:
        """Write a training line (epoch, step, lr, loss terms, pairs_per_s) and show it."""
        seconds = time.monotonic() - self._start
        self.write({"split": "train", **record, "time": round(seconds, 2)})
        speed = f"{record['pairs_per_s']:.0f} pairs/s"
        self._bar.set_postfix_str(f"epoch {record['epoch']}, loss {record['loss']:.3f}, {speed}")
        if self._bar.disable:
            left = (self._total - record["step"]) * seconds / (record["step"] - self._done)
            terms = ", ".join(f"{k} {v:.3f}" for k, v in record.items() if k.startswith("loss"))
            logging.info(
                f"epoch {record['epoch']}, step {record['step']}/{self._total}: {terms}, "
                f"lr {record['lr']:.2e}, {speed}, {tqdm.format_interval(left)} left"
            )


def require_finite(values: Mapping[str, Any], where: str, advice: str) -> None:
    """Raise UserError, naming the place and the remedy, if one of the numbers is inf or nan."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: '{name}' is {value}: {advice}")


def _add_up(totals: dict[str, tuple[float, int]], more: Mapping[str, tuple[float, int]]) -> None:
    for name, (value, count) in more.items():
        known_value, known_count = totals.get(name, (0.0, 0))
        totals[name] = known_value + value, known_count + count


def _means(totals: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    return {name: value / count for name, (value, count) in sorted(totals.items())}
