"""Options of the models: mistakes and their messages, defaults, and the shipped model files."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf

from softmask_plugin.config.options import PretrainOptions, read_options
from softmask_plugin.config.paths import load_inherited
from softmask_plugin.config.values import comparable, differences, flat
from softmask_plugin.errors import UserError
from softmask_plugin.models import (
    SoftMaskBlipPretrain,
    SoftMaskBlipRetrieval,
    SoftMaskPretrain,
    SoftMaskRetrieval,
)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"soft_msk": {}}, "unknown key model.soft_msk: did you mean 'soft_mask'"),
        ({"soft_mask": {"strenght": 1}}, "model.soft_mask.strenght: did you mean 'strength'"),
        ({"vit": {"dept": 3}}, "model.vit.dept: did you mean 'depth'"),
        ({"bert": {"xyz": 3}}, "model.bert.xyz: choose from 'attention_dropout'"),
        ({"embed_dim": "wide"}, "model.embed_dim: .*'wide'"),
        ({"embed_dim": 1.5}, "model.embed_dim: "),
        ({"itc": {"gamma": "high"}}, "model.itc.gamma: .*'high'"),
        ({"text": {"shared": "maybe"}}, "model.text.shared: .*'maybe'"),
        ({"bert": {"layers": None}}, "model.bert.layers: "),
        ({"vit": 3}, "model.vit is 3: it must be a section"),
        ({"soft_mask": None}, "model.soft_mask is None: it must be a section"),
        ({"soft_mask": [1]}, "model.soft_mask is .1.: it must be a section"),
        ({"soft_mask": {"words": "contents"}}, "did you mean 'content'"),
        ({"soft_mask": {"kind": "soft-ish"}}, "did you mean 'soft'"),
        ({"soft_mask": {"score": "words"}}, "did you mean 'word'"),
        ({"soft_mask": {"score": "word", "words": "energy"}}, "choose uniform or content"),
        ({"soft_mask": {"score": "similarity", "words": "energy"}}, "choose uniform or content"),
        ({"soft_mask": {"strength": 1.01}}, r"model.soft_mask.strength is 1.01: .*\[0, 1\]"),
        ({"text": {"mask_prob": -0.1}}, "model.text.mask_prob is -0.1"),
        ({"momentum": 2}, "model.momentum is 2"),
        ({"alpha": -1}, "model.alpha is -1"),
        ({"itc": {"gamma": -0.5}}, "model.itc.gamma is -0.5"),
        ({"itc": {"gamma": float("nan")}}, "model.itc.gamma is nan"),
        ({"temp": 0}, r"model.temp is 0.0: .*\[0.001, 0.5\]"),
        ({"queue_size": -1}, "model.queue_size is -1"),
        ({"max_txt_len": 600}, r"model.max_txt_len is 600: .*\[3, 512\]"),
        ({"image_size": 100}, "model.image_size is 100, not a multiple of model.vit.patch_size 16"),
        ({"vit": {"patch_size": 0}}, "model.vit.patch_size is 0"),
        ({"vit": {"heads": 7}}, "model.vit.width is 768, not a multiple of model.vit.heads 7"),
        ({"bert": {"fusion_layer": 11}}, "fusion_layer is 11 of 12 layers: two or more"),
        ({"bert": {"heads": 0}}, "model.bert.width is 768, not a multiple of model.bert.heads 0"),
    ],
)
def test_a_mistake_gets_one_line(section, message):
    with pytest.raises(UserError, match=message) as caught:
        read_options(PretrainOptions, OmegaConf.create(section))
    assert len(str(caught.value).splitlines()) == 1


def test_numbers_given_as_text_are_converted():
    options = read_options(PretrainOptions, {"temp": "5e-2", "queue_size": "128", "alpha": 0})
    assert (options.temp, options.queue_size, options.alpha) == (0.05, 128, 0.0)


@pytest.mark.parametrize(("fusion", "layers", "layer"), [(6, 12, 8), (2, 4, 2), (2, 6, 4)])
def test_the_map_layer_is_the_third_with_cross_attention_but_never_the_last(fusion, layers, layer):
    bert = {"fusion_layer": fusion, "layers": layers}
    assert read_options(PretrainOptions, {"bert": bert}).soft_mask.layer == layer


@pytest.mark.parametrize(("layer", "fits"), [(5, False), (6, True), (10, True), (11, False)])
def test_bounds_of_the_map_layer(layer, fits):
    section = {"soft_mask": {"layer": layer}}
    if fits:
        assert read_options(PretrainOptions, section).soft_mask.layer == layer
    else:
        with pytest.raises(UserError, match=f"layer is {layer}: choose from 6 to 10"):
            read_options(PretrainOptions, section)


@pytest.mark.parametrize(
    "name", ["pretrain", "retrieval", "image_text_matching", "feature_extractor"]
)
def test_scenes_tiny_inherits_all_but_its_weights_from_tiny(name):
    cls = registry.get_model_class(f"softmask_{name}")
    tiny, trained = (
        flat(OmegaConf.to_container(OmegaConf.load(cls.default_config_path(model_type))))
        for model_type in ("tiny", "scenes_tiny")
    )
    assert [*differences(tiny, trained)] == [
        ("model.model_type", "tiny", "scenes_tiny"),
        ("model.pretrained", None, "shipped:scenes_tiny"),
    ]


@pytest.mark.parametrize("cls", [SoftMaskPretrain, SoftMaskBlipPretrain])
def test_grounded_is_base_with_what_makes_the_tiny_model_s_word_drive_the_mask(cls):
    base, grounded, tiny = (
        read_options(cls.OPTIONS, OmegaConf.load(path).model)
        for path in map(cls.default_config_path, ("base", "grounded", "tiny"))
    )
    changed = [
        "model_type",
        "bert.image_cls",
        "soft_mask.score",
        "soft_mask.negatives",
        "local_weight",
        *["text.shared"] * (cls is SoftMaskPretrain),  # BLIP masks no captions
    ]
    of_base, of_grounded, of_tiny = (flat(asdict(each)) for each in (base, grounded, tiny))
    told = {key for key, value in of_grounded.items() if of_base[key] != value}
    assert told == {*changed}
    assert all(of_tiny[key] == of_grounded[key] for key in changed[1:])


@pytest.mark.parametrize("cls", [SoftMaskRetrieval, SoftMaskBlipRetrieval])
def test_fine_tuning_has_no_mask_and_no_focal_loss_by_default(cls):
    options = read_options(cls.OPTIONS, {})
    assert not options.soft_mask.enabled and options.itc.gamma == 0
    for path in map(cls.default_config_path, cls.PRETRAINED_MODEL_CONFIG_DICT):
        options = read_options(cls.OPTIONS, OmegaConf.load(path).model)
        assert not options.soft_mask.enabled and options.itc.gamma == 0, path


def test_a_file_inherits_from_the_one_beside_it(tmp_path):
    (tmp_path / "parent.yaml").write_text("model: {image_size: 60, vit: {depth: 3, width: 128}}")
    child = tmp_path / "child.yaml"
    child.write_text("inherits: parent.yaml\nmodel: {arch: mine, vit: {depth: 4}}")
    assert load_inherited(child) == {
        "model": {"image_size": 60, "vit": {"depth": 4, "width": 128}, "arch": "mine"}
    }


def test_a_stated_default_is_as_good_as_none():
    arch = {"model.arch": "softmask_pretrain"}
    stated = {"run.amp": False, "run.train_splits": [], "model.itc.gamma": 2.0, "preprocess.x": 1}
    assert comparable({**arch, **stated}) == comparable(arch)
    assert comparable({**arch, "run.amp": True}) != comparable(arch)


def test_shipped_models_are_built_from_their_files():
    """On the meta device, and without downloads."""
    sizes = {}
    for model_type in SoftMaskPretrain.PRETRAINED_MODEL_CONFIG_DICT:
        section = OmegaConf.load(SoftMaskPretrain.default_config_path(model_type)).model
        section.merge_with({"vit_weights": None, "bert_weights": None, "tokenizer": "scenes"})
        options = read_options(PretrainOptions, section)
        with torch.device("meta"):
            model = SoftMaskPretrain(options)
        sizes[model_type] = sum(p.numel() for p in model.parameters())
    # ViT-B/16 86 M, BERT-base with half its layers reading images 124 M + MLM head
    assert 205e6 < sizes["base"] == sizes["grounded"] < 225e6
    assert sizes["tiny"] < 3e6
