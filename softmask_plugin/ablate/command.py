"""``softmask ablate``: run what a plan asks for and is not finished yet, then write the table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from softmask_plugin.ablate import plot
from softmask_plugin.ablate.job import Job
from softmask_plugin.ablate.plan import TRUNK, Plan, read_plan
from softmask_plugin.ablate.pool import slots, work
from softmask_plugin.ablate.table import Row, markdown, rows
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

    Finished runs are not repeated, and killed ones resume: the same command continues an ablation,
    and once everything is there only writes the table. Plans with the same ``base`` may share a
    folder, and with it their pretraining. ``softmask ablate --help`` describes the arguments.

    Returns:
        Path of the table in Markdown.

    Raises:
        UserError: The plan or an argument has a mistake, or runs failed; the others are finished
            and in the table.
    """
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}: it must be at least 1")
    read = read_plan(plan, options, seeds)
    baseline = baseline or read.baseline
    read.require_variants("--only", only)
    read.require_variants("--baseline", [baseline])
    folder = Path(output_dir or f"outputs/ablation/{read.name}").expanduser().absolute()
    chosen = [name for name in read.variants if name in only or not only]
    # Seed by seed, so that an ablation that is stopped early has compared all variants
    names = [TRUNK, *chosen] if read.trunk else chosen
    wanted = [Job(read, name, seed, folder) for seed in read.seeds for name in names]
    if again:  # the trunk stays, lest other variants fork from another one
        _discard([job for job in wanted if job.variant != TRUNK])
    try:
        failed = _run([job for job in wanted if not job.is_done], jobs)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command resumes it") from None
    table = rows(read, folder, baseline)
    page = None
    if any(row.metrics for row in table):
        page = _write(table, read, folder, baseline)
        print(f"{page.read_text(encoding='utf-8')}\nWritten: {page}, .json and .png")
    for job, error in failed:
        raise UserError(f"{len(failed)} of {len(wanted)} runs failed, first {job}: {error}")
    if page is None:
        refused = [row.refused for row in table if row.refused is not None]
        raise UserError(refused[0] if refused else f"nothing is measured in {folder}")
    return page


def _discard(jobs: Sequence[Job]) -> None:
    """Discard the results of jobs, unless another plan has results in one of their folders."""
    own = {stage.name for stage in jobs[0].stages}
    found = (each for job in jobs for each in job.home.glob("*") if each.is_dir())
    for other in (each for each in found if each.name not in own):
        raise UserError(
            f"--again: {other} belongs to another plan with the same pretraining: delete its "
            "folder yourself, or name another --output-dir"
        )
    for job in jobs:
        job.discard()


def _run(jobs: Sequence[Job], at_once: int) -> list[tuple[Job, UserError]]:
    """Run jobs and report progress; returns those that failed."""
    if not jobs:
        return []
    failed, began = [], time.monotonic()
    total, done = sum(len(job.unfinished) for job in jobs), 0
    plan = jobs[0].plan
    cuda = plan.asked[plan.baseline, plan.base.name]["run.device"] == "cuda"
    for job, outcome in work(jobs, slots(cuda, at_once)):
        if isinstance(outcome, UserError):
            failed.append((job, outcome))
            done += len(job.unfinished)
            text = f"failed: {outcome}"
        else:
            stage, result = outcome
            done += 1
            metrics = [f"{name} {value:.4g}" for name, value in result.get("metrics", {}).items()]
            text = ", ".join([stage.name, *metrics, f"{result['seconds']:.0f} s"])
        meter = tqdm.format_meter(done, total, time.monotonic() - began, ncols=0, unit="run")
        print(f"{meter} {job}: {text}", flush=True)
    return failed


def _write(table: Sequence[Row], plan: Plan, folder: Path, baseline: str) -> Path:
    page, text = folder / f"{plan.name}.md", markdown(table, plan.metrics, baseline)
    picture = plot.draw(table, plan.metrics, baseline)
    content = {
        "plan": plan.name,
        "baseline": baseline,
        "seeds": plan.seeds,
        "trunk": plan.trunk and asdict(plan.trunk),
        "stages": [asdict(stage) for stage in plan.stages],
        "rows": [asdict(row) for row in table],
    }
    write_json(page.with_suffix(".json"), content)
    write_whole(page.with_suffix(".png"), lambda file: picture.savefig(file, format="png", dpi=150))
    write_whole(page, lambda file: file.write_text(text, encoding="utf-8"))
    return page
