"""A plan of an ablation: its YAML file, parsed and checked before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from omegaconf import OmegaConf

from softmask_plugin import launch
from softmask_plugin.config.check import find_config, read_config, valid_yaml
from softmask_plugin.config.options import ModelOptions, read_options
from softmask_plugin.config.paths import find_file, shipped_plans
from softmask_plugin.config.run_options import RUN
from softmask_plugin.config.values import comparable, differences, flat
from softmask_plugin.errors import UserError, require_known, suggest

PRETRAIN = "pretrain"  # name of the stage that a plan's `base` describes
TRUNK = "trunk"  # names the pretraining that variants of a seed fork from, and its folder
WEIGHTS = "model.pretrained"  # the option that starts another stage from pretraining

# Options that change the model's shape: without them no stage could load a variant's checkpoint
SHAPE = {each.name for each in fields(ModelOptions)} | {"embed_dim"}

# Options of the same sections that count in training alone, so each stage has its own
TRAINING = re.compile(r"model\.vit\.patch_dropout.*")

# Options that no plan may set: the plan's seeds and stages and the command set them
RESERVED = re.compile(r"run\.(seed|output_dir|evaluate|resume_ckpt_path)\b.*")

# Options that decide how much a run learns from: the same for all variants
BUDGET = re.compile(
    r"run\.(max_epoch|max_steps|max_iters|batch_size_train|accum_grad_iters|train_splits)\b.*"
    r"|datasets\.\w+\.(num|captions|images|shards|items)\b.*"
)

# Options that differ from run to run, or do not affect results
FREE = re.compile(r"run\.(seed|output_dir|num_workers|tensorboard|wandb|panel_every)\b.*")

# Metrics of known tasks. Other tasks' are only found missing after the run.
METRICS = {
    "retrieval": "txt_r1 txt_r5 txt_r10 txt_r_mean img_r1 img_r5 img_r10 img_r_mean r_mean".split(),
    "softmask_grounding": ["acc", "pointing"],
    "softmask_foils": "acc acc_itc right wrong text image group".split(),
    "multimodal_classification": ["acc"],
    "vqa": ["agg_metrics", "yes/no", "number", "other"],
}
# Also report their metrics by group, as in acc_testA and pointing/people
GROUPED = ["softmask_grounding", "softmask_foils"]
FRACTIONS = ["multimodal_classification"]  # reports fractions; the others report percent


@dataclass(frozen=True)
class Stage:
    """One run of a variant and seed."""

    name: str  # of its folder; in the table it comes before the names of its metrics
    config: str  # a YAML file, or the name of a shipped one
    options: tuple[str, ...] = ()  # overrides
    metrics: tuple[str, ...] = ()  # of its task, to keep
    train: bool = False  # whether to fine-tune before testing
    pretrained: bool = True  # whether it starts from an earlier stage, by model.pretrained


@dataclass(frozen=True)
class Plan:
    """A parsed plan."""

    name: str  # of the file, without its ending
    base: Stage  # the pretraining that all variants share, from the trunk if there is one
    seeds: tuple[int, ...]  # each variant is trained once with each
    baseline: str  # the variant to compare the others with
    variants: dict[str, tuple[str, ...]]  # overrides of base, by name
    evaluate: tuple[Stage, ...]  # the stages after pretraining, in order
    trunk: Stage | None = None  # trained once for each seed, before the variants
    equal_budget: bool = True  # whether all variants must train as long, on as much
    # By variant and stage: every value of the configuration that can affect the result
    asked: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All runs of a variant and seed, in order; the trunk is a job of its own."""
        return (self.base, *self.evaluate)

    @property
    def metrics(self) -> list[str]:
        """Columns of the table: the stage's name, a space, the metric's name."""
        return [f"{stage.name} {metric}" for stage in self.evaluate for metric in stage.metrics]

    def task(self, stage: Stage) -> str:
        """Name of a stage's task."""
        return self.asked[self.baseline, stage.name]["run.task"]

    def options(self, variant: str, stage: Stage) -> list[str]:
        """Overrides of a stage: to pretraining all of the variant's apply, to other stages those of
        both that change the model's shape."""
        if stage is self.trunk:
            return [*stage.options]
        own = self.variants[variant]
        if stage is not self.base:
            shape = _shape(stage.config)
            own = tuple(
                each
                for each in (*self.base.options, *own)
                if _key(each, "model") in shape and not TRAINING.fullmatch(each)
            )
        return [*stage.options, *own]

    def require_variants(self, argument: str, names: Sequence[str]) -> None:
        """Raise UserError if an argument of the command names an unknown variant."""
        for name in names:
            if name not in self.variants:
                hint = suggest(name, self.variants)
                raise UserError(f"{argument}: the plan has no variant '{name}': {hint}")


