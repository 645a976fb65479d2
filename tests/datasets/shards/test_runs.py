"""Training on streamed shards: interrupted and resumed, with workers."""

from __future__ import annotations

import itertools
import json
import logging

import pytest

from benchmarks.material import photos, write_jpegs
from benchmarks.traces import differences, trace
from softmask_plugin import launch
from softmask_plugin.datasets.shards.pack import pack_shards
from softmask_plugin.errors import UserError
from softmask_plugin.models.pretrain import SoftMaskPretrain

PROJECT = "lavis_configs/projects/caption_shards/train/pretrain_tiny.yaml"
CAPTIONS = ["a red circle", "a blue star above a green ring", "a black heart", "many objects"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """42 images in six shards, with which an epoch of 40 ends within a shard."""
    root = tmp_path_factory.mktemp("stream")
    paths = write_jpegs(photos(None, 42), root)
    rows = [{"image": p.name, "caption": CAPTIONS[i % 4]} for i, p in enumerate(paths)]
    (root / "train.json").write_text(json.dumps(rows))
    pack_shards(root / "train.json", root, root / "shards", per_shard=7)
    return root / "shards"


def train(shards, folder, workers, **more):
    options = {
        "model.tokenizer": "scenes",
        "model.image_size": 32,
        "model.vit": "{patch_size: 16, width: 32, depth: 1, heads: 2}",
        "model.bert.width": 24,
        "model.bert.intermediate": 48,
        "datasets.caption_shards.shards": shards,
        "datasets.caption_shards.items": 40,
        "datasets.caption_shards.shuffle": 4,
        "run.output_dir": folder,
        "run.num_workers": workers,
        "run.batch_size_train": 4,
        "run.max_epoch": 2,
        "run.log_freq": 3,
        "run.save_every_steps": 3,
        "run.resume_ckpt_path": "auto",
        **more,
    }
    return launch.run(PROJECT, [f"{key}={value}" for key, value in options.items()])[0]


class Stop(Exception):
    """What interrupts a run."""


@pytest.mark.parametrize(("workers", "moments"), [(0, (4, 11, 17)), (2, (5, 14)), (3, (8,))])
def test_an_interrupted_stream_resumes_with_the_very_next_sample(
    shards, tmp_path, monkeypatch, workers, moments
):
    whole = trace(train(shards, tmp_path / "whole", workers).output_dir)
    forward, calls = SoftMaskPretrain.forward, itertools.count(1)

    def interrupted(self, samples):
        if next(calls) == moment:
            raise Stop
        return forward(self, samples)

    monkeypatch.setattr(SoftMaskPretrain, "forward", interrupted)
    for moment in moments:
        calls = itertools.count(1)
        with pytest.raises(Stop):
            train(shards, tmp_path / f"at {moment}", workers)
        calls = itertools.count(1000)
        again = train(shards, tmp_path / f"at {moment}", workers)
        assert not differences(trace(again.output_dir), whole)


def test_a_stream_is_not_evaluated(shards, tmp_path):
    asked = {"run.evaluate": True, "run.test_splits": ["train"], "model.load_pretrained": False}
    with pytest.raises(UserError, match="the 'train' split lacks what evaluation needs"):
        train(shards, tmp_path, 0, **asked)


def test_too_few_shards_are_an_error_before_training(shards, tmp_path):
    with pytest.raises(UserError, match="6 shards cannot be split among 1 processes x 7 workers"):
        train(shards, tmp_path, 7)


def test_another_number_of_workers_gets_the_rest_of_the_data(shards, tmp_path, monkeypatch, caplog):
    seen = []
    forward = SoftMaskPretrain.forward

    def noting(self, samples):
        if stop is not None and len(seen) == stop:
            raise Stop
        seen.append(samples["instance_id"])
        return forward(self, samples)

    monkeypatch.setattr(SoftMaskPretrain, "forward", noting)
    stop = 7
    with pytest.raises(Stop):
        train(shards, tmp_path, 1)
    before = [name for batch in seen[:6] for name in batch]  # the last checkpoint: after six steps
    finished = {name.split("/")[0] for name in before[:21]}
    seen, stop = [], None
    with caplog.at_level(logging.INFO):
        train(shards, tmp_path, 2)
    after = [name for batch in seen for name in batch]
    rest = [name for name in after[:16] if name.split("/")[0] in finished]
    assert len(finished) == 3 and not rest  # what was read whole does not come again in this pass
    assert len(seen) == 4 + 10
