"""Checks a plan's runs before the first begins: configurations, metrics, equal budgets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lavis.common.registry import registry
from omegaconf import OmegaConf

from softmask_plugin import launch
from softmask_plugin.ablate.plan import PRETRAIN, Plan, Stage
from softmask_plugin.config.options import read_options
from softmask_plugin.config.values import differences, flat
from softmask_plugin.errors import UserError, suggest

# What decides how much a run learns from, and so may not differ between variants.
BUDGET = re.compile(
    r"run\.(max_epoch|max_iters|batch_size_train|accum_grad_iters|train_splits)\b.*"
    r"|datasets\.\w+\.(num|captions|images|shards|items)\b.*"
)

# What each run is given of its own, and what changes nothing that is measured.
FREE = re.compile(r"run\.(seed|output_dir|num_workers|tensorboard|wandb|panel_every)\b.*")

# Metrics of the tasks whose names are known before they run, the larger the better.
METRICS = {
    "retrieval": "txt_r1 txt_r5 txt_r10 txt_r_mean img_r1 img_r5 img_r10 img_r_mean r_mean".split(),
    "softmask_grounding": ["acc", "pointing"],
    "multimodal_classification": ["acc"],
    "vqa": ["agg_metrics", "yes/no", "number", "other"],
}
SHARES = ["multimodal_classification"]  # tasks that tell shares; the table has percent
GROUPED = ["softmask_grounding"]  # tasks that tell them by group as well: acc_testA


def check_runs(plan: Plan) -> dict[tuple[str, str], dict[str, Any]]:
    """Read the configuration of each run of a plan, as the run itself will.

    Returns:
        What the plan asks of its runs, see ``Plan.asked``.

    Raises:
        UserError: one is refused, has not the metrics asked for, or a variant's pretraining has
            another budget than the baseline's.
    """
    asked: dict[tuple[str, str], dict[str, Any]] = {}
    names = [plan.baseline, *(name for name in plan.variants if name != plan.baseline)]
    for name in names:
        for stage in plan.stages:
            known = asked.get((plan.baseline, stage.name))
            if known is None or plan.options(name, stage) != plan.options(plan.baseline, stage):
                known = _check_run(plan, name, stage)
            asked[name, stage.name] = known
        _require_equal_budget(plan, name, asked)
    return asked


def _require_equal_budget(plan: Plan, variant: str, asked: Mapping[Any, dict[str, Any]]) -> None:
    own, budget = (
        {key: value for key, value in asked[name, PRETRAIN].items() if BUDGET.fullmatch(key)}
        for name in (variant, plan.baseline)
    )
    for key, value, wanted in differences(own, budget):
        raise UserError(
            f"variants.{variant} has another budget than {plan.baseline}: {key} is {value} "
            f"instead of {wanted}: set it in base.options"
        )


def _check_run(plan: Plan, variant: str, stage: Stage) -> dict[str, Any]:
    """Check one run; return what decides what it measures, by dotted key."""
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
    task = config.run_cfg.task
    for metric in stage.metrics:
        known = METRICS.get(task, [metric])
        grouped = task in GROUPED and metric.startswith(tuple(f"{name}_" for name in known))
        if metric not in known and not grouped:
            raise UserError(f"{where}: unknown metric '{metric}': {suggest(metric, known)}")
    splits = config.run_cfg.get("test_splits") or []
    if stage is not plan.base and len(splits) != 1:
        raise UserError(
            f"{where}: run.test_splits is {[*splits]}: name the one to measure, as in "
            "options: [run.test_splits=[test]]"
        )
    plain = OmegaConf.to_container(config.config, resolve=True)
    return {key: value for key, value in flat(plain).items() if not FREE.fullmatch(key)}
