"""Feature queues of the momentum encoders (MoCo, arXiv 1911.05722), as ring buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def random_queue(width: int, size: int) -> Tensor:
    """Make a queue of random unit vectors, (width, size)."""
    return F.normalize(torch.randn(width, size), dim=0)


@torch.no_grad()
def enqueue_(queues: Sequence[Tensor], features: Sequence[Tensor], pointer: int) -> int:
    """Overwrite the oldest columns with new features, in place; return the new pointer.

    Args:
        queues: Ring buffers, each (width, Q).
        features: New rows for each queue, (n, width). n need not divide Q; if n > Q, only the last
            Q rows are kept.
        pointer: Column of the oldest entry, in [0, Q).
    """
    size = queues[0].shape[1]
    if size == 0:
        return 0
    for queue, rows in zip(queues, features, strict=True):
        columns = rows[-size:].T.to(queue.dtype)
        room = min(size - pointer, columns.shape[1])
        queue[:, pointer : pointer + room] = columns[:, :room]
        queue[:, : columns.shape[1] - room] = columns[:, room:]
    return (pointer + min(len(features[0]), size)) % size
