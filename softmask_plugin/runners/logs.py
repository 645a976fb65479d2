"""A run's log: metrics.jsonl, boards and progress bar."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lavis.common.dist_utils import is_main_process
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from softmask_plugin.runners.boards import Boards


class RunLog:
    """metrics.jsonl and the progress of a run: a bar on a terminal, plain lines elsewhere.

    Args:
        folder: The run's folder.
        boards: Also get the lines of metrics.jsonl.
    """

    NAMES = ("metrics.jsonl", "log.txt", "evaluate.txt")  # ours, and LAVIS's

    def __init__(self, folder: Path, boards: Boards) -> None:
        self._folder, self.boards = folder, boards
        self.seconds = 0.0  # training time before this process

    def lengths(self) -> dict[str, int]:
        """Length of each log on the disk, bytes."""
        found = {}
        for path in (self._folder / name for name in self.NAMES):
            if path.exists():
                with path.open("ab") as file:
                    os.fsync(file.fileno())
                    found[path.name] = file.tell()
        return found

    def cut(self, lengths: Mapping[str, int]) -> None:
        """Cut the logs back to earlier ``lengths`` (on the main process)."""
        if is_main_process():
            for name in self.NAMES:
                path = self._folder / name
                if path.exists():
                    length = min(lengths.get(name, 0), path.stat().st_size)
                    os.truncate(path, length)

    @property
    def clock(self) -> float:
        """Training time so far, including that before an interruption, seconds."""
        return self.seconds + time.monotonic() - self._start

    def write(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl and show it on the boards (on the main process)."""
        if is_main_process():
            with (self._folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self.boards.write(record)

    @contextmanager
    def progress(self, done: int, total: int) -> Iterator[None]:
        """Show a bar over the run's optimizer steps, from ``done`` to ``total``."""
        self.bar = tqdm(
            total=total,
            initial=done,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=None if is_main_process() else True,  # None: quiet where there is no terminal
        )
        self.boards.began = done
        self._done, self._total, self._start = done, total, time.monotonic()
        with logging_redirect_tqdm(), self.bar:
            yield

    def training(self, record: dict[str, Any]) -> None:
        """Write a training line (epoch, step, lr, loss terms, pairs_per_s) and show it."""
        self.write({"split": "train", **record, "time": round(self.clock, 2)})
        speed, loss = f"{record['pairs_per_s']:.0f} pairs/s", record.get("loss", math.nan)
        self.bar.set_postfix_str(f"epoch {record['epoch']}, loss {loss:.3f}, {speed}")
        if self.bar.disable:
            seconds = time.monotonic() - self._start
            left = (self._total - record["step"]) * seconds / (record["step"] - self._done)
            terms = ", ".join(f"{k} {v:.3f}" for k, v in record.items() if k.startswith("loss"))
            logging.info(
                f"epoch {record['epoch']}, step {record['step']}/{self._total}: {terms}, "
                f"lr {record['lr']:.2e}, {speed}, {tqdm.format_interval(left)} left"
            )
