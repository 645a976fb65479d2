"""Save memory: compute cheap functions again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recompute(function: Callable[..., Tensor], *arguments: Any, draws: bool = True) -> Tensor:
    """Call ``function(*arguments)``, keeping only the arguments for the backward pass.

    The backward pass runs the function again, but only until autograd has what it needs. So a final
    linear layer is not repeated: of ``fc2(gelu(x))``, only the GELU is. ``draws``: whether the
    function draws random numbers, and has to draw the same ones again.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=draws)