def read_plan(name: str | Path, options: Sequence[str] = (), seeds: int | None = None) -> Plan:
    """Parse a plan, and check it and the configuration of each of its runs; UserError at a mistake.

    Args:
        name: A YAML file, or the name of a shipped one.
        options: Further overrides of every stage; those of a data set go to the stages that use it.
        seeds: Number of the plan's seeds to use; None: all.
    """
    path = find_file("--plan", name, shipped_plans())
    with valid_yaml(path):
        content = OmegaConf.to_container(OmegaConf.load(path))
    try:
        plan = _with_options(_parse(path.stem, content), options)
        if seeds is not None and not 1 <= seeds <= len(plan.seeds):
            raise UserError(f"--seeds is {seeds}, but the plan has {len(plan.seeds)} seeds")
        plan = replace(plan, seeds=plan.seeds[:seeds])
        return replace(plan, asked=_check_runs(plan))
    except UserError as error:
        raise UserError(f"{error} (in {path})") from None


# ---- The file: keys of its sections and types of their values, a list as [type]

BASE = {"config": str, "options": [str]}
STAGE = {"name": str, **BASE, "metrics": [str], "train": bool, "pretrained": bool}
PLAN = {
    "base": dict,
    "trunk": [str],
    "seeds": [int],
    "baseline": str,
    "variants": dict,
    "evaluate": [dict],
    "equal_budget": bool,
}
OPTIONAL = ("options", "train", "pretrained", "trunk", "equal_budget")
KINDS = {dict: "a section", str: "a text", int: "a whole number", bool: "true or false"}


def _parse(name: str, content: Any) -> Plan:
    plan = _section("", content, PLAN)
    forks = "trunk" in plan
    base = Stage(PRETRAIN, train=True, pretrained=forks, **_section("base.", plan["base"], BASE))
    trunk = None
    if forks:
        options = (*base.options, *plan["trunk"])
        trunk = replace(base, name=TRUNK, options=options, pretrained=False)
    stages = [base]
    for i, section in enumerate(plan["evaluate"]):
        stage = Stage(**_section(f"evaluate[{i}].", section, STAGE))
        if stage.name in (each.name for each in stages):
            raise UserError(f"evaluate: two stages are called '{stage.name}': rename one")
        _require_distinct(f"evaluate[{i}].metrics", stage.metrics)
        stages.append(stage)
    _require_distinct("evaluate", stages[1:])
    _require_distinct("seeds", plan["seeds"])
    for seed in plan["seeds"]:
        RUN["seed"].check("seeds", seed)
    variants = {
        str(k): _value(f"variants.{k}", each, [str]) for k, each in plan["variants"].items()
    }
    for each in (*variants, *(stage.name for stage in stages)):
        if not re.fullmatch(r"[a-z0-9_]+", each):
            raise UserError(f"'{each}' cannot name a folder: use a-z, 0-9 and _")
    if TRUNK in variants:
        raise UserError(f"variants: rename '{TRUNK}', which names the folder of the key {TRUNK}")
    rest = (variants, tuple(stages[1:]), trunk, plan.get("equal_budget", True))
    made = Plan(name, base, plan["seeds"], plan["baseline"], *rest)
    made.require_variants("baseline", [made.baseline])
    return made


