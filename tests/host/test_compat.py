"""The patches to LAVIS and to other packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import lavis.models
import pytest
from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask

from softmask_plugin.errors import UserError

# What a user of each part would see, all warnings on
CODE = """
import softmask_plugin
import torch
from lavis.common.dist_utils import is_main_process
from matplotlib.figure import Figure
from torch.utils.data import DataLoader
from transformers.utils import cached_file
import softmask_plugin.explain.app
list(DataLoader([torch.ones(1)], pin_memory=True))
figure = Figure()
figure.text(0.5, 0.5, "\\u6f22 \\U0001f600")
figure.savefig("figure.png")
try:
    cached_file("no/model", "config.json", local_files_only=True)
except OSError:
    pass
exec(compile("import torch; torch.cuda.amp.GradScaler(enabled=False)", "runner_base.py", "exec"),
     {"__name__": "lavis.runners.runner_base"})
"""


def test_known_warnings_of_dependencies_are_muted(tmp_path):
    command = [sys.executable, "-W", "default", "-c", CODE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("load", [lavis.models.load_model, lavis.models.load_model_and_preprocess])
def test_an_unknown_model_or_type_gets_the_nearest_names(load):
    with pytest.raises(UserError, match="'softmask_pretrian': did you mean 'softmask_pretrain'"):
        load("softmask_pretrian", "tiny")
    with pytest.raises(UserError, match="'tyni' of SoftMaskPretrain, .* did you mean 'tiny'"):
        load("softmask_pretrain", "tyni")
    assert type(load("softmask_pretrain", "tiny")).__name__ in ("SoftMaskPretrain", "tuple")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (URLError("no route"), "no route"),
        (ValueError("unknown url type: '/export/a'"), "unknown url"),
    ],
)
def test_annotations_that_cannot_be_downloaded_are_named(tmp_path, monkeypatch, error, reason):
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", str(tmp_path))
    module = "lavis.datasets.builders.base_dataset_builder"
    monkeypatch.setattr(f"{module}.download_url", Mock(side_effect=error))
    builder = registry.get_builder_class("snli_ve")()
    with pytest.raises(UserError, match=f"SNLI.*{reason}.*ve_train.json.* below env.cache_root"):
        builder._download_ann()


def test_duplicate_results_are_left_out_as_lavis_does(tmp_path):
    rows = [{"id": i % 7 if i % 2 else str(i % 5), "n": i} for i in range(40)]
    file = BaseTask.save_result(rows, str(tmp_path), "results", remove_duplicate="id")
    firsts = {row["id"]: row for row in reversed(rows)}
    expected = sorted(firsts.values(), key=lambda row: row["n"])
    assert json.loads(Path(file).read_text()) == expected and len(expected) == 12
    file = BaseTask.save_result(rows, str(tmp_path), "results")
    assert json.loads(Path(file).read_text()) == rows


def test_the_registry_itself_is_lavis_own():
    """Other code may rely on None, and on one table of names."""
    assert registry.get_model_class("softmask_pretrian") is None
    assert lavis.models.registry.mapping is registry.mapping
