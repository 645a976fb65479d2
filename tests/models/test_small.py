"""The type small: a hybrid ViT and a small BERT, which start from the files of installed packages.

Packages are made on the spot, in the layouts of the real ones, which are used as well if they are
installed. References are timm's model and transformers' BERT.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import timm
import torch
from lavis.models import load_model, load_model_and_preprocess
from lavis.tasks.image_text_pretrain import ImageTextPretrainTask
from omegaconf import OmegaConf
from packages import install, listed
from PIL import Image
from safetensors.torch import load_file, save_file
from toy_items import Pairs
from toy_models import CAPTIONS, EVERY_MODEL, SMALL, TRAINED, plain_bert, whole_batch
from toys import build, read_metrics
from transformers import BertConfig, BertModel

from softmask_plugin.config.paths import shipped_configs
from softmask_plugin.errors import UserError
from softmask_plugin.explain import explain_image
from softmask_plugin.explain.maps import word_maps
from softmask_plugin.files.checkpoint import Checkpoint
from softmask_plugin.files.packages import SMALL as PACKAGES
from softmask_plugin.files.packages import packaged_file
from softmask_plugin.models import (
    SoftMaskFeatureExtractor,
    SoftMaskImageTextMatching,
    SoftMaskPretrain,
    SoftMaskRetrieval,
    weights,
)
from softmask_plugin.models.contrastive import Similarity
from softmask_plugin.models.rerank import Reranker
from softmask_plugin.nn.sampling import Draws

NAME = "tf_efficientnet_lite0"
HYBRID = {"image_size": 64, "vit": {"backbone": NAME, "patch_size": 16, "width": 32, "heads": 2}}
VIT, BERT = (f"package:{name}" for name in PACKAGES)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that packages are installed in; the real ones are out of sight."""
    folder = tmp_path / "site"
    monkeypatch.syspath_prepend(str(folder))
    for name in PACKAGES:
        install(folder, name)
    return folder


@pytest.fixture
def backbone(site):
    """timm's whole model, and a package with its weights under names of another code's."""
    torch.manual_seed(3)
    model = timm.create_model(NAME).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "running" in key:
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    folder = site / PACKAGES[0].replace("-", "_")
    torch.save(renamed(model.state_dict()), folder / "efficientnet-lite0-57934424.pth")
    listed(folder)
    return model


def renamed(state):
    kinds = [key.rpartition(".")[2] for key in state]
    return {f"_layers.{i}.{kinds[i]}": tensor for i, tensor in enumerate(state.values())}


def with_bert(site, shape):
    """transformers' BERT of this shape, and a package with its weights in MiniLM's layout."""
    torch.manual_seed(4)
    twin = BertModel(plain_bert(shape).config).eval()
    with torch.no_grad():
        twin.embeddings.token_type_embeddings.weight.normal_()
    folder = site / PACKAGES[1].replace("-", "_")
    state = {key: tensor.clone() for key, tensor in twin.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    listed(folder)
    return twin


def text_states(model):
    captions = model.tokenize(CAPTIONS)
    return captions, captions.packing.pad(model.bert.encode(captions.ids, captions.packing).states)


# ---- weights of the backbone


@torch.no_grad()
def test_a_backbone_named_by_other_code_has_its_tensors_in_timms_order(
    make_other, backbone, caplog
):
    model = make_other(SoftMaskPretrain, **HYBRID).eval()
    with caplog.at_level(logging.INFO):
        weights.initialise(model, VIT, None)
    (line,) = [r.getMessage() for r in caplog.records if NAME in r.getMessage()]
    assert "all 240 tensors of tf_efficientnet_lite0; not used: bn2_bias" in line
    images = torch.randn(2, 3, 64, 64)
    last = backbone.blocks(backbone.act1(backbone.bn1(backbone.conv_stem(images))))
    own = model.visual_encoder.patch_embed.backbone(images)[-1]
    torch.testing.assert_close(own, last, rtol=1e-4, atol=1e-4)
    assert own.std() > 0


def test_a_backbone_named_as_timm_does_is_matched_by_name(make_other, backbone, tmp_path):
    shuffled = dict(reversed(backbone.state_dict().items()))
    torch.save(shuffled, tmp_path / "own.pth")
    model = make_other(SoftMaskPretrain, **HYBRID)
    weights.initialise(model, str(tmp_path / "own.pth"), None)
    state = backbone.state_dict()
    for key, tensor in model.visual_encoder.patch_embed.backbone.state_dict().items():
        assert torch.equal(tensor, state[key]), key


def less(state):
    state.popitem()


def more(state):
    state["more"] = torch.ones(3)


def swapped(state):
    """A weight and the running mean after it, of one shape, change places."""
    first, weight, bias, mean, *others = list(state.items())
    state.clear()
    state.update([first, mean, bias, weight, *others])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (less, "it has 246 tensors, not 247"),
        (more, "it has 248 tensors, not 247"),
        (swapped, r"'_layers_3_running_mean' \(32,\) stands for 'bn1_weight' \(32,\)"),
    ],
)
def test_a_file_with_other_tensors_is_refused(make_other, backbone, tmp_path, change, message):
    state = renamed(backbone.state_dict())
    change(state)
    torch.save(state, tmp_path / "a.pth")
    model = make_other(SoftMaskPretrain, **HYBRID)
    with pytest.raises(UserError, match=f"another model than .*{message}") as caught:
        weights.initialise(model, str(tmp_path / "a.pth"), None)
    assert "\n" not in str(caught.value)


