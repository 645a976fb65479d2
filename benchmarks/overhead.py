"""Row 6: what a training run does outside forward, backward and optimizer.

A run is started as a user starts it, by a shipped YAML; the second of its epochs is timed, in which
data loading (one worker), collating, tokenizing, logging and waiting are all there is besides.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import softmask_plugin  # noqa: F401  (first: it makes `import lavis` work)

# isort: split
import torch

from benchmarks.harness import Row, now
from benchmarks.material import SMALL, build, photos, texts, write_jpegs
from softmask_plugin import launch
from softmask_plugin.models.pretrain import SoftMaskPretrain
from softmask_plugin.runners.runner import SoftmaskRunner
from softmask_plugin.tokenization import CaptionReader

BASE = "lavis_configs/projects/captions_folder/train/pretrain_base.yaml"
# Whose time counts for which part; captions are read within forward.
PARTS = {
    "forward": (SoftMaskPretrain, "forward"),
    "tokenize": (CaptionReader, "read"),
    "backward": (torch.Tensor, "backward"),
    "optimizer": (torch.optim.AdamW, "step"),
    "epoch": (SoftmaskRunner, "train_epoch"),
}


class Stopwatch:
    """Adds up the seconds that some functions take."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def on(self, parts: dict[str, tuple[Any, str]]) -> Iterator[None]:
        """Time these methods while the context lasts."""
        with ExitStack() as stack:
            for name, (owner, method) in parts.items():
                wrapped = self._timed(name, getattr(owner, method))
                stack.enter_context(patch.object(owner, method, wrapped))
            yield

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "epoch":  # only the last one counts, when all is warm
                self.seconds.clear()
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += now() - start

        return call


def run(small: bool, captions: str | None, rounds: int) -> list[Row]:
    """Measure the row over ``rounds`` steps."""
    size = 8
    count = size * max(rounds, 3)
    with TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_jpegs(photos(captions, count), folder)
        lines = texts(build(True, captions), captions, count)
        rows = [{"image": p.name, "caption": c} for p, c in zip(paths, lines, strict=True)]
        (folder / "train.json").write_text(json.dumps(rows))
        options = {
            "datasets.captions_folder.images": str(folder),
            "datasets.captions_folder.captions.train": str(folder / "train.json"),
            "model.vit_weights": "null",
            "model.bert_weights": "null",
            "model.tokenizer": str(folder / "train.json"),
            "run.output_dir": str(folder),
            "run.max_epoch": 2,
            "run.batch_size_train": size,
            "run.num_workers": 1,
            "run.log_freq": 1,
            "run.amp": False,
            "run.device": "cuda" if torch.cuda.is_available() else "cpu",
        }
        if small:
            sized = {"vis_processor": {"train": {"image_size": SMALL["image_size"]}}}
            options |= flat({"model": SMALL, "datasets": {"captions_folder": sized}})
        watch = Stopwatch()
        with watch.on(PARTS), patch.object(SoftmaskRunner, "_save_checkpoint"):
            launch.run(BASE, [f"{key}={value}" for key, value in options.items()])
    part = watch.seconds
    computing = part["forward"] - part["tokenize"] + part["backward"] + part["optimizer"]
    steps = count // size
    return [
        Row(
            "a step's time outside forward, backward and optimizer, against all of it",
            "s",
            (part["epoch"] - computing) / steps,
            part["epoch"] / steps,
            0.03,
            note=f"of which the tokenizer {part['tokenize'] / steps:.4f} s",
        )
    ]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        below = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        found |= below if below is not None else {f"{prefix}{key}": value}
    return found
