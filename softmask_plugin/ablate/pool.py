"""Runs jobs in parallel, each in a process with a CUDA device or some CPU threads of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest.mock import patch

import torch

from softmask_plugin.ablate.job import Job
from softmask_plugin.ablate.plan import Stage
from softmask_plugin.errors import StartAgain, UserError, reason_of

Slot = dict[str, str]  # environment variables that give a process its share of the machine;
# torch reads them when it is imported
QUIET = {"PYTHONWARNINGS": "ignore:resource_tracker"}  # which warns of what an ended process held


def slots(cuda: bool, jobs: int) -> list[Slot]:
    """One slot for each CUDA device, or ``jobs`` slots that share the CPU's cores."""
    cores = os.cpu_count() or 1
    if not cuda:
        return [{"OMP_NUM_THREADS": str(max(1, cores // jobs))}] * jobs
    count = torch.cuda.device_count()
    devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    threads = str(max(1, cores // count))
    return [
        {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": device}
        for device in devices.split(",")[:count]
    ]


def work(
    jobs: Sequence[Job], slots: Sequence[Slot]
) -> Iterator[tuple[Job, tuple[Stage, dict[str, Any]] | UserError]]:
    """Run jobs in order, as many at a time as there are slots; each logs to its own folder. One
    that forks waits for its trunk.

    Yields:
        A job with a stage and its result, or with the error that ended it; other jobs go on.
    """
    context = multiprocessing.get_context("spawn")
    waiting, free = [*jobs], [*slots]
    running: dict[Any, Any] = {}  # job, slot and process by pipe
    try:
        while waiting or running:
            for job in [each for each in waiting if each.is_ready][: len(free)]:
                waiting.remove(job)
                slot = free.pop(0)
                job.home.mkdir(parents=True, exist_ok=True)
                job.log.touch()  # fails here, if it must, and not in the process
                ours, theirs = context.Pipe(duplex=False)
                # Not a daemon, since data loaders start processes of their own
                process = context.Process(target=_work, args=(job, theirs))
                with patch.dict(os.environ, {**slot, **QUIET}), _without_interrupts():
                    process.start()
                theirs.close()  # the process has the only other end: recv() fails once it is gone
                running[ours] = job, slot, process
            if not running:
                error = UserError("its trunk failed: the same command tries it again")
                yield from ((job, error) for job in waiting)
                return
            ready: list[Any] = wait([*running])
            for pipe in ready:
                job, slot, process = running[pipe]
                try:
                    message = pipe.recv()
                except EOFError:
                    process.join()
                    message = UserError(
                        f"its process died with exit code {process.exitcode}: was it killed for "
                        f"lack of memory? (its log: {job.log})"
                    )
                if not isinstance(message, tuple):  # the job is over
                    process.join()
                    del running[pipe]
                    free.append(slot)
                if message is not None:
                    yield job, message
    finally:
        for _, _, process in running.values():
            process.kill()  # a signal that a run notes would let it end its step first
            process.join()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Start processes that leave Ctrl-C to the command, which then ends them."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _work(job: Job, pipe: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        with job.log.open("ab") as file:  # whatever the process writes, libraries included
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        for finished in job.run():
            pipe.send(finished)
        pipe.send(None)
    except UserError as error:
        pipe.send(error)
    except StartAgain:
        pipe.send(UserError("ended by a signal: the same command resumes it"))
    except Exception as error:
        traceback.print_exc()
        line = f"{type(error).__name__}: {reason_of(error)}"[:300]
        pipe.send(UserError(f"{line} (traceback: {job.log})"))


def _end_with_parent() -> None:
    """End this process if the command is killed, so that another one can resume its runs."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
