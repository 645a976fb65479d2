"""Same seed, same machine, same result, whatever loads the data."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.traces import differences, trace
from softmask_plugin import launch

PROJECT = "lavis_configs/projects/captions_folder/train/pretrain_tiny.yaml"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    rows = ["image\tcaption"]
    for i in range(24):
        pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 48)).save(folder / f"{i}.jpg")
        rows += [f"{i}.jpg\ta {word} thing number {i % 5}" for word in ("red", "big", "far")]
    (folder / "captions.tsv").write_text("\n".join(rows))
    return folder


def options(photos, folder, **more):
    return [
        f"datasets.captions_folder.images={photos}",
        f"datasets.captions_folder.captions.train={photos / 'captions.tsv'}",
        f"datasets.captions_folder.captions.val={photos / 'captions.tsv'}",
        "model.image_size=32",
        "model.bert.dropout=0.1",
        "run.batch_size_train=5",
        "run.max_epoch=2",
        "run.k_test=4",
        f"run.output_dir={folder}",
        *(f"run.{key}={value}" for key, value in more.items()),
    ]


def test_runs_are_the_same_to_the_last_bit(photos, tmp_path):
    """With no worker, with two, in another process, and with repeatable kernels demanded."""

    def run(name, **more):
        return trace(launch.run(PROJECT, options(photos, tmp_path / name, **more))[0].output_dir)

    expected = run("none", num_workers=0)
    assert not differences(run("two", num_workers=2), expected)
    assert not differences(run("repeatable", num_workers=0, deterministic="true"), expected)
    torch.use_deterministic_algorithms(False)
    command = [sys.executable, "-m", "softmask_plugin.train", "--cfg-path", PROJECT, "--options"]
    given = options(photos, tmp_path / "process", num_workers=1)
    done = subprocess.run([*command, *given], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "process").glob("*/")
    assert not differences(trace(folder), expected)
    assert differences(run("seed", num_workers=0, seed=43), expected)