def test_weights_of_another_backbone_are_refused(make_other, tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="a.pth is of another model .* has 102 tensors, not 247"):
        weights.initialise(make_other(SoftMaskPretrain, **HYBRID), str(tmp_path / "a.pth"), None)


def test_a_backbone_that_is_not_finite_is_refused(make_other, backbone, tmp_path):
    backbone.bn1.bias.data[0] = float("nan")
    torch.save(backbone.state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match="'bn1.bias' holds NaN"):
        weights.initialise(make_other(SoftMaskPretrain, **HYBRID), str(tmp_path / "a.pth"), None)


# ---- weights of the text encoder


@torch.no_grad()
@pytest.mark.parametrize("cls", EVERY_MODEL)
def test_text_states_are_those_of_the_packaged_bert(make_other, site, cls):
    model = make_other(cls).eval()
    shape = model.text_encoder.shape
    fusion = SMALL["bert"]["layers"] - shape.fusion_layer
    twin = with_bert(site, make_other(SoftMaskPretrain).text_encoder.shape)
    weights.initialise(model, None, BERT)
    captions, own = text_states(model)
    theirs = twin(captions.ids, attention_mask=captions.mask.long(), output_hidden_states=True)
    theirs = theirs.hidden_states[shape.fusion_layer]
    torch.testing.assert_close(own[captions.mask], theirs[captions.mask], atol=1e-5, rtol=0)
    # The fusion layers, doubled for two images, are its last ones
    copies = len(model.bert.fusion_layers) // fusion
    for i, layer in enumerate(model.bert.fusion_layers):
        source = twin.encoder.layer[shape.fusion_layer + i // copies]
        assert torch.equal(layer.output.dense.weight, source.output.dense.weight)


@torch.no_grad()
@pytest.mark.parametrize("cls", EVERY_MODEL)
def test_layers_beyond_a_bert_start_as_copies_of_its_last(make_other, site, cls):
    twin = with_bert(site, make_other(SoftMaskPretrain).text_encoder.shape)
    layers = len(twin.encoder.layer)
    model = make_other(cls, bert={"layers": layers + 3, "fusion_layer": layers}).eval()
    weights.initialise(model, None, BERT)
    copies = len(model.bert.fusion_layers) // 3
    for i, layer in enumerate(model.bert.fusion_layers):
        source = twin.encoder.layer[layers - 3 + i // copies]
        assert torch.equal(layer.output.dense.weight, source.output.dense.weight)
    captions, own = text_states(model)
    theirs = twin(captions.ids, attention_mask=captions.mask.long()).last_hidden_state
    torch.testing.assert_close(own[captions.mask], theirs[captions.mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("layers", "sources"),
    [(2, [0, 1]), (3, [0, 1, 1]), (4, [0, 1, 0, 1]), (7, [0, 1] + [1, 0, 1, 0, 1])],
)
def test_a_bert_is_deepened_in_order(layers, sources):
    state = {f"bert.encoder.layer.{i}.x": torch.tensor(i) for i in range(2)}
    deeper = weights.deepen(state | {"bert.y": torch.tensor(9)}, layers)
    assert deeper.pop("bert.y") == 9
    assert [int(deeper[f"bert.encoder.layer.{i}.x"]) for i in range(len(deeper))] == sources


def test_a_bert_of_another_shape_is_refused(make_other, site):
    with_bert(site, make_other(SoftMaskPretrain).text_encoder.shape)
    with pytest.raises(UserError, match="in the file, .* in the model: set .*model.bert"):
        weights.initialise(make_other(SoftMaskPretrain, bert={"vocab_size": 200}), None, BERT)


def test_new_cross_attention_is_initialised_as_albefs(make_other, site):
    model = make_other(SoftMaskPretrain, bert={"width": 384, "heads": 6})
    layer = model.bert.encoder.layer[3].crossattention.self
    assert layer.key.weight.std().item() == pytest.approx(0.02 * 2**0.5, rel=0.05)


# ---- training


@pytest.mark.parametrize("cls", TRAINED)
def test_a_step_trains_all_but_the_backbone_and_runs_it_once(make_other, make_batch, cls):
    model = make_other(cls, **HYBRID).train()
    embed, calls = model.visual_encoder.patch_embed, []
    embed.backbone.register_forward_hook(lambda *_: calls.append(1))
    before = {key: tensor.clone() for key, tensor in embed.backbone.state_dict().items()}
    model(whole_batch(make_batch(4, 64))).loss.backward()
    assert len(calls) == 1
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert not [name for name, _ in model.named_parameters() if "backbone" in name]
    for key, tensor in embed.backbone.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def run(make_other, folder, job_id, **options):
    torch.manual_seed(0)
    vit = {"patch_dropout": 0.5, "patch_dropout_steps": 3, **HYBRID["vit"]}
    hybrid = {**HYBRID, "vit": vit}
    model = make_other(SoftMaskPretrain, **hybrid, text_pool="mean", itm_hard_steps=3)
    options = {"init_lr": 1e-3, "max_epoch": 2, "keep_checkpoints": None, **options}
    options["lr_scale"] = {"text_encoder": 0.5, "crossattention": 1}
    data = {"train": Pairs(8, 64)}
    return build(folder, ImageTextPretrainTask(), model, job_id, data, **options)


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(make_other, tmp_path):
    whole = run(make_other, tmp_path, "whole")
    whole.train()
    file = whole.output_dir / "checkpoint_0.pth"
    saved = torch.load(file, weights_only=True)
    assert "visual_encoder.patch_embed.backbone.bn1.weight" in saved["model"]
    resumed = run(make_other, tmp_path, "resumed", resume_ckpt_path=str(file))
    # Whatever the backbone was, it comes from the checkpoint
    resumed._model.visual_encoder.patch_embed.backbone.conv_stem.weight.zero_()
    resumed.train()
    own, theirs = resumed._model.state_dict(), whole._model.state_dict()
    assert own.keys() == theirs.keys() and all(own[key].equal(theirs[key]) for key in own)
    (last, other) = (read_metrics(each.output_dir)[-1] for each in (whole, resumed))
    assert last["loss"] == other["loss"] and last["lr"] == other["lr"]


# ---- maps and checkpoints


def test_maps_and_soft_masks_lie_on_the_grid_of_patches(make_other, make_batch):
    model = make_other(SoftMaskPretrain, **HYBRID).train()
    out = model(make_batch(4, 64))
    assert out.keep.shape == (4, 1 + 16) and out.keep.min() < 1
    for score in ("match", "word", "similarity"):
        model.options.soft_mask.score = score
        maps = word_maps(model.eval(), make_batch(4, 64)["image"], CAPTIONS[:4]).maps
        assert maps.shape[2:] == (4, 4) and maps.amax() > 0


def test_a_checkpoint_explains_a_picture_without_any_package(make_other, tmp_path, monkeypatch):
    """On its own image size, or on another."""
    model = make_other(SoftMaskPretrain, **HYBRID)
    options = OmegaConf.to_container(OmegaConf.structured(model.options))
    named = {"arch": "softmask_pretrain", "vit_weights": VIT, "bert_weights": BERT}
    config = {"model": {**options, **named}, "datasets": {}, "run": {"seed": 1}}
    torch.save({"model": model.state_dict(), "config": config}, tmp_path / "a.pth")
    found = explain_image(Image.new("RGB", (90, 64), "red"), "a red circle", tmp_path / "a.pth")
    assert found.cams.shape == (3, 4, 4)
    large = SoftMaskImageTextMatching.from_config(
        OmegaConf.create(
            {
                **HYBRID,
                "pretrained": str(tmp_path / "a.pth"),
                "image_size": 96,
                "tokenizer": "scenes",
                "bert": SMALL["bert"],
                "vit": {**HYBRID["vit"], "depth": 2},
                "embed_dim": 16,
            }
        )
    )
    own, theirs = large.state_dict(), model.state_dict()
    key = "visual_encoder.patch_embed.backbone.blocks.6.0.bn3.running_var"
    assert torch.equal(own[key], theirs[key]) and own["visual_encoder.pos_embed"].shape[1] == 37


# ---- the shipped type


@pytest.fixture(scope="module")
def real():
    for name in PACKAGES:
        try:
            distribution(name)
        except PackageNotFoundError:
            pytest.skip(f"{name} is not installed: pip install 'softmask-plugin[small]'")


@pytest.mark.parametrize("name", [n for n in shipped_configs() if n.endswith("_small")])
def test_images_are_normalised_as_the_backbone_was_trained(name):
    config = OmegaConf.load(shipped_configs()[name])
    trained = timm.create_model(NAME).default_cfg
    for section in config.datasets.values():
        for processor in section.vis_processor.values():
            assert (*processor.mean,) == trained["mean"] and (*processor.std,) == trained["std"]


def test_without_the_packages_the_type_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.metadata.MetadataPathFinder.find_distributions", lambda *_: [])
    with pytest.raises(UserError, match=r"pip install 'softmask-plugin\[small\]'"):
        load_model("softmask_feature_extractor", "small")


@torch.no_grad()
def test_the_real_packages_give_their_own_features(real):
    model, images, texts = load_model_and_preprocess("softmask_feature_extractor", "small", True)
    assert images["eval"].mean == images["train"].mean == (0.5, 0.5, 0.5)
    assert len(model.tokenizer) == 30522 and model.options.sep_token
    whole = timm.create_model(NAME).eval()
    file = torch.load(packaged_file(VIT, ".pth"), weights_only=True)
    whole.load_state_dict(dict(zip(whole.state_dict(), file.values(), strict=True)))
    x = torch.rand(1, 3, 192, 192) * 2 - 1
    last = whole.blocks(whole.act1(whole.bn1(whole.conv_stem(x))))
    own = model.visual_encoder.patch_embed.backbone(x)
    torch.testing.assert_close(own[-1], last, rtol=1e-3, atol=1e-3)

    file = load_file(packaged_file(BERT, ".safetensors"))
    shape = model.text_encoder.shape
    twin = BertModel(
        BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
    ).eval()
    missing = twin.load_state_dict(file, strict=False).missing_keys
    assert {key for key in missing if "position_ids" not in key} == set()
    captions = model.tokenize(["A dog runs on the beach.", "Two children play"])
    own = captions.packing.pad(model.bert.encode(captions.ids, captions.packing).states)
    theirs = twin(captions.ids, attention_mask=captions.mask.long(), output_hidden_states=True)
    theirs = theirs.hidden_states[shape.fusion_layer]
    torch.testing.assert_close(own[captions.mask], theirs[captions.mask], atol=1e-4, rtol=0)


# ---- switches


@torch.no_grad()
def test_the_mean_of_a_texts_tokens_without_padding(make_other, make_batch):
    model = make_other(SoftMaskPretrain, text_pool="mean", text={"shared": False}).eval()
    captions, states = text_states(model)
    rows = zip(states, captions.mask, strict=True)
    expected = torch.stack([own[mask].mean(dim=0) for own, mask in rows])
    expected = torch.nn.functional.normalize(model.text_proj(expected), dim=-1)
    text = model.bert.encode(captions.ids, captions.packing)
    torch.testing.assert_close(model.text_features(model.pooled(text)), expected)
    # What only the device knows is packed with its padding
    loose = text.take(torch.arange(len(CAPTIONS)), trim=False)
    torch.testing.assert_close(model.text_features(model.pooled(loose)), expected)
    images = make_batch(6)["image"]
    for suffix in ("", "_m"):
        found = model.encode(images, captions.ids, captions.packing, suffix)
        torch.testing.assert_close(found.text_feat, expected)


@torch.no_grad()
def test_matching_features_and_retrieval_compare_the_same_means(make_other, make_batch):
    batch = make_batch(6)
    given = {"image": batch["image"], "text_input": batch["text_input"]}
    classes = SoftMaskImageTextMatching, SoftMaskFeatureExtractor, SoftMaskRetrieval
    matching, extractor, retrieval = (make_other(c, text_pool="mean").eval() for c in classes)
    for model in (extractor, retrieval):
        weights.load(model, Checkpoint(Path("matching"), matching.state_dict()), model.options.bert)
    cosines = matching(given, match_head="itc")
    features = extractor.extract_features(given)
    own = features.image_embeds_proj[:, 0] @ features.text_embeds_proj[:, 0].T
    torch.testing.assert_close(own, cosines)
    loader = [{"image": batch["image"]}]
    dataset = type("Gallery", (list,), {"dataset": type("Texts", (), {"text": CAPTIONS})})(loader)
    ranked, _ = Reranker(retrieval, {"k_test": 0}, text_batch=4).scores(dataset)
    torch.testing.assert_close(torch.from_numpy(ranked), cosines)
    captions = matching.tokenize(CAPTIONS)
    text = matching.bert.encode(captions.ids, captions.packing)
    assert not torch.allclose(matching.text_features(text.cls), features.text_embeds_proj[:, 0])


def test_the_first_steps_contrast_alone(make_other, make_batch, monkeypatch):
    """Then comes the step of a model without such a beginning."""
    options = {"local_weight": 0.5, "bert": {"dropout": 0.0, "attention_dropout": 0.0}}
    model = make_other(SoftMaskPretrain, itc_steps=2, **options).train()
    plain = make_other(SoftMaskPretrain, **options).train()
    plain.load_state_dict(model.state_dict())
    batch = {**make_batch(4), "epoch": 0, "num_iters_per_epoch": 9}
    expected, fuse = plain({**batch, "iters": 1}), type(model.bert).fuse
    monkeypatch.setattr(type(model.bert), "fuse", None)
    found = model({**batch, "iters": 1})
    assert found.loss_itm is None and found.loss_mlm is None and found.loss_soft is None
    torch.testing.assert_close(found.loss_itc, expected.loss_itc)
    torch.testing.assert_close(found.loss, found.loss_itc + 0.5 * found.loss_local)
    found.loss.backward()
    assert (
        model.visual_encoder.cls_token.grad.abs().sum() > 0 and model.itm_head.weight.grad is None
    )
    monkeypatch.setattr(type(model.bert), "fuse", fuse)
    plain.load_state_dict(model.state_dict())
    own, other = (each({**batch, "iters": 2}) for each in (model, plain))
    assert own.loss_itm is not None
    torch.testing.assert_close(own.loss, other.loss)


def test_captions_masked_for_mlm_are_encoded_where_it_needs_them(make_other, make_batch):
    """Not while ITC is alone; by the momentum encoder only where it teaches."""
    model = make_other(SoftMaskPretrain, itc_steps=2, alpha=0.4, text={"shared": False})
    counts, encode = [], model.encode_captions
    model.encode_captions = lambda ids, *rest: counts.append(len(ids)) or encode(ids, *rest)
    batch = {**make_batch(4), "epoch": 0, "num_iters_per_epoch": 9}
    model({**batch, "iters": 1})
    model({**batch, "iters": 2})
    model.options.alpha = 0.0
    model({**batch, "iters": 2})
    assert counts == [4, 4, 8, 8, 8, 4]


def test_negatives_turn_from_random_to_hard(make_other):
    """At step 0 each is as likely, halfway in proportion to half the logits, at the end to all."""
    model, size = make_other(SoftMaskPretrain, itm_hard_steps=100), 3
    logits = torch.tensor([[0.0, 0.0, 6.0], [0.0, 0.0, 6.0], [6.0, 0.0, 0.0]])
    similarity = Similarity(logits, logits, torch.eye(size, dtype=torch.bool))
    for step, hardness in ((0, 0.0), (50, 0.5), (100, 1.0), (900, 1.0)):
        drawn = [model.negatives(similarity, Draws(seed, step)) for seed in range(400)]
        image = torch.stack([each[0] for each in drawn]).float()
        text = torch.stack([each[1] for each in drawn]).float()
        likely = torch.tensor(6.0 * hardness).sigmoid()
        for found in (image, text):
            torch.testing.assert_close((found[:, 0] == 2).float().mean(), likely, atol=0.08, rtol=0)
            assert not (found == torch.arange(size)).any()
