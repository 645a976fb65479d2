"""LAVIS's registry with two additions: a kind for losses, and registering that can be repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from lavis.common.registry import registry
from lavis.models import model_zoo

from softmask_plugin.errors import UserError, suggest
from softmask_plugin.losses import FocalITCLoss

Class = TypeVar("Class", bound=type)

LOSSES: dict[str, type] = registry.mapping.setdefault("loss_name_mapping", {})


def register(kind: str, name: str) -> Callable[[Class], Class]:
    """Class decorator: LAVIS's ``registry.register_<kind>(name)``, safe to run again.

    LAVIS raises KeyError for a name it knows, which a second import or a notebook's reload would
    hit. Here a class replaces its own earlier self; a name taken by another class is an error.

    Args:
        kind: ``builder``, ``task``, ``processor``, ``model``, ``lr_scheduler`` or ``runner``.
        name: the name that YAML files use.
    """

    def wrap(cls: Class) -> Class:
        _forget_earlier_self(registry.mapping[f"{kind}_name_mapping"], kind, name, cls)
        getattr(registry, f"register_{kind}")(name)(cls)
        if kind == "model":  # the zoo is a snapshot, taken when LAVIS was imported
            model_zoo.model_zoo[name] = list(cls.PRETRAINED_MODEL_CONFIG_DICT)  # type: ignore[attr-defined]
        return cls

    return wrap


def register_loss(name: str) -> Callable[[Class], Class]:
    """Class decorator: make a loss known to YAML files under ``name`` (``model.itc.loss``)."""

    def wrap(cls: Class) -> Class:
        _forget_earlier_self(LOSSES, "loss", name, cls)
        LOSSES[name] = cls
        return cls

    return wrap


def get_loss_class(name: str) -> Any:
    """Return the loss class registered as ``name``; UserError with the nearest names otherwise."""
    if name not in LOSSES:
        raise UserError(f"no loss is registered as '{name}': {suggest(name, LOSSES)}")
    return LOSSES[name]


def list_losses() -> list[str]:
    """Names of all registered losses, sorted."""
    return sorted(LOSSES)


def _forget_earlier_self(mapping: dict[str, type], kind: str, name: str, cls: type) -> None:
    known = mapping.get(name)
    if known is None:
        return
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise UserError(
            f"{kind} '{name}' is already registered by {known.__module__}.{known.__qualname__}: "
            f"choose another name for {cls.__module__}.{cls.__qualname__}"
        )
    del mapping[name]


register_loss("focal_itc")(FocalITCLoss)
