"""Learning rates of parts of a model: ``run.lr_scale``."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn
from torch.optim import Optimizer

from softmask_plugin.errors import UserError, suggest

KEY = "lr_scale"  # of a group of the optimizer, and of the run


def scale_groups(optimizer: Optimizer, model: nn.Module, scales: Mapping[str, float]) -> None:
    """Split an optimizer's groups by the factor of their learning rate; the log lists the parts.

    Args:
        optimizer: A new one, over parameters of the model.
        model: The model.
        scales: Factor of each part, by its name or one that its parameters' names contain, such as
            ``crossattention``. If several are in a name, the innermost counts.

    Raises:
        UserError: No parameter has such a part in its name.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for part in scales:
        if all(_place(part, name) < 0 for name in names.values()):
            known = {piece for name in names.values() for piece in name.split(".")}
            raise UserError(f"run.lr_scale: the model has no part '{part}': {suggest(part, known)}")
    groups, sizes = list(optimizer.param_groups), Counter[str]()
    optimizer.param_groups.clear()
    for group in groups:
        by_scale: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            part = _innermost(scales, names[id(parameter)])
            sizes[part] += parameter.numel()
            by_scale.setdefault(float(scales.get(part, 1.0)), []).append(parameter)
        for scale, parameters in by_scale.items():
            optimizer.add_param_group({**group, "params": parameters, KEY: scale})
    for part, size in sizes.items():
        what = "the other weights" if part == "" else part
        scale = float(scales.get(part, 1.0))
        logging.info("learning rate x %g for %s (%.1f million)", scale, what, size / 1e6)


def apply_scales(optimizer: Optimizer) -> None:
    """Scale the rates that a schedule has just set."""
    for group in optimizer.param_groups:
        group["lr"] *= group.get(KEY, 1.0)


def _innermost(parts: Iterable[str], name: str) -> str:
    """The part that ends last in a parameter's name, the longest of those; "" if none is in it."""
    found = [part for part in parts if _place(part, name) >= 0]
    return max(found, key=lambda part: (_place(part, name) + len(part), len(part)), default="")


def _place(part: str, name: str) -> int:
    """Where a part, whole between dots, is last in a name; -1 if nowhere."""
    return f".{name}.".rfind(f".{part}.")
