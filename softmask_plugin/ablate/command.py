"""``softmask ablate``: train what a plan asks for and is not there yet, then write the table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from softmask_plugin.ablate import plot
from softmask_plugin.ablate.job import Job
from softmask_plugin.ablate.plan import Plan
from softmask_plugin.ablate.read import read_plan
from softmask_plugin.ablate.table import Row, as_plain, markdown, rows
from softmask_plugin.ablate.workers import Done, slots, work
from softmask_plugin.config.check import find_config, read_config
from softmask_plugin.errors import UserError
from softmask_plugin.files.whole import write_json, write_whole


def main(
    plan: str | Path,
    output_dir: str | Path | None = None,
    only: Sequence[str] = (),
    seeds: int | None = None,
    jobs: int = 1,
    again: bool = False,
    baseline: str | None = None,
    options: Sequence[str] = (),
) -> Path:
    """Train and evaluate the variants of a plan, and write ``<plan>.md``, ``.json`` and ``.png``.

    What has a result already is not run again, and what was killed goes on where it was, so that
    the same command goes on with an ablation, and afterwards only writes its table. Plans with the
    same ``base`` may share a folder, and with it their pretraining.

    Args:
        plan: a YAML file, or the name of a shipped one.
        output_dir: gets all runs and the table; None: outputs/ablation/<plan>.
        only: variants to run; none: all. The table has all that are measured.
        seeds: how many of the plan's seeds to use; None: all.
        jobs: runs at the same time on a CPU; with CUDA there is one per device.
        again: first throw away the results of the variants to run.
        baseline: the variant that the table compares with; None: the plan's.
        options: overrides of every stage's configuration, each "section.key=value"; those of a
            data set go to the stages that read it.

    Returns:
        The table in Markdown.

    Raises:
        UserError: a mistake in the plan or the arguments, or runs that failed; the others are
            finished and in the table.
    """
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}: it must be at least 1")
    read = read_plan(plan, options, seeds)
    compared = baseline or read.baseline
    read.require_variants("--only", only)
    read.require_variants("--baseline", [compared])
    folder = Path(output_dir or Path("outputs/ablation", read.name)).expanduser().absolute()
    chosen = [name for name in read.variants if name in only or not only]
    # Seed by seed, so that an ablation that is broken off has compared all of its rows.
    wanted = [Job(read, name, seed, folder) for seed in read.seeds for name in chosen]
    if again:
        _discard(wanted)
    try:
        failed = _run([job for job in wanted if not job.is_done], jobs, folder)
    except KeyboardInterrupt:
        raise UserError("interrupted: the same command goes on where it was") from None
    table = rows(read, folder, compared)
    measured = any(row.measured for row in table)
    if measured:
        page = _write(table, read, folder, compared)
        print(page.read_text(encoding="utf-8") + f"\nWritten: {page}, .json and .png")
    if failed:
        job, error = failed[0]
        raise UserError(f"{len(failed)} of {len(wanted)} runs failed, first {job}: {error}")
    if not measured:
        refused = [row.refused for row in table if row.refused is not None]
        raise UserError(refused[0] if refused else f"nothing is measured in {folder}")
    return page


def _discard(jobs: Sequence[Job]) -> None:
    """Throw away the results of jobs, unless they are another plan's as well."""
    for job in jobs:
        own = {stage.name for stage in job.plan.stages}
        others = sorted({each.name for each in job.home.glob("*/")} - own)
        if others:
            raise UserError(
                f"--again: {job.home} has results of another plan too ({', '.join(others)}), which "
                "its pretraining belongs to: delete it yourself, or name another --output-dir"
            )
    for job in jobs:
        job.discard()


def _run(jobs: Sequence[Job], at_once: int, folder: Path) -> list[tuple[Job, UserError]]:
    """Run jobs, telling how far they are; returns those that failed."""
    if not jobs:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    failed, began = [], time.monotonic()
    total = sum(len(job.unfinished) for job in jobs)
    done, missed = 0, 0
    cuda = _device(jobs[0].plan).type == "cuda"
    for job, message in work(jobs, slots(cuda, at_once), folder):
        if isinstance(message, Done):
            continue
        if isinstance(message, UserError):
            missed += len(job.unfinished)
            failed.append((job, message))
            text = f"failed: {message}"
        else:
            stage, result = message
            done += 1
            metrics = [f"{name} {value:.4g}" for name, value in result.get("metrics", {}).items()]
            text = ", ".join([stage.name, *metrics, f"{result['seconds']:.0f} s"])
        left = (total - missed - done) * (time.monotonic() - began) / max(done, 1)
        place = f"[{done + missed}/{total}, {tqdm.format_interval(left)} left]"
        print(f"{place} {job}: {text}", flush=True)
    return failed


def _device(plan: Plan) -> torch.device:
    options = plan.options(plan.baseline, plan.base)
    config = read_config(find_config(plan.base.config), options)
    return torch.device(config.run.device)


def _write(table: Sequence[Row], plan: Plan, folder: Path, baseline: str) -> Path:
    content: dict[str, Any] = {
        "plan": plan.name,
        "baseline": baseline,
        "seeds": plan.seeds,
        "stages": [asdict(stage) for stage in plan.stages],
        "rows": as_plain(table),
    }
    page, picture = folder / f"{plan.name}.md", plot.draw(table, plan.metrics, baseline)
    text = markdown(table, plan.metrics, baseline)
    write_json(page.with_suffix(".json"), content)
    write_whole(page.with_suffix(".png"), lambda file: picture.savefig(file, format="png", dpi=150))
    write_whole(page, lambda file: file.write_text(text, encoding="utf-8"))
    return page