def _section(where: str, content: Any, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Check the keys and values of a section; lists become tuples."""
    place = where.rstrip(".") or "the plan"
    if not isinstance(content, dict):
        raise UserError(f"{place} must be a section with the keys {', '.join(kinds)}")
    require_known(where.rstrip(".") or "plan", content, kinds)
    for key in kinds:
        if key not in (*content, *OPTIONAL):
            raise UserError(f"{place} has no '{key}'")
    return {key: _value(f"{where}{key}", value, kinds[key]) for key, value in content.items()}


def _value(where: str, value: Any, kind: Any) -> Any:
    if isinstance(kind, list):
        if not isinstance(value, list):
            raise UserError(f"{where} is {value!r}: it must be a list")
        return tuple(_value(where, each, kind[0]) for each in value)
    if type(value) is not kind:  # isinstance would take true for a whole number
        raise UserError(f"{where} is {value!r}: it must be {KINDS[kind]}")
    if kind is str and RESERVED.fullmatch(value):
        raise UserError(f"{where}: remove '{value}', which the plan or the command sets")
    return value


def _require_distinct(where: str, values: Sequence[Any]) -> None:
    if not values:
        raise UserError(f"{where} is empty")
    if len({*values}) < len(values):
        raise UserError(f"{where} is {[*values]}: list each once")


def _with_options(plan: Plan, options: Sequence[str]) -> Plan:
    """Add options to all stages; those of a data set only to the stages that use it."""
    _value("--options", [*options], [str])
    given = [(option, _key(option, "datasets")) for option in options]
    shared = [option for option, name in given if name is None]
    stages, known = [], set[str]()
    for stage in (*plan.stages, *filter(None, [plan.trunk])):
        config = read_config(find_config(stage.config), [*stage.options, *shared])
        used = {*map(str, config.datasets)}
        own = [option for option, name in given if name is None or name in used]
        stages.append(replace(stage, options=(*stage.options, *own)))
        known |= used
    for name in (name for _, name in given if name is not None and name not in known):
        raise UserError(f"--options: no stage uses the data set {name}: {suggest(name, known)}")
    base, *rest = stages
    trunk = rest.pop() if plan.trunk else None
    return replace(plan, base=base, evaluate=tuple(rest), trunk=trunk)


@cache
def _shape(config: str) -> set[str]:
    """Options of ``SHAPE`` that the model of a YAML file has."""
    arch = OmegaConf.load(find_config(config)).model.arch
    schema = getattr(registry.get_model_class(arch), "OPTIONS", ModelOptions)
    return SHAPE & {each.name for each in fields(schema)}


def _key(option: str, section: str) -> str | None:
    """The key that an option sets in a section; None if it belongs to another section."""
    match = re.match(rf"{section}\.([^.=]+)", option)
    return match[1] if match else None


# ---- The configurations of its runs


def _check_runs(plan: Plan) -> dict[tuple[str, str], dict[str, Any]]:
    """Check the configuration of each run as the run itself does; return ``Plan.asked``."""
    asked: dict[tuple[str, str], dict[str, Any]] = {}
    checked: dict[tuple[str, ...], dict[str, Any]] = {}  # most variants share other stages
    if plan.trunk:
        asked[TRUNK, TRUNK] = _check_run(plan, TRUNK, plan.trunk)
    for name in (plan.baseline, *plan.variants):
        for stage in plan.stages:
            given = (stage.name, *plan.options(name, stage))
            if given not in checked:
                checked[given] = _check_run(plan, name, stage)
            asked[name, stage.name] = checked[given]
        own, budget = (
            {key: value for key, value in values.items() if BUDGET.fullmatch(key)}
            for values in (comparable(asked[each, PRETRAIN]) for each in (name, plan.baseline))
        )
        for key, value, wanted in differences(own, budget) if plan.equal_budget else ():
            raise UserError(
                f"variants.{name} has another budget than {plan.baseline}: {key} is {value} "
                f"instead of {wanted}: set it in base.options, or set equal_budget: false"
            )
    return asked


def _check_run(plan: Plan, variant: str, stage: Stage) -> dict[str, Any]:
    where = f"variant '{variant}', stage '{stage.name}'"
    options = plan.options(variant, stage)
    if stage.pretrained:
        options.append(f"{WEIGHTS}=PRETRAINED")  # stands for a checkpoint that is yet to come
    try:
        config = launch.load_config(stage.config, options, evaluate=not stage.train)
        schema = getattr(registry.get_model_class(config.model_cfg.arch), "OPTIONS", None)
        if schema is not None:
            read_options(schema, config.model_cfg)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if stage.train and config.run_cfg.get("runner") != "softmask_runner":
        raise UserError(f"{where}: run.runner must be softmask_runner, which can resume")
    task = config.run_cfg.task
    for metric in stage.metrics:
        known = METRICS.get(task, [metric])
        plain = re.split("[_/]", metric)[0] if task in GROUPED else metric
        if plain not in known:
            raise UserError(f"{where}: unknown metric '{metric}': {suggest(metric, known)}")
    splits = config.run_cfg.get("test_splits") or []
    if stage in plan.evaluate and len(splits) != 1:
        raise UserError(
            f"{where}: run.test_splits is {[*splits]}: name the one to measure, as in "
            "options: [run.test_splits=[test]]"
        )
    values = flat(OmegaConf.to_container(config.config, resolve=True))
    return {key: value for key, value in values.items() if not FREE.fullmatch(key)}
