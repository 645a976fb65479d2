"""A plan: which variants to train, from what, over which seeds, and what to measure of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from omegaconf import OmegaConf

from softmask_plugin.config.check import find_config
from softmask_plugin.config.options import ModelOptions
from softmask_plugin.config.paths import CONFIGS
from softmask_plugin.errors import UserError, suggest

PRETRAIN = "pretrain"  # the stage that a plan's `base` is
PRETRAINED = "PRETRAINED"  # in an option of another stage: the folder of that run

# Options of a variant that say of what shape its model is: every stage's model must have it.
SHAPE = {each.name for each in fields(ModelOptions)} | {"embed_dim"}


@dataclass(frozen=True)
class Stage:
    """One run of a variant and seed.

    Attributes:
        name: of its folder and, before that of a metric, in the table.
        config: a YAML file, or the name of a shipped one.
        options: overrides of it, each "section.key=value"; a value that starts with PRETRAINED/
            names a file in the folder of the variant's pretraining, such as its vocab.txt.
        metrics: which of its task's metrics to keep.
        train: whether it fine-tunes before it is tested.
        pretrained: whether ``model.pretrained`` is the variant's last checkpoint.
    """

    name: str
    config: str
    options: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    train: bool = False
    pretrained: bool = True


@dataclass(frozen=True)
class Plan:
    """What a plan's file says.

    Attributes:
        name: of its file.
        base: the pretraining that all variants share.
        seeds: each variant is trained once with each.
        baseline: the variant that others are compared with.
        variants: what each changes of ``base``, by name.
        evaluate: what follows on the pretraining, in this order.
        asked: what each variant (first) asks of each stage (second): the values of its whole
            configuration by dotted key, as far as they decide what is measured.
    """

    name: str
    base: Stage
    seeds: tuple[int, ...]
    baseline: str
    variants: dict[str, tuple[str, ...]]
    evaluate: tuple[Stage, ...] = ()
    asked: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All runs of a variant and seed, in their order."""
        return (self.base, *self.evaluate)

    @property
    def metrics(self) -> list[str]:
        """Columns of the table: the stage's name, a space, and the metric's."""
        return [f"{stage.name} {metric}" for stage in self.evaluate for metric in stage.metrics]

    def require_variants(self, argument: str, names: Sequence[str]) -> None:
        """Raise UserError where an argument of a command names a variant that is none."""
        for name in names:
            if name not in self.variants:
                hint = suggest(name, self.variants)
                raise UserError(f"{argument}: the plan has no variant '{name}': {hint}")

    def task(self, stage: Stage) -> str:
        """The name of a stage's task."""
        return self.asked[self.baseline, stage.name]["run.task"]

    def options(self, variant: str, stage: Stage) -> list[str]:
        """Overrides of a stage for a variant; to the pretraining go all of the variant's, to other
        stages those that say of what shape the model is."""
        own = self.variants[variant]
        if stage is not self.base:
            own = tuple(option for option in own if _shapes(option, stage))
        return [*stage.options, *own]


def shipped_plans() -> dict[str, Path]:
    """Plans that come with the plugin, by the name ``--plan`` knows them by."""
    files = sorted((CONFIGS / "ablation").glob("*.yaml"))
    return {f"lavis_configs/ablation/{file.name}": file for file in files}


def _shapes(option: str, stage: Stage) -> bool:
    section, _, key = option.partition("=")[0].partition(".")
    key = key.partition(".")[0]
    model = OmegaConf.load(find_config(stage.config)).model
    schema = getattr(registry.get_model_class(model.arch), "OPTIONS", None)
    known = SHAPE & {each.name for each in fields(schema)} if schema else SHAPE
    return section == "model" and key in known
