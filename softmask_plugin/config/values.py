"""Values of a YAML that must fit together, and comparison of configurations."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any

from lavis.common.registry import registry
from omegaconf import DictConfig

from softmask_plugin.config.run_options import RUN
from softmask_plugin.errors import UserError


def check_image_sizes(config: DictConfig) -> None:
    """Raise UserError if an image processor that the run uses has another size than the model.

    Args:
        config: The whole file with the defaults of its model and data sets. Models of other
            packages are not checked.
    """
    options = getattr(registry.get_model_class(config.model.arch), "OPTIONS", None)
    if options is None:
        return
    wanted, run = config.model.get("image_size", options.image_size), config.run
    unused = {
        *(["train"] if run.get("evaluate", False) else []),
        *([] if run.get("valid_splits") or run.get("test_splits") else ["eval"]),
    }
    for name, dataset in config.datasets.items():
        for split, processor in (dataset.get("vis_processor") or {}).items():
            accepted = inspect.signature(registry.get_processor_class(processor.name)).parameters
            if split in unused or "image_size" not in accepted:
                continue
            given = processor.get("image_size", accepted["image_size"].default)
            # The processor and the model themselves refuse values that are not numbers
            if isinstance(given, int) and isinstance(wanted, int) and given != wanted:
                raise UserError(
                    f"datasets.{name!s}.vis_processor.{split!s}.image_size is {given}, but "
                    f"model.image_size is {wanted}: set both to the same value"
                )


def require_section(where: str, section: Any) -> None:
    """Raise UserError unless the value is a section."""
    if not isinstance(section, DictConfig):
        raise UserError(f"{where} is {section!r}: it must be a section of keys")


def check_weights(given: DictConfig, merged: DictConfig) -> None:
    """Raise UserError if named weights would not be loaded.

    Args:
        given: The model section of the user's YAML and options.
        merged: The same with the defaults of its type. Only models of this plugin are checked.
    """
    if not _is_ours(merged):
        return
    load_finetuned = merged.get("load_finetuned", False)
    load_pretrained = merged.get("load_pretrained", True)
    if given.get("finetuned") and not load_finetuned:
        raise UserError(
            "model.finetuned would not be loaded, since model.load_finetuned is false: add "
            "model.load_finetuned=true"
        )
    if given.get("pretrained") and (load_finetuned or not load_pretrained):
        why = f"load_{'finetuned' if load_finetuned else 'pretrained'}"
        raise UserError(
            f"model.pretrained would not be loaded, since model.{why} is {merged[why]}: add "
            f"model.{why}={str(not merged[why]).lower()}"
        )


def require_weights(model: DictConfig) -> None:
    """Raise UserError if the model section of an evaluation, with all defaults, names no weights.

    Only models of this plugin are checked.
    """
    wanted = model.get("load_pretrained", True) and not model.get("load_finetuned", False)
    if _is_ours(model) and wanted and not model.get("pretrained"):
        raise UserError(
            "there are no weights to evaluate: set model.pretrained to a checkpoint or a run's "
            "folder (for random weights on purpose: model.load_pretrained=false)"
        )


def _is_ours(model: DictConfig) -> bool:
    return hasattr(registry.get_model_class(model.get("arch")), "OPTIONS")


def check_datasets(model: Any, datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError if a split to evaluate comes from several data sets, by name and split, or
    one has more labels than the model classes, or numbers them otherwise than its checkpoint; warn
    if image processors scale pixels differently."""
    for split in sorted({*chain(*datasets.values())} - {"train"}):
        having = [f"datasets.{name}" for name, splits in datasets.items() if split in splits]
        if len(having) > 1:
            raise UserError(
                f"{', '.join(having)} have a '{split}' split each, but LAVIS evaluates one: set "
                f"their files of '{split}' to null, but for one of them"
            )
    built = chain.from_iterable(splits.values() for splits in datasets.values())
    processors: list[Any] = [getattr(dataset, "vis_processor", None) for dataset in built]
    scales = {(str(p.mean), str(p.std)) for p in processors if hasattr(p, "std")}
    if len(scales) > 1:
        known = " and ".join(f"mean {mean}, std {std}" for mean, std in sorted(scales))
        logging.warning(
            "images are scaled by %s: set the same in vis_processor.train and .eval", known
        )
    for name, splits in datasets.items():
        for dataset in splits.values():
            _check_labels(model, name, [*map(str, getattr(dataset, "class_labels", ()))])


def _check_labels(model: Any, name: str, labels: list[str]) -> None:
    """Raise UserError if the model has too few classes, or learnt them in another order."""
    classes = getattr(getattr(model, "options", None), "num_classes", None)
    if classes is not None and len(labels) > classes:
        raise UserError(
            f"datasets.{name} has the {len(labels)} labels {', '.join(labels)}, "
            f"but model.num_classes is {classes}: set model.num_classes={len(labels)}"
        )
    trained = getattr(model, "trained_with", {}).get(f"datasets.{name}.labels")
    learnt = [*map(str, trained)] if isinstance(trained, list) else labels
    if learnt != labels and sorted(learnt) == sorted(labels):
        raise UserError(
            f"datasets.{name}.labels are {', '.join(labels)}, but the checkpoint was "
            f"trained on them in another order: set [{', '.join(learnt)}]"
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


def comparable(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration by dotted key, with all defaults of its model and run sections, as versions
    differ in those that they write; without ``preprocess``, which runs do not use."""
    filled = {f"run.{key}": known.default for key, known in RUN.items()}
    filled["run.train_splits"] = []  # needed to train, but otherwise LAVIS takes this
    schema = getattr(registry.get_model_class(values.get("model.arch")), "OPTIONS", None)
    if schema is not None:
        filled |= flat({"model": asdict(schema())})
    filled |= values
    return {key: value for key, value in filled.items() if not key.startswith("preprocess.")}


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], absent: Any = None
) -> Iterator[tuple[str, Any, Any]]:
    """Each key whose values differ, sorted, with both values; ``absent`` stands for a missing one.

    >>> for difference in differences({"a": 1, "b": 2}, {"b": 3, "c": None}):
    ...     print(*difference)
    a 1 None
    b 2 3
    """
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key, absent), now.get(key, absent)
        if old != new:
            yield key, old, new
