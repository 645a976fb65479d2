"""Every patch to the host stack, each with its reason and the versions that need it.

Imported before anything else in this package, so that ``import lavis`` works afterwards.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

# Libraries live as long as the process; torch drops their definitions when they are collected.
_LIBRARIES: list[Any] = []


def patch() -> None:
    """Apply every patch. Each looks first whether it is needed, so repeating is harmless."""
    _define_torchvision_schemas()
    _restore_numpy_inf()
    _quiet_fairscale()


def _define_torchvision_schemas() -> None:
    """A PyPI torchvision beside a CPU build of torch (seen: torchvision 0.28, torch 2.13 + cpu).

    The compiled part of such a torchvision does not load, and its Python part then dies while it
    registers a fake kernel: "operator torchvision::nms does not exist". Defining the two schemas
    lets transforms, models and datasets work; detection's ``nms`` itself stays unavailable.
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
    """numpy 2 dropped ``np.Inf``; LAVIS's ALBEF and BLIP models use it (every LAVIS release)."""
    if not hasattr(np, "Inf"):
        vars(np)["Inf"] = np.inf


def _quiet_fairscale() -> None:
    """fairscale 0.4.4, which LAVIS pins, warns of its own torch.cuda.amp calls (torch >= 2.4)."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"fairscale\.")
