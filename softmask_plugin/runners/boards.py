"""A run's numbers and pictures on the boards that people watch: TensorBoard, Weights & Biases."""

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

NO_NUMBERS = ("split", "epoch", "step", "time")  # keys of a record that say where it belongs
PROJECT = "softmask"  # of Weights & Biases, where run.wandb names none


class Boards:
    """Writes to TensorBoard where it is installed, and to Weights & Biases where that is asked for.

    A board is opened when the first thing is written to it. To be used on the main process alone.

    Args:
        folder: of the run; TensorBoard's files go into its ``tensorboard``.
        config: of the run, as plain values; ``run.tensorboard`` and ``run.wandb`` choose.

    Attributes:
        began: optimizer steps taken before this process; what TensorBoard shows of later ones,
            which an earlier process took and this one takes again, gives way to this one's.

    Raises:
        UserError: Weights & Biases is asked for, but is not installed.
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
        """Show the numbers of a line of metrics.jsonl, under the name of its split."""
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
        """Write out all that is left; writing again opens the boards again."""
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
        except Exception as error:  # nobody asked for it: a broken installation stops no run
            logging.warning("no TensorBoard: it cannot be imported (%s)", error)
            self._makers.remove(self._tensorboard)
            return None
        later = self.began + 1 if self.began else None
        self.began = 0  # what this process writes stays, should the board be opened again
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
        # A split's numbers may belong to a step before the last one, which wandb's own count of
        # steps does not allow.
        run.define_metric("*", step_metric="step")
        return _WeightsAndBiases(run, wandb.Image)


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def numbers(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a run that is killed should not take what it showed along

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
