"""End a run again and again: is its result the same? ``python -m benchmarks.kills``.

A model pretrains on rendered scenes, validates after each epoch and tests at the end. A forked
process trains it with ``run.resume_ckpt_path=auto`` and gets SIGKILL at a random moment, and so
does the next, until one ends by itself. Then everything in the run's folder (weights, momentum
copies, queues, optimizer, schedule, best epoch, checkpoints, logs) is compared to the last bit with
a run that was never killed. With ``--by TERM USR1`` the process gets one of these signals instead,
and must have taken each step once.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.traces import differences, trace
from softmask_plugin import launch
from softmask_plugin.errors import StartAgain
from softmask_plugin.runners import SoftmaskRunner, checkpoint_files

PROJECT = "lavis_configs/projects/scenes/train/retrieval_tiny.yaml"
OPTIONS = {
    "model.arch": "softmask_pretrain",
    "model.queue_size": 48,
    "model.alpha": 0.4,
    "model.learn_temp": True,
    "datasets.scenes_retrieval.num.train": 72,
    "datasets.scenes_retrieval.num.val": 16,
    "datasets.scenes_retrieval.num.test": 16,
    "run.batch_size_train": 6,
    "run.batch_size_eval": 8,
    "run.accum_grad_iters": 2,
    "run.max_epoch": 3,
    "run.k_test": 4,
    "run.log_freq": 2,
    "run.save_every_steps": 2,
    "run.resume_ckpt_path": "auto",
}
PHASES = ("start", "step", "evaluation", "checkpoint", "renaming", "between")


@dataclass
class Outcome:
    """The result of a trial."""

    ends: Counter[str] = field(default_factory=Counter)  # of processes by a signal, by phase
    runs: int = 0  # that ended by themselves
    lost: list[str] = field(default_factory=list)  # differences from the run without a signal
    seconds: float = 0.0


class Board:
    """Bytes that parent and child share: the phases of the child's main thread and of the thread
    that writes checkpoints, as indices of PHASES, and the number of optimizer steps begun."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 3)

    @property
    def phase(self) -> str:
        """The current phase; what is written counts more than what happens beside it."""
        return PHASES[self.memory[1] or self.memory[0]]

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self.memory[2]

    def show(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that the board shows ``name`` while it runs."""

        def call(*args: Any, **kwargs: Any) -> Any:
            beside = threading.current_thread() is not threading.main_thread()
            before, self.memory[beside] = self.memory[beside], PHASES.index(name)
            self.memory[2] += name == "step"
            try:
                return function(*args, **kwargs)
            finally:
                self.memory[beside] = before or (0 if beside else PHASES.index("between"))

        return call


def main(argv: list[str] | None = None) -> int:
    """Run the trial; return 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="at least, default: %(default)s")
    parser.add_argument(
        "--by", nargs="+", default=["KILL"], help="signals, drawn each time; default: KILL"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="data-loader workers, default: %(default)s"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the random moments, default: %(default)s"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    outcome = trial(args.kills, args.workers, args.seed, args.by)
    counts = ", ".join(f"{name} {outcome.ends[name]}" for name in PHASES if outcome.ends[name])
    print(
        f"{outcome.ends.total()} times SIG{' or SIG'.join(args.by)} ({counts}); {outcome.runs} "
        f"runs ended, {len(outcome.lost)} differences from a run that got none; "
        f"{outcome.seconds:.0f} s"
    )
    print("\n".join(outcome.lost))
    return 1 if outcome.lost else 0


def trial(kills: int, workers: int, seed: int, by: list[str]) -> Outcome:
    """End processes by signals, and compare each run that ends by itself."""
    began, outcome, moments = time.monotonic(), Outcome(), random.Random(seed)
    with TemporaryDirectory() as name:
        root = Path(name)
        saves = "KILL" not in by  # beyond what other runs save, so that no step is taken twice
        train = partial(run, workers=workers, keep=1 if saves else 2)
        status, _, every_step = watched(root / "whole", train, None)
        if status != 0:
            raise RuntimeError(tail(root / "whole"))
        lasted = time.monotonic() - began
        (whole,) = (root / "whole").glob("*/")
        expected = trace(whole)
        targets = cycle(PHASES[1:5])  # of every other kill: random moments would miss short phases
        target = next(targets)
        while outcome.ends.total() < kills or outcome.runs == 0:
            folder, taken = root / str(outcome.runs), 0
            while True:
                done = outcome.ends.total()
                phase = target if done % 2 else None
                number = signal.Signals[f"SIG{moments.choice(by)}"]
                until = None if done >= kills else (phase, moments.uniform(0, lasted / 3), number)
                status, caught, steps = watched(folder, train, until)
                taken += steps
                if caught is None:
                    break
                outcome.ends[caught] += 1
                if caught == target:
                    target = next(targets)
            if status != 0:
                outcome.lost.append(f"run {outcome.runs} failed: {tail(folder)}")
                break
            folders = [path for path in folder.glob("*/") if any(path.glob("*.pth"))]
            if len(folders) != 1:
                outcome.lost.append(f"run {outcome.runs} is in {len(folders)} folders")
            outcome.lost += differences(trace(folders[-1]), expected, f"run {outcome.runs}: ")
            if saves and taken != every_step:
                outcome.lost.append(f"run {outcome.runs} took {taken} steps, not {every_step}")
            outcome.runs += 1
    outcome.seconds = time.monotonic() - began
    return outcome


def watched(
    folder: Path,
    train: Callable[[Path], None],
    until: tuple[str | None, float, int] | None,
) -> tuple[int, str | None, int]:
    """Train in a process of its own, and send it a signal.

    Args:
        folder: Folder for runs.
        train: The function that trains.
        until: A phase, seconds and a signal, which the process gets after this time, once it is in
            the phase (None: at once). None: let it end.

    Returns:
        The exit code, the phase in which the signal ended it, if one did, and the number of steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    board = Board()
    child = os.fork()
    if child == 0:
        obey(folder, board, train)
    if until is not None:
        phase, seconds, number = until
        end = time.monotonic() + seconds
        while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            late = time.monotonic() >= end
            if late and phase in (None, board.phase):
                phase = board.phase
                os.kill(child, number)
                break
            time.sleep(0 if late else 0.001)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code, phase if code < 0 or code == StartAgain.CODE else None, board.steps


def obey(folder: Path, board: Board, train: Callable[[Path], None]) -> None:
    """Train as the child process, and exit."""
    code = 1
    try:
        log = os.open(folder / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        shown = [
            (SoftmaskRunner, "train_step", "step"),
            (SoftmaskRunner, "eval_epoch", "evaluation"),
            (torch, "save", "checkpoint"),
            (checkpoint_files, "write_whole", "renaming"),
        ]
        for owner, name, phase in shown:
            patch.object(owner, name, board.show(phase, getattr(owner, name))).start()
        train(folder)
        code = 0
    except StartAgain:
        code = StartAgain.CODE
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        sys.stdout.flush()
        os._exit(code)


def run(folder: Path, workers: int, keep: int) -> None:
    """Train as ``softmask train`` does."""
    folders = {"run.output_dir": folder, "run.keep_checkpoints": keep}
    options = {**OPTIONS, **folders, "run.num_workers": workers}
    launch.run(PROJECT, [f"{key}={value}" for key, value in options.items()])


def tail(folder: Path) -> str:
    """The last lines of the processes' output."""
    return " | ".join((folder / "output.log").read_text().splitlines()[-3:])


if __name__ == "__main__":
    sys.exit(main())
