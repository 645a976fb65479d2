"""Several processes of one job: agree, and end in bounded time if one of them is gone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size, is_main_process

from softmask_plugin.errors import UserError, reason_of

T = TypeVar("T")

# Messages of gloo and nccl errors that have no class of their own
_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed? ?out|remote process exited|gloo|nccl",
    re.IGNORECASE,
)


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is true on any process; all of them must call this."""
    if get_world_size() == 1:
        return flag
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


def from_main_process(find: Callable[[], T]) -> T:
    """Call ``find`` on the main process; every process, which must all call this, gets its result
    or its UserError."""
    box: list[T | UserError | None] = [None]
    if is_main_process():
        try:
            box[0] = find()
        except UserError as error:
            box[0] = error
    if get_world_size() > 1:
        with peers_needed():
            dist.broadcast_object_list(box)
    (found,) = box
    if isinstance(found, UserError):
        raise found
    return cast(T, found)


@contextmanager
def peers_needed() -> Iterator[None]:
    """Turn a communication error into a UserError: another process ended or hangs. gloo notices one
    that died at once, and one that hangs after ``run.dist_timeout``. nccl itself ends the process
    after that time, without an error to catch; torchrun ends it before."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or _LOST.search(str(error))
        if get_world_size() == 1 or not lost:
            raise
        raise UserError(
            f"process {get_rank()} of {get_world_size()} lost another one, which ended or hangs "
            f"(its own message says why; here: {reason_of(error)[:200]}): restart the job with "
            "run.resume_ckpt_path=auto"
        ) from error
