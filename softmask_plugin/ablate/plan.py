"""A plan: which variants to train, from what, over which seeds, and what to measure of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf

from softmask_plugin import config_check, launch
from softmask_plugin.errors import UserError, suggest
from softmask_plugin.options import ModelOptions, read_options
from softmask_plugin.paths import CONFIGS

PRETRAIN = "pretrain"  # the stage that a plan's `base` is
PRETRAINED = "PRETRAINED"  # in an option of another stage: the folder of that run

# Metrics of the tasks whose names are known before they run, the larger the better.
METRICS = {
    "retrieval": "txt_r1 txt_r5 txt_r10 txt_r_mean img_r1 img_r5 img_r10 img_r_mean r_mean".split(),
    "softmask_grounding": ["acc", "pointing"],
    "multimodal_classification": ["acc"],
    "vqa": ["agg_metrics", "yes/no", "number", "other"],
}

# What decides how much a run learns from, and so may not differ between variants.
BUDGET = re.compile(
    r"run\.(max_epoch|max_iters|batch_size_train|accum_grad_iters|train_splits|seed)"
    r"|datasets\.\w+\.(num\b.*|captions\b.*|images|shards|items)"
)
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
    """What ``read_plan`` found.

    Attributes:
        name: of its file.
        base: the pretraining that all variants share.
        seeds: each variant is trained once with each.
        baseline: the variant that others are compared with.
        variants: what each changes of ``base``, by name.
        evaluate: what follows on the pretraining, in this order.
    """

    name: str
    base: Stage
    seeds: tuple[int, ...]
    baseline: str
    variants: dict[str, tuple[str, ...]]
    evaluate: tuple[Stage, ...] = field(default=())

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All runs of a variant and seed, in their order."""
        return (self.base, *self.evaluate)

    @property
    def metrics(self) -> list[str]:
        """Columns of the table: the stage's name, a space, and the metric's."""
        return [f"{stage.name} {metric}" for stage in self.evaluate for metric in stage.metrics]

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


def read_plan(name: str | Path, options: Sequence[str] = (), seeds: int | None = None) -> Plan:
    """Read and check a plan, and the configuration of every run that it asks for.

    Args:
        name: a YAML file, or the name of a shipped one.
        options: overrides of the configuration of every stage, after those of the plan; those of
            a data set go to the stages that read it.
        seeds: how many of the plan's seeds to use; None: all.

    Raises:
        UserError: at the first thing found wrong.
    """
    path = config_check.find_file("--plan", name, shipped_plans())
    with config_check.valid_yaml(path):
        content = OmegaConf.load(path)
        plain = OmegaConf.to_container(content) if isinstance(content, DictConfig) else None
    try:
        plan = _plan(path.stem, plain)
        plan = replace(_with(plan, options), seeds=_first(plan.seeds, seeds))
        for variant in plan.variants:
            _check_runs(plan, variant)
    except UserError as error:
        raise UserError(f"{error} (in {path})") from None
    return plan


def _plan(name: str, content: Any) -> Plan:
    needed = ("base", "seeds", "baseline", "variants", "evaluate")
    content = _keys("the plan", content, needed, needed)
    base = _keys("base", content["base"], ("config", "options"), ("config",))
    stages: dict[str, Stage] = {}
    for place, section in enumerate(_list("evaluate", content["evaluate"], dict)):
        stage = _stage(f"evaluate[{place}]", section)
        if stage.name in (PRETRAIN, *stages):
            raise UserError(f"evaluate: two stages are called '{stage.name}': rename one")
        stages[stage.name] = stage
    variants = content["variants"]
    if not isinstance(variants, Mapping) or not variants:
        raise UserError("variants must be a section of names, each with its list of options")
    named = {_name("variants", key): _variant(key, value) for key, value in variants.items()}
    if content["baseline"] not in named:
        hint = suggest(content["baseline"], named)
        raise UserError(f"baseline '{content['baseline']}' is none of the variants: {hint}")
    seeds = tuple(_list("seeds", content["seeds"], int))
    if len(set(seeds)) < len(seeds) or not seeds or any(isinstance(s, bool) for s in seeds):
        raise UserError(f"seeds is {[*seeds]}: list whole numbers, each once")
    return Plan(
        name=name,
        base=Stage(PRETRAIN, str(base["config"]), _options("base", base), train=True),
        seeds=seeds,
        baseline=content["baseline"],
        variants=named,
        evaluate=tuple(stages.values()),
    )


