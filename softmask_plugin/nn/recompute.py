"""What is cheap to compute again is not kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recompute(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``function(*arguments)``, of which only the arguments are kept for the backward pass.

    There the function runs again, but stops as soon as autograd has what it needs. So one that ends
    with a linear layer repeats only what comes before: of ``fc2(gelu(x))`` the GELU, no product.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False)
