"""A job of several processes ends in bounded time, and says why, when one of them is gone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size

from softmask_plugin.errors import UserError, reason_of

# What gloo and nccl say, in errors that have no class of their own.
_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed? ?out|remote process exited|gloo|nccl",
    re.IGNORECASE,
)


@contextmanager
def peers_needed() -> Iterator[None]:
    """Within: an error of communication becomes one line about the other processes.

    How long a process waits for one that hangs is ``run.dist_timeout``; one that died is noticed
    at once.

    Raises:
        UserError: another process ended or hangs.
    """
    try:
        yield
    except RuntimeError as error:
        if get_world_size() == 1 or not _is_of_communication(error):
            raise
        reason = reason_of(error)[:200]
        raise UserError(
            f"process {get_rank()} of {get_world_size()} lost another one, which ended or hangs "
            f"(its own message tells why; here: {reason}): restart the job with "
            "run.resume_ckpt_path=auto"
        ) from error


def _is_of_communication(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or bool(_LOST.search(str(error)))
