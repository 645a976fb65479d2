"""Forked processes in a gloo group, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from softmask_plugin.errors import UserError

RunOnRank = Callable[[int], Any]


@dataclass
class Ended:
    """How a process ended."""

    result: Any  # of its function
    error: str  # a UserError's message, or another error's traceback; "" if there was none
    status: int  # exit status, negative for a signal
    seconds: float  # since the start of all processes


def on_ranks(number: int, function: RunOnRank, patience: float = 1800.0) -> list[Ended]:
    """Run ``function(rank)`` in forked processes of one group.

    Call it before torch has used several threads, which do not survive a fork.

    Args:
        number: Number of processes.
        function: Function of the rank, whose result torch can save.
        patience: Seconds that a process waits for another one, see ``run.dist_timeout``.
    """
    fork = multiprocessing.get_context("fork")
    with TemporaryDirectory() as name:
        folder, start = Path(name), time.monotonic()
        ended: list[Any] = [None] * number
        running: dict[Any, tuple[int, Any]] = {}
        for rank in range(number):
            process = fork.Process(target=_obey, args=(rank, number, function, folder, patience))
            process.start()
            running[process.sentinel] = rank, process
        while running:
            for sentinel in wait([*running]):
                rank, process = running.pop(sentinel)
                process.join()
                file = folder / f"{rank}.pt"
                result, error = torch.load(file, weights_only=True) if file.exists() else (None, "")
                seconds = time.monotonic() - start
                ended[rank] = Ended(result, error, process.exitcode, seconds)
        return ended


def _obey(rank: int, number: int, function: RunOnRank, folder: Path, patience: float) -> None:
    torch.set_num_threads(1)
    box: list[Any] = [None, ""]
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(number), LOCAL_RANK=str(rank))
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=number,
            timeout=timedelta(seconds=patience),
        )
        box[0] = function(rank)
    except UserError as error:
        box[1] = str(error)
    except BaseException:
        box[1] = traceback.format_exc()
    torch.save(box, folder / f"{rank}.pt")
    sys.exit(1 if box[1] else 0)
