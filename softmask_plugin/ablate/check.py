"""Checks a plan's runs before the first begins: configurations, metrics, equal budgets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lavis.common.registry import registry
from omegaconf import OmegaConf

from softmask_plugin import launch
from softmask_plugin.ablate.plan import Plan, Stage
from softmask_plugin.errors import UserError, suggest
from softmask_plugin.options import read_options

# What decides how much a run learns from, and so may not differ between variants.
BUDGET = re.compile(
    r"run\.(max_epoch|max_iters|batch_size_train|accum_grad_iters|train_splits)\b.*"
    r"|datasets\.\w+\.(num|captions|images|shards|items)\b.*"
)

# Metrics of the tasks whose names are known before they run, the larger the better.
METRICS = {
    "retrieval": "txt_r1 txt_r5 txt_r10 txt_r_mean img_r1 img_r5 img_r10 img_r_mean r_mean".split(),
    "softmask_grounding": ["acc", "pointing"],
    "multimodal_classification": ["acc"],
    "vqa": ["agg_metrics", "yes/no", "number", "other"],
}


def check_runs(plan: Plan) -> None:
    """Read the configuration of each run of a plan, as the run itself will.

    Raises:
        UserError: one is refused, has not the metrics asked for, or a variant's pretraining has
            another budget than the baseline's.
    """
    budget = _budget(_check_run(plan, plan.baseline, plan.base))
    for stage in plan.evaluate:
        _check_run(plan, plan.baseline, stage)
    for variant in (name for name in plan.variants if name != plan.baseline):
        own = _budget(_check_run(plan, variant, plan.base))
        for key in sorted(own.keys() | budget.keys()):
            if own.get(key) != budget.get(key):
                raise UserError(
                    f"variants.{variant} has another budget than {plan.baseline}: {key} is "
                    f"{own.get(key)} instead of {budget.get(key)}: set it in base.options"
                )
        for stage in plan.evaluate:
            if plan.options(variant, stage) != [*stage.options]:  # else as the baseline's
                _check_run(plan, variant, stage)


def _check_run(plan: Plan, variant: str, stage: Stage) -> Any:
    """Check one run; return its configuration."""
    where = f"variant '{variant}', stage '{stage.name}'"
    try:
        config = launch.load_config(
            stage.config, plan.options(variant, stage), evaluate=not stage.train
        )
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
    return config.config


def _budget(config: Any) -> dict[str, Any]:
    """What of a configuration is its budget, by dotted key."""
    plain = OmegaConf.to_container(config, resolve=True)
    return {key: value for key, value in _leaves("", plain) if BUDGET.fullmatch(key)}


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from _leaves(f"{key}.{name}" if key else str(name), inner)
