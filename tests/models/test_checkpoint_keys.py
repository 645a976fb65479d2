"""ALBEF's checkpoints in each of their key layouts, into each model: every tensor accounted for."""

from __future__ import annotations

import argparse
import logging
import re

import pytest
import torch
from toy_models import EVERY_MODEL

from benchmarks import baseline
from softmask_plugin.errors import UserError
from softmask_plugin.models import (
    SoftMaskClassification,
    SoftMaskFeatureExtractor,
    SoftMaskNlvr,
    SoftMaskNlvrPretrain,
    SoftMaskPretrain,
    SoftMaskRetrieval,
    SoftMaskVqa,
)
from softmask_plugin.models.checkpoint_keys import adapt

SHAPE = {"bert": {"layers": 5, "fusion_layer": 2}, "vit": {"width": 32, "heads": 2}}


@pytest.fixture
def pretrained(make_other):
    """A pre-trained ALBEF whose momentum encoders are not its online ones: LAVIS's own class."""
    ours = make_other(SoftMaskPretrain, seed=1, **SHAPE)
    with torch.no_grad():
        for tensor in ours.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.randn_like(tensor))
    return baseline.albef_pretrain(ours).state_dict()


def load(model, state, folder, caplog):
    """Load through a file; return what the log says of it."""
    torch.save({"model": state, "epoch": 3}, folder / "a.pth")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        model.load_checkpoint(str(folder / "a.pth"))
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("loaded")]
    return line


def counted(line, label):
    """Tensors that the log line counts under a label, by module."""
    part = re.search(rf"; {label}: ([^;]*)", line)
    entries = part[1].split(", ") if part else []
    return {(m := re.match(r"(\w+)(?: \((\d+)\))?$", e))[1]: int(m[2] or 1) for e in entries}


@pytest.mark.parametrize("cls", EVERY_MODEL)
def test_a_pretrained_checkpoint_into_every_model(make_other, pretrained, tmp_path, caplog, cls):
    model = make_other(cls, **SHAPE)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    line = load(model, pretrained, tmp_path, caplog)
    state = model.state_dict()

    heads = {"cls_head", "cls_head_m", "ta_head", "idx_queue"}
    left = counted(line, "left as they were")
    assert left.keys() <= heads, line
    for name, tensor in state.items():
        part = name.partition(".")[0]
        if part in left:
            assert torch.equal(tensor, fresh[name])
        elif name in pretrained:
            assert torch.equal(tensor, pretrained[name]), name
    assert not counted(line, "other shape"), line
    renamed = adapt(pretrained, state, model.options.bert)
    assert sum(counted(line, "not used").values()) == len(renamed.keys() - state.keys())

    # The parts that the models rename, by hand
    word = pretrained["text_encoder.bert.embeddings.word_embeddings.weight"]
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, word)
    last = pretrained["text_encoder.bert.encoder.layer.4.crossattention.self.query.weight"]
    assert torch.equal(model.bert.encoder.layer[-1].crossattention.self.query.weight, last)


def test_vqas_decoder_starts_as_the_fusion_layers(make_other, pretrained, tmp_path, caplog):
    model = make_other(SoftMaskVqa, **SHAPE)
    line = load(model, pretrained, tmp_path, caplog)
    assert "left as they were" not in line
    for suffix in ("", "_m"):
        decoder = model.get_submodule(f"text_decoder{suffix}").state_dict()
        for key, tensor in decoder.items():
            name = re.sub(r"layer\.(\d+)\.", lambda m: f"layer.{int(m[1]) + 2}.", key)
            assert torch.equal(tensor, pretrained[f"text_encoder{suffix}.{name}"]), key


def test_the_fusion_layers_are_doubled_for_two_images(make_other, pretrained, tmp_path, caplog):
    model = make_other(SoftMaskNlvr, **SHAPE)
    load(model, pretrained, tmp_path, caplog)
    for suffix in ("", "_m"):
        state = model.get_submodule(f"text_encoder{suffix}").state_dict()
        for ours, theirs in enumerate((0, 1, 2, 2, 3, 3, 4, 4)):
            layer = {k: v for k, v in state.items() if f"layer.{ours}." in k}
            assert layer
            for key, tensor in layer.items():
                name = key.replace(f"layer.{ours}.", f"layer.{theirs}.")
                assert torch.equal(tensor, pretrained[f"text_encoder{suffix}.bert.{name}"]), key


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize(
    ("cls", "twin"),
    [
        (SoftMaskRetrieval, baseline.albef_retrieval),
        (SoftMaskClassification, baseline.albef_classification),
        (SoftMaskVqa, baseline.albef_vqa),
        (SoftMaskFeatureExtractor, baseline.albef_feature_extractor),
    ],
)
def test_lavis_fine_tuned_checkpoints_load_whole(make_other, tmp_path, caplog, cls, twin, prefix):
    donor = make_other(cls, seed=1, **SHAPE)
    with torch.no_grad():
        for tensor in donor.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.randn_like(tensor))
    theirs = twin(donor).state_dict()
    model = make_other(cls, **SHAPE)
    line = load(model, {prefix + key: v for key, v in theirs.items()}, tmp_path, caplog)
    assert "not used" not in line and "other shape" not in line
    own = {"idx_queue"} & theirs.keys()  # numbers of other data's images are not loaded
    assert own <= counted(line, "left as they were").keys() <= {"itm_head"} | own
    state = model.state_dict()
    for name, tensor in theirs.items():
        assert torch.equal(state[name], tensor), name


def test_text_assignment_hands_over_to_two_images(make_other, tmp_path, caplog):
    donor = make_other(SoftMaskNlvrPretrain, seed=1, **SHAPE)
    model = make_other(SoftMaskNlvr, **SHAPE)
    line = load(model, donor.state_dict(), tmp_path, caplog)
    assert counted(line, "not used") == {"ta_head": 2, "vision_proj": 2}
    assert counted(line, "left as they were") == {"cls_head": 4, "cls_head_m": 4}
    state = model.state_dict()
    for name, tensor in donor.state_dict().items():
        if not name.startswith(("ta_head", "vision_proj")):
            assert torch.equal(state[name], tensor), name
            assert torch.equal(state[name.replace("encoder.", "encoder_m.", 1)], tensor)


def test_a_head_of_another_size_is_named(make_other, tmp_path, caplog):
    donor = make_other(SoftMaskClassification, num_classes=5, **SHAPE)
    model = make_other(SoftMaskClassification, **SHAPE)
    line = load(model, donor.state_dict(), tmp_path, caplog)
    assert counted(line, "other shape") == {"cls_head": 2, "cls_head_m": 2}
    assert [r.levelname for r in caplog.records if "other shape" in r.getMessage()] == ["WARNING"]


def test_a_pickled_object_needs_trust(make_other, tmp_path):
    donor = make_other(SoftMaskClassification, seed=1, **SHAPE)
    file = {"model": donor.state_dict(), "config": argparse.Namespace(lr=1e-4)}
    torch.save(file, tmp_path / "a.pth")
    with pytest.raises(UserError, match="model.trust_checkpoint=true"):
        make_other(SoftMaskClassification, **SHAPE).load_checkpoint(str(tmp_path / "a.pth"))
    model = make_other(SoftMaskClassification, trust_checkpoint=True, **SHAPE)
    model.load_checkpoint(str(tmp_path / "a.pth"))
    assert torch.equal(model.cls_head[0].weight, donor.cls_head[0].weight)
