"""``make bench``: speed and memory side by side with LAVIS's own classes, against targets."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import blip, gpu, overhead, processor, rerank, scaling, step
from benchmarks.harness import Cost, Row, grid, machine, save, table

# Measurements by name, with their numbers of rounds: full and small
ROWS: dict[str, tuple[Callable[[bool, str | None, int], list[Row]], int, int]] = {
    "memory": (step.run_memory, 2, 1),  # first: the system gets back little of what others used
    "step": (step.run, 3, 2),
    "rerank": (rerank.run, 3, 2),
    "blip": (blip.run, 3, 2),
    "blip_rerank": (blip.run_rerank, 3, 2),
    "processor": (processor.run, 7, 3),
    "overhead": (overhead.run, 4, 3),
    "gpu": (gpu.run, 10, 2),
}
SCALING = "scaling"


def main() -> None:
    """Measure, print the tables, and write them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", help=f"what to measure: {', '.join([*ROWS, SCALING])}; default: all"
    )
    parser.add_argument("--small", action="store_true", help="tiny models, a trial of a minute")
    parser.add_argument("--captions", help="a caption file of your own, beside its images")
    parser.add_argument("--threads", type=int, help="CPU threads, default: torch's choice")
    parser.add_argument("--rounds", type=int, help="turns of each, instead of the usual number")
    folder = Path("outputs/bench")
    parser.add_argument("--output", type=Path, default=folder, help="default: %(default)s")
    given = parser.parse_args()
    wanted = given.names or [*ROWS, SCALING]
    for name in wanted:
        if name not in ROWS and name != SCALING:
            parser.error(f"there is no measurement '{name}'")
    if given.threads:
        torch.set_num_threads(given.threads)

    settings = {"small": given.small, "captions": given.captions}
    rows: list[Row] = []
    costs: list[Cost] = []
    for name in wanted:
        if name in ROWS:
            run, full, small = ROWS[name]
            rounds = given.rounds or (small if given.small else full)
            rows += run(given.small, given.captions, rounds)
            save(rows, costs, given.output / "bench.json", settings)  # what follows may fail
    if SCALING in wanted:
        costs = scaling.run(given.small, given.rounds or 2)
        scaling.draw(costs, given.output / "scaling.png")
    if given.small:  # the targets are for the full size
        rows = [replace(row, target=None) for row in rows]

    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items() if value))
    if given.small:
        print("tiny models: these figures show only that the measurements run")
    if rows:
        print("", table(rows), sep="\n")
    if costs:
        print("", grid(costs), sep="\n")
    save(rows, costs, given.output / "bench.json", settings)
    print(f"\nWritten: {given.output / 'bench.json'}")


if __name__ == "__main__":  # the processes of `step` import this file again
    main()
