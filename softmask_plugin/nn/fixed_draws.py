"""Random draws that depend only on a key, such as (seed, rank, epoch, step)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_draws(*key: int) -> None:
    """Seed the generators of torch (all devices), numpy and Python with a key of numbers >= 0."""
    seed = _seed(key)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def fixed_draws(*key: int) -> Iterator[None]:
    """Make draws inside the context depend only on a key of numbers >= 0.

    torch's generator, which models use too, is restored. Those of numpy and Python are not: nothing
    else in a run may rely on them.
    """
    state = torch.get_rng_state()
    seed = _seed(key)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _seed(key: tuple[int, ...]) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])
