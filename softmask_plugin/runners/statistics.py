"""Statistics of soft masks and feature queues, logged beside the losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def mask_terms(output: Mapping[str, Any]) -> dict[str, Tensor]:
    """Describe the masks of a batch, on its device and without waiting for it.

    Args:
        output: A model's output. If it has masks, ``keep`` is the factor of each image token,
            (B, 1 + patches), [CLS] first, and ``word`` the picked word of each caption, (B,), -1
            if there was none to pick.

    Returns:
        Scalars: ``mask_hidden``, the mean share of the image that is masked; ``mask_spread``, the
        entropy of the mask over the largest possible, 0 for a single patch and 1 for all patches
        alike, averaged over captions with a mask; ``mask_no_word``, the share of captions without
        a word to pick. Empty without masks.
    """
    if output.get("keep") is None:
        return {}
    hidden = 1 - output["keep"][:, 1:].float()
    total = hidden.sum(dim=1, keepdim=True)
    entropy = torch.special.entr(hidden / total.clamp_min(1e-12)).sum(dim=1)
    masked = (total > 0).sum().clamp_min(1)
    return {
        "mask_hidden": hidden.mean(),
        "mask_spread": entropy.sum() / masked / math.log(max(2, hidden.shape[1])),
        "mask_no_word": (output["word"] < 0).float().mean(),
    }


def queue_statistics(model: nn.Module, entered: int) -> dict[str, float]:
    """Describe a model's feature queues, if it has any. Waits for the device.

    Args:
        model: Its ``image_queue`` and ``text_queue`` hold unit vectors, (width, size).
        entered: Number of features that the run has put into each.

    Returns:
        ``queue_filled``, the share of a queue that the run has written; ``queue_image_mean`` and
        ``queue_text_mean``, the length of the mean feature: near 0 if features spread in all
        directions, 1 if they have collapsed to one.
    """
    found = {}
    for name in ("image", "text"):
        queue = getattr(model, f"{name}_queue", None)
        if isinstance(queue, Tensor) and queue.shape[1] > 0:
            found["queue_filled"] = min(1.0, entered / queue.shape[1])
            found[f"queue_{name}_mean"] = queue.float().mean(dim=1).norm().item()
    return found
