"""Show a run's numbers and pictures on TensorBoard and Weights & Biases."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from softmask_plugin.config.run_options import setting
from softmask_plugin.errors import UserError

NO_NUMBERS = ("split", "epoch", "step", "time")  # keys of a record that are no measurements
PROJECT = "softmask"  # on Weights & Biases, unless run.wandb names one


class Boards:
    """Writes to TensorBoard if it is installed, and to Weights & Biases if ``run.wandb`` asks.

    A board opens with the first write. Use it on the main process only.

    Args:
        folder: The run's folder; TensorBoard's files go into ``tensorboard``.
        config: The run's configuration as plain values.

    Attributes:
        began: Optimizer steps taken before this process started. A resumed run repeats steps after
            its checkpoint; TensorBoard then drops the earlier process's numbers for them.

    Raises:
        UserError: ``run.wandb`` is set, but wandb is not installed.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._folder, self._config = folder, config
        run = config.get("run", {})
        self.began = 0
        self._wandb = setting(run, "wandb")
        if self._wandb and find_spec("wandb") is None:
            raise UserError("run.wandb is set, but wandb is not installed: pip install wandb")
        self._makers: list[Callable[[], Any]] = []
        if setting(run, "tensorboard") and find_spec("tensorboard") is not None:
            self._makers.append(self._tensorboard)
        if self._wandb:
            self._makers.append(self._weights_and_biases)
        self._boards: list[Any] | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Show the numbers of a line of metrics.jsonl under the name of its split."""
        numbers = {
            f"{record['split']}/{name}": float(value)
            for name, value in record.items()
            if name not in NO_NUMBERS and isinstance(value, (int, float, np.number))
        }
        for board in self._opened():
            board.numbers(numbers, record.get("step") or 0)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Show a PNG file."""
        for board in self._opened():
            board.picture(name, path, step)

    def close(self) -> None:
        """Flush and close; the next write opens the boards again."""
        for board in self._boards or ():
            board.close()
        self._boards = None

    def _opened(self) -> list[Any]:
        if self._boards is None:
            boards = [make() for make in self._makers]
            self._boards = [board for board in boards if board is not None]
        return self._boards

    def _tensorboard(self) -> _TensorBoard | None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except Exception as error:  # it is optional: a broken installation must not stop a run
            logging.warning("no TensorBoard: it cannot be imported (%s)", error)
            self._makers.remove(self._tensorboard)
            return None
        later = self.began + 1 if self.began else None
        self.began = 0  # if the board opens again, keep what this process wrote
        return _TensorBoard(SummaryWriter(str(self._folder / "tensorboard"), purge_step=later))

    def _weights_and_biases(self) -> _WeightsAndBiases:
        import wandb

        name = self._folder.name
        run = wandb.init(
            project=self._wandb if isinstance(self._wandb, str) else PROJECT,
            id=name,
            name=name,
            dir=str(self._folder),
            resume="allow",
            config=dict(self._config),
        )
        # A split's numbers may belong to an earlier step, which wandb's own step count forbids
        run.define_metric("*", step_metric="step")
        return _WeightsAndBiases(run, wandb.Image)


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def numbers(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed run should not lose what it showed

    def picture(self, name: str, path: Path, step: int) -> None:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, run: Any, image: Any) -> None:
        self._run, self._image = run, image

    def numbers(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log({**numbers, "step": step})

    def picture(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._image(str(path)), "step": step})

    def close(self) -> None:
        self._run.finish()
