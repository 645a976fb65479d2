"""Several processes of one job: agree, and end in bounded time if one of them is gone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size

from softmask_plugin.errors import UserError, reason_of

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


@contextmanager
def peers_needed() -> Iterator[None]:
    """Turn a communication error into one line about the other processes.

    A process that died is noticed at once, one that hangs after ``run.dist_timeout``.

    Raises:
        UserError: Another process ended or hangs.
    """
    try:
        yield
    except RuntimeError as error:
        if get_world_size() == 1 or not _is_of_communication(error):
            raise
        reason = reason_of(error)[:200]
        raise UserError(
            f"process {get_rank()} of {get_world_size()} lost another one, which ended or hangs "
            f"(its own message says why; here: {reason}): restart the job with "
            "run.resume_ckpt_path=auto"
        ) from error


def _is_of_communication(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or bool(_LOST.search(str(error)))