def _with(plan: Plan, options: Sequence[str]) -> Plan:
    """The plan with further options for its stages."""
    read = {stage.name: _data_sets(stage) for stage in plan.stages}
    for option in options:
        name = _data_set(option)
        if name is not None and not any(name in names for names in read.values()):
            known = {each for names in read.values() for each in names}
            raise UserError(
                f"--options: no stage reads the data set {name}: {suggest(name, known)}"
            )

    def extended(stage: Stage) -> Stage:
        own = [o for o in options if _data_set(o) in (None, *read[stage.name])]
        return replace(stage, options=(*stage.options, *own))

    return replace(plan, base=extended(plan.base), evaluate=tuple(map(extended, plan.evaluate)))


def _data_sets(stage: Stage) -> list[str]:
    return [*map(str, OmegaConf.load(config_check.find_config(stage.config)).datasets)]


def _data_set(option: str) -> str | None:
    section, *name = option.partition("=")[0].split(".")[:2]
    return name[0] if section == "datasets" and name else None


def _stage(where: str, section: Any) -> Stage:
    known = [each.name for each in fields(Stage)]
    section = _keys(where, section, known, ("name", "config", "metrics"))
    for key in ("train", "pretrained"):
        if not isinstance(section.get(key, True), bool):
            raise UserError(f"{where}.{key} is {section[key]!r}: it must be true or false")
    metrics = tuple(_list(f"{where}.metrics", section["metrics"], str))
    if len(set(metrics)) < len(metrics):
        raise UserError(f"{where}.metrics names a metric twice: {', '.join(metrics)}")
    return Stage(
        name=_name(where, section["name"]),
        config=str(section["config"]),
        options=_options(where, section),
        metrics=metrics,
        train=section.get("train", False),
        pretrained=section.get("pretrained", True),
    )


def _variant(name: Any, options: Any) -> tuple[str, ...]:
    found = tuple(_list(f"variants.{name}", options, str))
    for option in found:
        if BUDGET.fullmatch(option.partition("=")[0]):
            raise UserError(
                f"variants.{name}: '{option}' would give it another budget or seed than the "
                "others: set it in base.options"
            )
    return found


def _options(where: str, section: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(_list(f"{where}.options", section.get("options", []), str))


def _keys(
    where: str, section: Any, known: Sequence[str], needed: Sequence[str]
) -> Mapping[str, Any]:
    if not isinstance(section, Mapping):
        raise UserError(f"{where} must be a section with the keys {', '.join(needed)}")
    for key in map(str, section):
        if key not in known:
            raise UserError(f"unknown key '{key}' of {where}: {suggest(key, known)}")
    for key in needed:
        if section.get(key) is None:
            raise UserError(f"{where} has no '{key}'")
    return section


def _list(where: str, value: Any, kind: type) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(each, kind) for each in value):
        noun = {str: "texts", int: "whole numbers", dict: "sections"}[kind]
        raise UserError(f"{where} is {value!r}: it must be a list of {noun}")
    return value


def _name(where: str, name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_]+", name):
        raise UserError(f"{where}: '{name}' is no name: use a-z, 0-9 and _, it names a folder")
    return name


def _first(seeds: tuple[int, ...], count: int | None) -> tuple[int, ...]:
    if count is not None and not 1 <= count <= len(seeds):
        raise UserError(f"--seeds is {count}, but the plan has {len(seeds)} seeds: {[*seeds]}")
    return seeds[:count]


def _shapes(option: str, stage: Stage) -> bool:
    section, _, key = option.partition("=")[0].partition(".")
    key = key.partition(".")[0]
    model = OmegaConf.load(config_check.find_config(stage.config)).model
    known = {each.name for each in fields(registry.get_model_class(model.arch).OPTIONS)}
    return section == "model" and key in SHAPE & known


def _check_runs(plan: Plan, variant: str) -> None:
    """Read the configuration of each stage, as the run itself will."""
    for stage in plan.stages:
        options = plan.options(variant, stage)
        if stage is not plan.base and variant != plan.baseline and options == [*stage.options]:
            continue  # as checked for the baseline
        where = f"variant '{variant}', stage '{stage.name}'"
        try:
            config = launch.load_config(stage.config, options, evaluate=not stage.train)
            schema = getattr(registry.get_model_class(config.model_cfg.arch), "OPTIONS", None)
            if schema is not None:
                read_options(schema, config.model_cfg)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if stage.train and config.run_cfg.get("runner") != "softmask_runner":
            raise UserError(f"{where}: run.runner must be softmask_runner, which resumes by itself")
        known = METRICS.get(config.run_cfg.task)
        for metric in stage.metrics:
            if known is not None and metric not in known:
                raise UserError(f"{where}: unknown metric '{metric}': {suggest(metric, known)}")
        if stage is not plan.base and not config.run_cfg.get("test_splits"):
            raise UserError(f"{where}: run.test_splits is empty: there is nothing to measure")
