"""The trained model that comes with the package: small, whole, loaded from anywhere, and good."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from lavis.models import load_model_and_preprocess
from safetensors import safe_open
from toy_builders import build_scenes

from softmask_plugin import launch
from softmask_plugin.datasets.scenes.grammar import make_scenes
from softmask_plugin.datasets.scenes.render import render_item
from softmask_plugin.datasets.scenes.tasks import describe
from softmask_plugin.datasets.task_datasets import RetrievalDataset
from softmask_plugin.errors import UserError
from softmask_plugin.explain.scenes import pointing
from softmask_plugin.files.checkpoint import ASSETS, SHIPPED, open_checkpoint
from softmask_plugin.models.rerank import Reranker

FILE = ASSETS / "scenes_tiny.safetensors"
ARCHS = [
    f"softmask_{name}"
    for name in ("pretrain", "retrieval", "image_text_matching", "feature_extractor")
]


def test_the_file_is_small_and_says_how_it_was_made():
    assert FILE.stat().st_size < 10e6
    with safe_open(FILE, "pt") as file:
        within = file.metadata()
    beside = json.loads(FILE.with_suffix(".json").read_text())
    assert within["command"] == beside["command"]
    assert json.loads(within["held out"]) == beside["held out"]
    assert beside["bytes"] == FILE.stat().st_size
    assert {"seed", "date", "versions"} <= within.keys() & beside.keys()
    assert beside["held out"]["retrieval"]["txt_r1"] > 90
    named = beside["held out"]["named"]["in a caption"]
    assert named["own"] > 0.85 and named["chosen"] > 0.85 and named["count"] == 2000


def test_it_holds_online_weights_alone():
    names = open_checkpoint(f"{SHIPPED}scenes_tiny").state.keys()
    assert not [name for name in names if "_m." in name or "queue" in name]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_type_has_all_of_its_weights(arch):
    model, images, texts = load_model_and_preprocess(arch, "scenes_tiny", is_eval=True)
    stored = open_checkpoint(f"{SHIPPED}scenes_tiny").state
    for name, tensor in model.state_dict().items():
        source = name.replace("_m.", ".")
        source = source if source in stored else source.replace("encoder.", "encoder.bert.", 1)
        if source in stored:
            torch.testing.assert_close(tensor, stored[source].to(tensor.dtype), rtol=0, atol=0)
        else:
            assert "queue" in name, name  # nothing else may be left as it was drawn
    assert images["eval"].image_size == 60 and texts["eval"]("A Star.") == "a star"


def test_it_ranks_held_out_scenes():
    """A damaged file, or processors that do not fit it, would fall far below."""
    model, images, texts = load_model_and_preprocess(ARCHS[-1], "scenes_tiny", is_eval=True)
    scenes = make_scenes("test", 200, seed=1)  # of another seed than those that were reported
    items = [{"image": str(i), **describe(scene, 1)} for i, scene in enumerate(scenes)]
    draw = partial(render_item, 60)
    data = RetrievalDataset(images["eval"], texts["eval"], items, draw)
    scores = Reranker(model).scores(torch.utils.data.DataLoader(data, batch_size=64))
    for score in scores:
        assert (score.argmax(axis=1) == range(200)).mean() > 0.85


@pytest.mark.parametrize(("text", "name"), [("caption", "in a caption"), ("phrase", "alone")])
def test_its_maps_point_at_the_named_thing(text, name, tmp_path):
    """Counted by the grounding task, and from the maps one by one."""
    given = ["model.model_type=scenes_tiny", f"datasets.scenes_grounding.text={text}"]
    given += ["datasets.scenes_grounding.num.test=40", f"run.output_dir={tmp_path}"]
    runner, results = launch.run("scenes/eval/grounding_tiny", given, evaluate=True)
    data = build_scenes("scenes_retrieval", 40)["test"]
    named = pointing(runner.unwrap_dist_model(runner.model), data)["named"][name]
    found = results["test"]
    for metric, key in (("pointing", "own"), ("pointing_other", "other"), ("pointing_gap", "gap")):
        assert found[metric] == pytest.approx(100 * named[key])
    assert found["pointing"] > 85 > 15 > found["pointing_other"]
    assert found["pointing"] == pytest.approx(
        (found["pointing/colour"] + found["pointing/shape"]) / 2
    )


@pytest.mark.parametrize("name", ["scene_tiny", "../assets/scenes_tiny"])
def test_weights_that_are_not_shipped(name):
    with pytest.raises(UserError, match="no weights '.*' are shipped: .*'scenes_tiny'"):
        open_checkpoint(f"{SHIPPED}{name}")
