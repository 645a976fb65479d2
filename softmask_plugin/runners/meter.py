"""What a run logs of its steps: means of loss terms, and statistics of masks and queues."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_world_size
from torch import Tensor, nn

Totals = dict[str, tuple[float, int]]  # by name: sum and count


class LossMeter:
    """Means of scalars, which are summed on their device; only fold, drain and drop wait for it.
    In float64, in which a sum hardly depends on where :meth:`fold` divides it.

    Added values belong to the current step until :meth:`keep` or :meth:`drop` ends it.
    """

    def __init__(self) -> None:
        self._step: list[tuple[str, Tensor]] = []
        self._sums: dict[str, Tensor] = {}
        self._counts = Counter[str]()
        self._folded: Totals = {}  # over all processes, since the last drain
        self._drained: Totals = {}  # over all processes, before

    def add(self, name: str, value: Tensor) -> None:
        """Add a 0-dim tensor to the mean called ``name``."""
        self._step.append((name, value.detach().float().double()))

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Add the losses and the statistics of the mask of each forward pass of ``model``."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Mapping):
                for name, value in (loss_terms(output) | mask_terms(output)).items():
                    self.add(name, value)

        with model.register_forward_hook(hook):
            yield

    def finite(self) -> Tensor:
        """Whether all values of the step are finite, 0-dim bool, on the device."""
        return torch.stack([value for _, value in self._step]).isfinite().all()

    def keep(self) -> None:
        """End the step; its values count."""
        for name, value in self._step:
            self._sums[name] = self._sums.get(name, 0) + value
            self._counts[name] += 1
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
        self._sums, self._counts = {}, Counter()
        parts = [mine] * get_world_size()
        if len(parts) > 1:  # by name: a process may lack a term that another has
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
    """The ``loss_*`` of a model's output, 0-dim."""
    return {
        name: value
        for name, value in output.items()
        if name.startswith("loss_") and isinstance(value, Tensor) and value.ndim == 0
    }


@torch.no_grad()
def mask_terms(output: Mapping[str, Any]) -> dict[str, Tensor]:
    """Describe the masks of a batch, on its device and without waiting for it.

    Args:
        output: A model's output. If it has masks, ``keep`` is the factor of each image token,
            (B, 1 + patches), [CLS] first, and ``word`` the picked word of each caption, (B,), -1
            if there was none to pick.

    Returns:
        Scalars: ``mask_hidden``, the mean share of the image that is masked; ``mask_spread``, the
        entropy of the mask over the largest possible, 0 for a single patch and 1 for all patches
        alike, averaged over captions with a mask; ``mask_no_word``, the share of captions without
        a word to pick. Empty without masks.
    """
    if output.get("keep") is None:
        return {}
    hidden = 1 - output["keep"][:, 1:].float()
    total = hidden.sum(dim=1, keepdim=True)
    entropy = torch.special.entr(hidden / total.clamp_min(1e-12)).sum(dim=1)
    masked = (total > 0).sum().clamp_min(1)
    return {
        "mask_hidden": hidden.mean(),
        "mask_spread": entropy.sum() / masked / math.log(max(2, hidden.shape[1])),
        "mask_no_word": (output["word"] < 0).float().mean(),
    }


def queue_statistics(model: nn.Module, entered: int) -> dict[str, float]:
    """Describe a model's feature queues, if it has any. Waits for the device.

    Args:
        model: Its ``image_queue`` and ``text_queue`` hold unit vectors, (width, size).
        entered: Number of features that the run has put into each.

    Returns:
        ``queue_filled``, the share of a queue that the run has written; ``queue_image_mean`` and
        ``queue_text_mean``, the length of the mean feature: near 0 if features spread in all
        directions, 1 if they have collapsed to one.
    """
    found = {}
    for name in ("image", "text"):
        queue = getattr(model, f"{name}_queue", None)
        if isinstance(queue, Tensor) and queue.shape[1] > 0:
            found["queue_filled"] = min(1.0, entered / queue.shape[1])
            found[f"queue_{name}_mean"] = queue.float().mean(dim=1).norm().item()
    return found


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The measurements in a line of ``metrics.jsonl``."""
    return {
        name: value
        for name, value in record.items()
        if name not in ("epoch", "step", "time") and isinstance(value, (int, float))
    }


def _add_up(totals: Totals, more: Mapping[str, tuple[float, int]]) -> None:
    for name, (value, count) in more.items():
        known_value, known_count = totals.get(name, (0.0, 0))
        totals[name] = known_value + value, known_count + count


def _means(totals: Totals) -> dict[str, float]:
    return {name: value / count for name, (value, count) in sorted(totals.items())}
