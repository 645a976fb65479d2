"""Every patch to the host stack, each with its reason and the versions that need it.

Imported before anything else in this package, so that ``import lavis`` works afterwards.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

# torch drops a library's definitions when the library is garbage-collected.
_LIBRARIES: list[Any] = []


def patch() -> None:
    """Apply every patch that is needed. Repeating this is harmless."""
    _define_torchvision_schemas()
    _restore_numpy_inf()
    _quiet_fairscale()


def _define_torchvision_schemas() -> None:
    """Let torchvision from PyPI import beside a CPU build of torch (seen with 0.28 and 2.13+cpu).

    Its compiled part does not load, so registering a fake kernel fails: "operator torchvision::nms
    does not exist". With the two schemas defined, transforms, models and datasets work; ``nms``
    itself stays unavailable.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")  # noqa: TOR901
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
        import torchvision  # noqa: F401


def _restore_numpy_inf() -> None:
    """numpy 2 dropped ``np.Inf``, which ALBEF and BLIP use in every LAVIS release."""
    if not hasattr(np, "Inf"):
        vars(np)["Inf"] = np.inf


def _quiet_fairscale() -> None:
    """fairscale 0.4.4, which LAVIS pins, triggers torch.cuda.amp warnings (torch >= 2.4)."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"fairscale\.")
