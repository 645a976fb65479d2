"""Random draws that are a function of a key alone: who draws, when and what for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_draws(*key: int) -> None:
    """Seed the generators of torch (all devices), numpy and Python by a key."""
    seed = _seed(key)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def fixed_draws(*key: int) -> Iterator[None]:
    """What is drawn within depends on the key alone, each number >= 0.

    Torch's generator, which a model draws from too, is left as it was; those of numpy and Python,
    which nothing else of a run may rely on, are not.
    """
    state = torch.get_rng_state()
    seed = _seed(key)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would re-seed the GPU as well
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _seed(key: tuple[int, ...]) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])
