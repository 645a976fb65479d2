"""Runs a job: those of its stages that are not finished, each in a folder of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from softmask_plugin import launch
from softmask_plugin.ablate.cost import relative_cost
from softmask_plugin.ablate.job import ASKED, RESULT, Job
from softmask_plugin.ablate.losses import last_losses
from softmask_plugin.ablate.plan import PRETRAINED, Stage
from softmask_plugin.config.check import option
from softmask_plugin.errors import UserError, suggest
from softmask_plugin.files.whole import write_json
from softmask_plugin.host.environment import environment


def run(job: Job) -> Iterator[tuple[Stage, dict[str, Any]]]:
    """Run the unfinished stages of a job, and give each one's result as soon as it is written; then
    measure what a step costs, where that is the job's part.

    A stage that was killed goes on from its last checkpoint.

    Raises:
        UserError: another process works on the job, or a stage was begun with something else than
            the plan asks for.
    """
    job.home.mkdir(parents=True, exist_ok=True)
    job.take()
    try:
        for stage in job.unfinished:
            result = _run(job, stage)
            write_json(job.place(stage) / RESULT, result)
            yield stage, result
        if job.has_to_time:
            write_json(job.cost_file, {"step_time": _cost(job), "asked": job.pair})
    finally:
        job.release()


def _run(job: Job, stage: Stage) -> dict[str, Any]:
    place, base = job.place(stage), job.plan.base
    if (place / ASKED).exists():
        job.require_same(stage)
    else:
        place.mkdir(exist_ok=True)
        write_json(place / ASKED, job.asked(stage))
    options = [*job.plan.options(job.variant, stage), f"run.seed={job.seed}"]
    options.append(option("run.output_dir", place))
    if stage is not base:
        checkpoint = job.checkpoint(base)
        assert checkpoint is not None  # the base is the first of a job's stages
        options = [_located(each, checkpoint.parent) for each in options]
        if stage.pretrained:
            options.append(option("model.pretrained", checkpoint))
    if stage.train:
        options.append("run.resume_ckpt_path=auto")
    began = time.monotonic()
    runner, results = launch.run(stage.config, options, evaluate=not stage.train)
    result: dict[str, Any] = {
        "run": runner.output_dir.name,
        "seconds": round(time.monotonic() - began, 1),  # since it last went on
        "environment": environment(runner.device),
    }
    if stage.train:
        result["checkpoint"] = f"checkpoint_{runner.max_epoch - 1}.pth"
        result["losses"] = last_losses(runner.output_dir)
    if stage.metrics:
        result["metrics"] = _metrics(stage, results or {})
    return result


def _located(given: str, pretrained: Path) -> str:
    """An option, with the file that it names where the pretraining left it."""
    key, _, value = given.partition("=")
    name = value.removeprefix(f"{PRETRAINED}/")
    return given if name == value else option(key, pretrained / name)


def _cost(job: Job) -> list[float] | None:
    try:
        return relative_cost(job.plan, job.variant)
    except torch.OutOfMemoryError:
        logging.warning("the time of a step is not measured: two models do not fit the memory")
        return None


def _metrics(stage: Stage, results: dict[str, Any]) -> dict[str, float]:
    found = next(iter(results.values()), None) or {}  # of the one split there is
    for metric in stage.metrics:
        if metric not in found:
            raise UserError(f"stage '{stage.name}' gave no '{metric}': {suggest(metric, found)}")
    return {metric: float(found[metric]) for metric in stage.metrics}
