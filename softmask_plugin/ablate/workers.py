"""Processes that work on jobs at the same time, each on a device or some threads of its own."""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from softmask_plugin.ablate.job import Job
from softmask_plugin.ablate.run import run
from softmask_plugin.errors import UserError, reason_of


@dataclass(frozen=True)
class Slot:
    """What one worker may use: a CUDA device, or so many threads of the CPU."""

    threads: int
    device: str | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Variables that must be there before a process loads torch."""
        threads = {"OMP_NUM_THREADS": str(self.threads)}
        return threads if self.device is None else {**threads, "CUDA_VISIBLE_DEVICES": self.device}


def slots(cuda: bool, jobs: int) -> list[Slot]:
    """One for each CUDA device, or ``jobs`` that share the CPU's cores."""
    cores = os.cpu_count() or 1
    if not cuda:
        return [Slot(max(1, cores // jobs))] * jobs
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return [Slot(max(1, cores // count), device) for device in named.split(",")[:count]]


class Done:
    """Says that a job's last stage is over."""


Message = tuple[Any, dict[str, Any]] | Done | UserError


class Worker:
    """A process that runs jobs, one at a time.

    Args:
        slot: what it may use.
        log: gets what its runs print.
    """

    def __init__(self, slot: Slot, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.job: Job | None = None
        self.log = log
        self.pipe, theirs = context.Pipe()
        # Not a daemon: its runs have loader processes of their own
        self.process = context.Process(target=_serve, args=(theirs, slot.threads, log))
        with _variables(slot.environment):
            self.process.start()
        theirs.close()  # so that a worker that dies ends the wait for its message

    def start(self, job: Job) -> None:
        """Send it a job."""
        self.job = job
        self.pipe.send(job)

    @property
    def is_gone(self) -> bool:
        """Whether it died and no job is left whose messages are still to be received."""
        return self.job is None and not self.process.is_alive()

    def end(self) -> None:
        """End the process, in the middle of a job where it has one."""
        if self.job is not None:
            self.process.terminate()
        elif self.process.is_alive():
            self.pipe.send(None)
        self.process.join()

    def receive(self) -> Message:
        """Its next message; an error where it died."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return UserError(
                f"its process died with exit code {self.process.exitcode}: was it killed for want "
                f"of memory? (its log: {self.log})"
            )


def work(jobs: Sequence[Job], slots: Sequence[Slot], folder: Path) -> Iterator[tuple[Job, Message]]:
    """Run jobs, as many at a time as there are slots.

    Args:
        jobs: in the order in which they are started.
        slots: what each worker may use.
        folder: gets a log for each worker.

    Yields:
        A job and the result of one of its stages, or that it is done, or why it failed; the others
        go on then.
    """
    waiting, workers = list(jobs), dict[int, Worker]()
    try:
        while True:
            for number, slot in enumerate(slots):
                if number in workers and workers[number].is_gone:
                    del workers[number]
                if waiting and (number not in workers or workers[number].job is None):
                    if number not in workers:
                        workers[number] = Worker(slot, folder / f"worker_{number}.log")
                    workers[number].start(waiting.pop(0))
            busy = {worker.pipe: n for n, worker in workers.items() if worker.job is not None}
            if not busy:
                return
            for pipe in wait([*busy]):
                number = busy[pipe]  # type: ignore[index]
                worker = workers[number]
                job, message = worker.job, worker.receive()
                assert job is not None
                if isinstance(message, (Done, UserError)):
                    worker.job = None
                yield job, message
    finally:
        for worker in workers.values():
            worker.end()


@contextmanager
def _variables(given: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the processes that start meanwhile."""
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, threads: int, log: Path) -> None:
    with log.open("a") as file:  # of the process as a whole, its libraries' messages included
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for job in iter(pipe.recv, None):
        try:
            for stage in run(job):
                pipe.send(stage)
            pipe.send(Done())
        except UserError as error:
            pipe.send(error)
        except Exception as error:
            traceback.print_exc()
            line = f"{type(error).__name__}: {reason_of(error)}"[:300]
            pipe.send(UserError(f"{line} (traceback: {log})"))


def _end_with_parent() -> None:
    """A run whose parent was killed must let its folder go, for the one that goes on."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
