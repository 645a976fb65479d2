"""Values of a YAML's ``run:`` and ``datasets:`` sections: each of its type and in its range."""

from __future__ import annotations

import inspect
from math import inf, isfinite
from typing import Any

from lavis.common.registry import registry
from omegaconf import DictConfig, ListConfig, OmegaConf

from softmask_plugin.errors import UserError

# Keys of the run section that count something, with the least and the largest number.
COUNTS = {
    "batch_size_train": (1, inf),
    "batch_size_eval": (1, inf),
    "max_epoch": (0, inf),
    "max_iters": (1, inf),
    "iters_per_inner_epoch": (1, inf),
    "accum_grad_iters": (1, inf),
    "log_freq": (1, inf),
    "num_workers": (0, inf),
    "warmup_steps": (0, inf),
    "panel_every": (1, inf),
    "seed": (0, 2**32 - 1),
}
AMOUNTS = ("init_lr", "min_lr", "weight_decay", "clip_grad_norm")  # numbers >= 0
SPLITS = ("train_splits", "valid_splits", "test_splits")


def check_run_values(run: DictConfig) -> None:
    """Raise UserError at the first value that no run can use."""
    for key, value in run.items():
        where = f"run.{key!s}"
        if key in COUNTS:
            _check_count(where, value, *COUNTS[str(key)])
        elif key in AMOUNTS:
            _check_amount(where, value)
        elif key == "tensorboard" and not isinstance(value, bool):
            raise UserError(f"{where} is {value!r}: it must be true or false")
        elif key == "wandb" and not isinstance(value, (bool, str)):
            raise UserError(f"{where} is {value!r}: it must be true, false or a project's name")
        elif key in SPLITS and not _lists_names(value):
            raise UserError(f"{where} is {value!r}: it must be a list of names, such as [val]")
    if not isinstance(run.output_dir, str):
        raise UserError(f"run.output_dir is {run.output_dir!r}: it must be the path of a folder")


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


def require_section(where: str, section: Any) -> None:
    """Raise UserError where a value stands in the place of keys."""
    if not isinstance(section, DictConfig):
        raise UserError(f"{where} is {section!r}: it must be a section of keys")


def _check_count(where: str, value: Any, low: float, high: float) -> None:
    number = _number(value)
    if value is None or (number is not None and number.is_integer() and low <= number <= high):
        return
    allowed = f"of at least {low}" if high == inf else f"in [{low}, {high}]"
    raise UserError(f"{where} is {value!r}: it must be a whole number {allowed}")


def _check_amount(where: str, value: Any) -> None:
    number = _number(value)
    if value is not None and (number is None or number < 0):
        raise UserError(f"{where} is {value!r}: it must be a number >= 0")


def _number(value: Any) -> float | None:
    """A finite number, or the text of one as YAML has it for 1e-4; otherwise None."""
    if isinstance(value, bool) or OmegaConf.is_config(value):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if isfinite(number) else None


def _lists_names(value: Any) -> bool:
    return isinstance(value, ListConfig) and all(isinstance(name, str) for name in value)
