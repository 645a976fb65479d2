"""A finished run in a few lines for the console: metrics beside chance, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from softmask_plugin.models.aligned import AlignedBase
from softmask_plugin.report.records import chance_of, read_metrics
from softmask_plugin.runners.meter import numbers_of


def run_summary(runner: Any, results: Mapping[str, Mapping[str, Any] | None] | None) -> str:
    """Summarize what ``launch.run`` returned: best epoch, metrics of the test splits (or of the
    first validation split) beside chance, and the commands that go on from there."""
    folder, lines = str(runner.output_dir), []
    found = {split: metrics for split, metrics in (results or {}).items() if metrics}
    best = getattr(getattr(runner, "progress", None), "best_epoch", None)
    if best is not None:
        by = runner.valid_splits[0]
        lines.append(f"Best epoch: {best} (0 to {runner.max_epoch - 1}), by agg_metrics on '{by}'")
        if not found:
            logged = read_metrics(folder)
            found |= ((by, r) for r in logged if (r["split"], r["epoch"]) == (by, best))
    for split, metrics in found.items():
        lines += ["", *_table(split, numbers_of(metrics), chance_of(runner.datasets[split]))]
    lines += ["", f"Everything about this run is in {folder}. Next:"]
    lines += (f"  {shlex.join(command)}" for command in _next(runner, folder))
    return "\n".join(lines).lstrip("\n")


def _table(split: str, numbers: Mapping[str, float], chance: Mapping[str, float]) -> list[str]:
    """The metrics whose chance is known, over it; or else all."""
    guesses = {name: chance.get(name, numbers.get(f"{name}_chance")) for name in numbers}
    guesses = {name: guess for name, guess in guesses.items() if guess is not None}
    names = [*guesses] or [*numbers]
    rows = [[split, *names], ["", *(f"{numbers[name]:.4g}" for name in names)]]
    if guesses:
        rows.append(["chance", *(f"{guess:.4g}" for guess in guesses.values())])
    widths = [max(8, *map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]


def _next(runner: Any, folder: str) -> list[list[str]]:
    commands = [["softmask", "report", folder]]
    splits = [split for split in ("test", "val") if split in runner.datasets]
    if splits and not runner.evaluate_only:
        given = [] if runner.test_splits else ["--options", f"run.test_splits=[{splits[0]}]"]
        commands.append(["softmask", "evaluate", "--cfg-path", folder, *given])
        if isinstance(runner.unwrap_dist_model(runner.model), AlignedBase):
            pair = ["--image", "IMAGE.jpg", "--caption", "WORDS"]
            commands.append(["softmask", "explain", "--checkpoint", folder, *pair])
    return commands
