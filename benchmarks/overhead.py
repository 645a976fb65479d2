"""Row 6: the time that a training run spends outside forward, backward and optimizer.

A run is started from a shipped YAML, as a user would, and the second of its two epochs is timed.
The rest is data loading (one worker), collating, tokenizing, logging and waiting.
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

import torch

from benchmarks.harness import Row, now
from benchmarks.material import SMALL, build, photos, texts, write_jpegs
from softmask_plugin import launch
from softmask_plugin.config.values import flat
from softmask_plugin.models.pretrain import SoftMaskPretrain
from softmask_plugin.runners.runner import SoftmaskRunner
from softmask_plugin.tokenization import CaptionTokenizer

BASE = "lavis_configs/projects/captions_folder/train/pretrain_base.yaml"
# The functions whose time counts for each part; captions are tokenized within forward
PARTS = {
    "forward": (SoftMaskPretrain, "forward"),
    "tokenize": (CaptionTokenizer, "tokenize"),
    "backward": (torch.Tensor, "backward"),
    "optimizer": (torch.optim.AdamW, "step"),
    "epoch": (SoftmaskRunner, "train_epoch"),
}


@contextmanager
def stopwatch(parts: dict[str, tuple[Any, str]]) -> Iterator[Counter[str]]:
    """Add up the seconds that these methods take within the context."""
    seconds: Counter[str] = Counter()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "epoch":  # only the last one counts
                seconds.clear()
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += now() - start

        return call

    with ExitStack() as stack:
        for name, (owner, method) in parts.items():
            wrapped = timed(name, getattr(owner, method))
            stack.enter_context(patch.object(owner, method, wrapped))
        yield seconds


def run(small: bool, captions: str | None, rounds: int) -> list[Row]:
    """Measure the row over ``rounds`` steps, at least 3."""
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
            "run.panel_every": "null",  # in so short an epoch, a picture would outweigh the rest
            "run.amp": False,
            "run.device": "cuda" if torch.cuda.is_available() else "cpu",
        }
        if small:
            sized = {"vis_processor": {"train": {"image_size": SMALL["image_size"]}}}
            options |= flat({"model": SMALL, "datasets": {"captions_folder": sized}})
        with stopwatch(PARTS) as part, patch.object(SoftmaskRunner, "_save_checkpoint"):
            launch.run(BASE, [f"{key}={value}" for key, value in options.items()])
    computing = part["forward"] - part["tokenize"] + part["backward"] + part["optimizer"]
    steps = count // size
    return [
        Row(
            "a step's time outside forward, backward and optimizer, against all of it",
            "s",
            (part["epoch"] - computing) / steps,
            part["epoch"] / steps,
            0.03,
            note=f"of which the tokenizer takes {part['tokenize'] / steps:.4f} s",
        )
    ]
