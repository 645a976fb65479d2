"""Means of the loss terms over the steps that were taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_world_size
from torch import Tensor, nn

Totals = dict[str, tuple[float, int]]  # by name: sum and count
Describe = Callable[[Mapping[str, Any]], Mapping[str, Tensor]]  # of a model's output: scalars


class LossMeter:
    """Means of scalars, which are summed on their device; only fold, drain and drop wait for it.

    Added values belong to the current step until :meth:`keep` or :meth:`drop` ends it.
    """

    def __init__(self) -> None:
        self._step: list[tuple[str, Tensor]] = []
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._folded: Totals = {}  # over all processes, since the last drain
        self._drained: Totals = {}  # over all processes, before

    def add(self, name: str, value: Tensor) -> None:
        """Add a 0-dim tensor to the mean called ``name``."""
        self._step.append((name, value.detach().float()))

    @contextmanager
    def watch(self, model: nn.Module, *describe: Describe) -> Iterator[None]:
        """Add the scalars that ``describe`` makes of each forward pass of ``model``."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Mapping):
                for terms in describe:
                    for name, value in terms(output).items():
                        self.add(name, value)

        with model.register_forward_hook(hook):
            yield

    def finite(self) -> Tensor:
        """Whether all values of the step are finite, 0-dim bool, on the device."""
        return torch.stack([value for _, value in self._step]).isfinite().all()

    def keep(self) -> None:
        """End the step; its values count."""
        for name, value in self._step:
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._step = []

    def drop(self) -> dict[str, float]:
        """End the step; its values do not count. Return the last one of each name."""
        values = {name: value.item() for name, value in self._step}
        self._step = []
        return values

    def fold(self) -> dict[str, Any]:
        """Add up over all processes, which must all call this; return plain values to restore."""
        sums = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        mine = dict(zip(self._sums, zip(sums, self._counts.values(), strict=True), strict=True))
        self._sums, self._counts = {}, {}
        parts = [mine]
        if get_world_size() > 1:  # by name: a process may lack a term that another has
            parts = [{}] * get_world_size()
            dist.all_gather_object(parts, mine)
        for part in parts:
            _add_up(self._folded, part)
        return {"folded": dict(self._folded), "drained": dict(self._drained)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of :meth:`fold`."""
        self._folded, self._drained = dict(state["folded"]), dict(state["drained"])

    def drain(self) -> dict[str, float]:
        """Means since the last drain, over all processes; all of them must call this."""
        self.fold()
        means = _means(self._folded)
        _add_up(self._drained, self._folded)
        self._folded = {}
        return means

    def means(self) -> dict[str, float]:
        """Means of everything drained."""
        return _means(self._drained)


def loss_terms(output: Mapping[str, Any]) -> dict[str, Tensor]:
    """Loss terms of a model's output: ``loss_*``, 0-dim."""
    return {
        name: value
        for name, value in output.items()
        if name.startswith("loss_") and isinstance(value, Tensor) and value.ndim == 0
    }


def _add_up(totals: Totals, more: Mapping[str, tuple[float, int]]) -> None:
    for name, (value, count) in more.items():
        known_value, known_count = totals.get(name, (0.0, 0))
        totals[name] = known_value + value, known_count + count


def _means(totals: Totals) -> dict[str, float]:
    return {name: value / count for name, (value, count) in sorted(totals.items())}
