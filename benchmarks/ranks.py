"""Several processes on this machine that talk by gloo, as torchrun would start them."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
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
    with TemporaryDirectory() as name:
        folder = Path(name)
        start, children = time.monotonic(), {}
        for rank in range(number):
            child = os.fork()
            if child == 0:
                _obey(rank, number, function, folder, patience)
            children[child] = rank
        ended: list[Any] = [None] * number
        while children:
            child, status = os.wait()
            rank, file = children.pop(child), folder / f"{child}.pt"
            result, error = torch.load(file, weights_only=True) if file.exists() else (None, "")
            seconds = time.monotonic() - start
            ended[rank] = Ended(result, error, os.waitstatus_to_exitcode(status), seconds)
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
    torch.save(box, folder / f"{os.getpid()}.pt")
    sys.stdout.flush()
    os._exit(1 if box[1] else 0)
