"""Pictures of what the soft mask hides, made as a run goes on, of the same few pairs throughout."""

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
from softmask_plugin.explain.pairs import Explanation, explain
from softmask_plugin.models.aligned import AlignedBase
from softmask_plugin.processors.image import CLIP_MEAN, CLIP_STD
from softmask_plugin.runners.boards import Boards

PAIRS, WORDS = 4, 5  # shown, and of each pair
DPI = 140


class MaskPanels:
    """Draws ``step_<n>.png`` after some steps: the first pairs that the run trained on, as the
    model in evaluation mode sees them: for some words, function words left out, heat maps, masks
    and scores.

    The pairs are kept in ``pairs.pth``, so that a run that goes on shows the same ones. Neither
    the model nor random draws are touched.

    Args:
        folder: for the pictures.
        every: optimizer steps between them, beside one at the end of each epoch; None: never.
        model: what is trained.
        boards: get the pictures too.

    Raises:
        UserError: the model has no matching head, whose maps could be shown.
    """

    def __init__(self, folder: Path, every: int | None, model: nn.Module, boards: Boards) -> None:
        if every is not None and not isinstance(model, AlignedBase):
            raise UserError(
                f"run.panel_every is {every}, but the model has no matching head, so no maps of "
                "words to show: remove it"
            )
        self._folder, self._boards = folder, boards
        self._every = every if is_main_process() else None
        self._pairs: dict[str, Any] | None = None

    def see(self, samples: Mapping[str, Any]) -> None:
        """Take the pairs out of the run's first batch, unless the run has some."""
        if self._every is None or self._pairs is not None:
            return
        file = self._folder / "pairs.pth"
        try:
            self._pairs = torch.load(file, weights_only=True)
        except Exception:  # none yet, or half a file of a process that was killed
            images = samples["image"][:PAIRS].detach().float().cpu()
            self._pairs = {"image": images, "text_input": list(samples["text_input"][:PAIRS])}
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.save(self._pairs, file)

    def after(self, model: nn.Module, step: int, epoch_ends: bool) -> None:
        """Draw, if it is time to."""
        if self._every is None or self._pairs is None or (step % self._every and not epoch_ends):
            return
        try:
            shown: Any = model  # checked when the run began
            found = explain(shown, self._pairs["image"], self._pairs["text_input"])
            path = self._draw(found, self._folder / f"step_{step}.png")
        except (UserError, OSError) as error:  # a picture is no reason to end a run
            logging.warning("no picture of the masks after step %d: %s", step, error)
            return
        self._boards.picture("masks", path, step)

    def _draw(self, found: list[Explanation], path: Path) -> Path:
        from softmask_plugin.explain.figure import Shown, word_panels  # matplotlib takes a second

        assert self._pairs is not None
        images = [_pixels(image) for image in self._pairs["image"]]
        pairs = [
            Shown(image, each, each.content_words[:WORDS])
            for image, each in zip(images, found, strict=True)
        ]
        word_panels(pairs).savefig(path, dpi=DPI)
        return path


def _pixels(image: Tensor) -> np.ndarray:
    """A processed image (3, H, W) as (H, W, 3) uint8; true colours where CLIP's mean was used."""
    unit = image.permute(1, 2, 0) * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)
    return (unit.clamp(0, 1) * 255).round().byte().numpy()
