"""Several processes on this machine that talk by gloo, as torchrun would start them."""

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
    """How a process ended.

    Attributes:
        result: what its function returned.
        error: "" or what it raised, a UserError as its message alone.
        status: exit status, negative for a signal.
        seconds: since the start of all.
    """

    result: Any
    error: str
    status: int
    seconds: float


def on_ranks(number: int, function: RunOnRank, patience: float = 1800.0) -> list[Ended]:
    """Run ``function(rank)`` in so many forked processes of one group.

    Call it before torch has run anything on several threads, which do not survive a fork.

    Args:
        number: of processes.
        function: returns what torch can save.
        patience: seconds that one waits for another, see ``run.dist_timeout``.
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
