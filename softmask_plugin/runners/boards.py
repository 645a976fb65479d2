"""Show a run's numbers and pictures on TensorBoard and Weights & Biases."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from softmask_plugin.config.run_options import setting
from softmask_plugin.errors import UserError, reason_of
from softmask_plugin.runners.meter import numbers_of

PROJECT = "softmask"  # on Weights & Biases, unless run.wandb names one


class Boards:
    """Writes to TensorBoard if it is installed, and to Weights & Biases if ``run.wandb`` asks.

    They open with the first write. Use this on the main process only. UserError if ``run.wandb`` is
    set, but wandb is not installed.

    Args:
        folder: The run's folder; TensorBoard's files go into ``tensorboard``.
        config: The run's configuration as plain values.

    Attributes:
        began: Optimizer steps taken before this process started. A resumed run repeats steps after
            its checkpoint; TensorBoard then drops the earlier process's numbers for them.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._folder, self._config, self.began = folder, config, 0
        run = config.get("run", {})
        self._tensorboard = setting(run, "tensorboard") and find_spec("tensorboard") is not None
        self._wandb = setting(run, "wandb")
        if self._wandb and find_spec("wandb") is None:
            raise UserError("run.wandb is set, but wandb is not installed: pip install wandb")
        self._writer: Any = None  # TensorBoard's, while it is open
        self._run: Any = None  # that of Weights & Biases, while it is open

    def write(self, record: Mapping[str, Any]) -> None:
        """Show the numbers of a line of metrics.jsonl under the name of its split."""
        self._open()
        step = record.get("step") or 0
        found = numbers_of(record).items()
        numbers = {f"{record['split']}/{name}": value for name, value in found}
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()  # a killed run should not lose what it showed
        if self._run is not None:
            self._run.log({**numbers, "step": step})

    def picture(self, name: str, path: Path, step: int) -> None:
        """Show a PNG file."""
        self._open()
        if self._writer is not None:
            pixels = np.asarray(Image.open(path).convert("RGB"))
            self._writer.add_image(name, pixels, step, dataformats="HWC")
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Image(str(path)), "step": step})

    def close(self) -> None:
        """Flush and close; the next write opens the boards again."""
        if self._writer is not None:
            self._writer.close()
        if self._run is not None:
            self._run.finish()
        self._writer = self._run = None

    def _open(self) -> None:
        if self._tensorboard and self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except Exception as error:  # it is optional: a broken one must not stop a run
                logging.warning("no TensorBoard: it cannot be imported (%s)", error)
                self._tensorboard = False
            else:
                later = self.began + 1 if self.began else None
                self.began = 0  # if it opens again, keep what this process wrote
                self._writer = SummaryWriter(self._folder / "tensorboard", purge_step=later)
        if self._wandb and self._run is None:
            import wandb

            try:
                self._run = wandb.init(
                    project=self._wandb if isinstance(self._wandb, str) else PROJECT,
                    id=self._folder.name,
                    name=self._folder.name,
                    dir=str(self._folder),
                    resume="allow",
                    config=dict(self._config),
                )
            except Exception as error:  # it has error classes of its own
                raise UserError(
                    f"run.wandb: {reason_of(error)}: run 'wandb login', or set WANDB_MODE=offline"
                ) from error
            # A split's numbers may belong to an earlier step, which wandb's own count forbids
            self._run.define_metric("*", step_metric="step")
