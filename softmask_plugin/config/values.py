"""Values of a YAML that belong together, and sections that must be such."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from lavis.common.registry import registry
from omegaconf import DictConfig

from softmask_plugin.errors import UserError


def check_image_sizes(config: DictConfig) -> None:
    """Raise UserError where an image processor makes images of another size than the model takes.

    The processors looked at are those of the splits that the run reads.

    Args:
        config: the whole file, the defaults of its model and its data sets included. Models of
            other packages are not looked at.
    """
    options = getattr(registry.get_model_class(config.model.arch), "OPTIONS", None)
    if options is None:
        return
    wanted, run = config.model.get("image_size", options.image_size), config.run
    unread = {
        *(["train"] if run.get("evaluate", False) else []),
        *([] if run.get("valid_splits") or run.get("test_splits") else ["eval"]),
    }
    for name, dataset in config.datasets.items():
        for split, processor in (dataset.get("vis_processor") or {}).items():
            accepted = inspect.signature(registry.get_processor_class(processor.name)).parameters
            if split in unread or "image_size" not in accepted:
                continue
            given = processor.get("image_size", accepted["image_size"].default)
            # What is no number is refused by the processor and by the model themselves
            if isinstance(given, int) and isinstance(wanted, int) and given != wanted:
                raise UserError(
                    f"datasets.{name!s}.vis_processor.{split!s}.image_size is {given}, but "
                    f"model.image_size is {wanted}: set both alike"
                )


def flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """Values of nested sections by dotted key.

    >>> flat({"run": {"seed": 1, "amp": False}})
    {'run.seed': 1, 'run.amp': False}
    """
    if not isinstance(section, Mapping):
        return {prefix: section}
    found: dict[str, Any] = {}
    for name, value in section.items():
        found |= flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], absent: Any = None
) -> Iterator[tuple[str, Any, Any]]:
    """Each key whose values differ, in order, with both; a missing one counts as ``absent``.

    >>> [*differences({"a": 1, "b": 2}, {"b": 3, "c": None})]
    [('a', 1, None), ('b', 2, 3)]
    """
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key, absent), now.get(key, absent)
        if old != new:
            yield key, old, new


def require_section(where: str, section: Any) -> None:
    """Raise UserError where a value stands in the place of keys."""
    if not isinstance(section, DictConfig):
        raise UserError(f"{where} is {section!r}: it must be a section of keys")
