"""LAVIS's registry with two additions: losses, and registering a class again."""

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

    LAVIS raises KeyError for a known name, as on a second import or a notebook's reload. Here a
    class replaces its earlier version. The name becomes its attribute ``NAME``.

    Args:
        kind: ``builder``, ``task``, ``processor``, ``model``, ``lr_scheduler``, ``runner`` or
            ``loss``.
        name: The name that YAML files use.

    Raises:
        UserError: Another class has the name, or the name is no text.
    """

    if not isinstance(name, str):
        raise UserError(f'a {kind} needs a name: write @register_{kind}("NAME")')

    def wrap(cls: Class) -> Class:
        names = registry.mapping[f"{kind}_name_mapping"]
        known = names.get(name, cls)
        if _path(known) != _path(cls):
            raise UserError(
                f"{kind} '{name}' is already registered by {_path(known)}: choose another name "
                f"for {_path(cls)}"
            )
        names.pop(name, None)
        if kind == "loss":
            names[name] = cls
        else:
            getattr(registry, f"register_{kind}")(name)(cls)
        cls.NAME = name  # type: ignore[attr-defined]
        if kind == "model":  # the zoo is a snapshot, taken when LAVIS was imported
            model_zoo.model_zoo[name] = list(cls.PRETRAINED_MODEL_CONFIG_DICT)  # type: ignore[attr-defined]
        return cls

    return wrap


def register_loss(name: str) -> Callable[[Class], Class]:
    """Class decorator: let YAML files use a loss as ``model.itc.loss: <name>``."""
    return register("loss", name)


def get_loss_class(name: str) -> Any:
    """The loss class registered as ``name``; UserError with the nearest names if there is none."""
    if name not in LOSSES:
        raise UserError(f"no loss is registered as '{name}': {suggest(name, LOSSES)}")
    return LOSSES[name]


def list_losses() -> list[str]:
    """Names of all registered losses, sorted."""
    return sorted(LOSSES)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


register_loss("focal_itc")(FocalITCLoss)
