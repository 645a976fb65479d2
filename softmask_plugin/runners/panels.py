"""Pictures of what the soft mask hides in the same few pairs, drawn while a run trains."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lavis.common.dist_utils import is_main_process
from torch import Tensor, nn

from softmask_plugin.errors import UserError
from softmask_plugin.explain.figure import DPI, Shown, word_panels
from softmask_plugin.explain.pairs import explain
from softmask_plugin.models.aligned import AlignedBase
from softmask_plugin.processors.image import CLIP_MEAN, CLIP_STD
from softmask_plugin.runners.boards import Boards

PAIRS, WORDS = 4, 5  # pairs in a picture, and words of each


class MaskPanels:
    """Draws ``step_<n>.png``: the heat maps, masks and scores of some content words, in the first
    pairs that the run trained on, by the model in evaluation mode.

    The pairs are kept in ``pairs.pth``, so that a resumed run shows the same ones. The model and
    the random state stay as they are.

    Args:
        every: Optimizer steps between pictures, besides one at the end of each epoch; None: never.
            UserError if the model has no matching head, and so no maps to show.
    """

    def __init__(self, folder: Path, every: int | None, model: nn.Module, boards: Boards) -> None:
        if every is not None and not isinstance(model, AlignedBase):
            raise UserError(
                f"run.panel_every is {every}, but the model has no matching head, so there are no "
                "maps to show: remove the key"
            )
        self._folder, self._boards = folder, boards
        self._every = every if is_main_process() else None
        self._pairs: dict[str, Any] = {}

    def see(self, samples: Mapping[str, Any]) -> None:
        """Take the pairs from the run's first batch, unless the run has some already."""
        if self._every is None or self._pairs:
            return
        file = self._folder / "pairs.pth"
        try:
            self._pairs = torch.load(file, weights_only=True)
        except Exception:  # none yet, or half a file of a killed process
            images = samples["image"][:PAIRS].detach().float().cpu()
            self._pairs = {"image": images, "text_input": list(samples["text_input"][:PAIRS])}
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.save(self._pairs, file)

    def after(self, model: nn.Module, step: int, epoch_ends: bool) -> None:
        """Draw a picture if one is due after this step."""
        if self._every is None or not self._pairs or (step % self._every and not epoch_ends):
            return
        path = self._folder / f"step_{step}.png"
        try:
            self._draw(model, path)
        except (UserError, OSError) as error:  # a picture is no reason to end a run
            logging.warning("no picture of the masks after step %d: %s", step, error)
            return
        self._boards.picture("masks", path, step)

    def _draw(self, model: Any, path: Path) -> None:
        images, captions = self._pairs["image"], self._pairs["text_input"]
        shown = [
            Shown(_pixels(image), each, each.content_words[:WORDS])
            for image, each in zip(images, explain(model, images, captions), strict=True)
        ]
        word_panels(*shown).savefig(path, dpi=DPI)


def _pixels(image: Tensor) -> np.ndarray:
    """A processed image (3, H, W) as (H, W, 3) uint8; true colours if CLIP's mean was used."""
    unit = image.permute(1, 2, 0) * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)
    return (unit.clamp(0, 1) * 255).round().byte().numpy()
