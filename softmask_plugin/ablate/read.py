"""Reads a plan's YAML file; every mistake in it is told in one line before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from softmask_plugin.ablate.check import check_runs
from softmask_plugin.ablate.plan import PRETRAIN, Plan, Stage, shipped_plans
from softmask_plugin.config.check import find_config, find_file, read_config, valid_yaml
from softmask_plugin.config.run_options import RUN
from softmask_plugin.errors import UserError, suggest

# What no option may say, since each run gets its own.
OWN = {
    "run.seed": "the plan's seeds",
    "run.output_dir": "--output-dir",
    "run.evaluate": "a stage's train",
    "run.resume_ckpt_path": "the folder, in which runs go on by themselves",
}


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
    path = find_file("--plan", name, shipped_plans())
    with valid_yaml(path):
        content = OmegaConf.load(path)
        plain = OmegaConf.to_container(content) if isinstance(content, DictConfig) else None
    try:
        plan = _plan(path.stem, plain)
        plan = replace(_with(plan, options), seeds=_first(plan.seeds, seeds))
        return replace(plan, asked=check_runs(plan))
    except UserError as error:
        raise UserError(f"{error} (in {path})") from None


def _plan(name: str, content: Any) -> Plan:
    needed = ("base", "seeds", "baseline", "variants", "evaluate")
    content = _keys("the plan", content, needed, needed)
    base = _keys("base", content["base"], ("config", "options"), ("config",))
    shared = _options("base.options", base.get("options", []))
    stages: dict[str, Stage] = {}
    for place, section in enumerate(_list("evaluate", content["evaluate"], dict)):
        stage = _stage(f"evaluate[{place}]", section)
        if stage.name in (PRETRAIN, *stages):
            raise UserError(f"evaluate: two stages are called '{stage.name}': rename one")
        stages[stage.name] = stage
    if not stages:
        raise UserError("evaluate is empty: nothing would be measured")
    variants = content["variants"]
    if not isinstance(variants, Mapping) or not variants:
        raise UserError("variants must be a section of names, each with its list of options")
    named = {
        _name("variants", key): _options(f"variants.{key}", value)
        for key, value in variants.items()
    }
    if content["baseline"] not in named:
        hint = suggest(content["baseline"], named)
        raise UserError(f"baseline '{content['baseline']}' is none of the variants: {hint}")
    seeds = tuple(_list("seeds", content["seeds"], int))
    if len(set(seeds)) < len(seeds) or not seeds or any(isinstance(s, bool) for s in seeds):
        raise UserError(f"seeds is {[*seeds]}: list whole numbers, each once")
    for seed in seeds:
        RUN["seed"].check("seeds", seed)
    return Plan(
        name=name,
        base=Stage(PRETRAIN, str(base["config"]), shared, train=True),
        seeds=seeds,
        baseline=content["baseline"],
        variants=named,
        evaluate=tuple(stages.values()),
    )


def _with(plan: Plan, options: Sequence[str]) -> Plan:
    """The plan with further options for its stages."""
    _options("--options", [*options])
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
    config = read_config(find_config(stage.config), stage.options)
    return [*map(str, config.datasets)]


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
    if not metrics:
        raise UserError(f"{where}.metrics is empty: name what to keep of the stage")
    if len(set(metrics)) < len(metrics):
        raise UserError(f"{where}.metrics names a metric twice: {', '.join(metrics)}")
    return Stage(
        name=_name(where, section["name"]),
        config=str(section["config"]),
        options=_options(f"{where}.options", section.get("options", [])),
        metrics=metrics,
        train=section.get("train", False),
        pretrained=section.get("pretrained", True),
    )


def _options(where: str, options: Any) -> tuple[str, ...]:
    found = tuple(_list(where, options, str))
    for option in found:
        key = option.partition("=")[0]
        if key in OWN:
            raise UserError(f"{where}: remove '{option}': {key} is for {OWN[key]} to say")
    return found


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
