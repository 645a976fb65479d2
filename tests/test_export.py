"""``softmask export``: what is in the folder, and that it gives the same numbers."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import ModelCard, constants
from lavis.models import load_model
from omegaconf import OmegaConf
from safetensors import safe_open
from toy_models import CAPTIONS, SMALL, plain_bert

from softmask_plugin import cli, launch
from softmask_plugin.errors import UserError
from softmask_plugin.explain import load_trained
from softmask_plugin.export import export
from softmask_plugin.models import SoftMaskPretrain, SoftMaskRetrieval
from softmask_plugin.models.base import SoftMaskBase
from softmask_plugin.report import read_metrics
from softmask_plugin.tokenization import Captions

MEAN = [0.1, 0.2, 0.3]
SECRET = "/home/me/photos"


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(seed=3).eval()


@pytest.fixture
def checkpoint(model, tmp_path):
    """A checkpoint of that model, as a run writes it."""
    section = {**SMALL, "arch": "softmask_pretrain", "model_type": "tiny", "sep_token": True}
    processor = {"eval": {"name": "softmask_image_eval", "image_size": 32, "mean": MEAN}}
    own = {"images": SECRET, "vis_processor": processor, "labels": ["cat", "dog"]}
    data = {"captions_folder": own}
    words = model.tokenizer.convert_ids_to_tokens(range(len(model.tokenizer)))
    content = {
        "model": model.state_dict(),
        "optimizer": {},
        "vocabulary": words,
        "config": {
            "model": {**section, "pretrained": f"{SECRET}.pth", "vit_weights": SECRET},
            "datasets": data,
            "run": {"output_dir": SECRET},
        },
    }
    torch.save(content, tmp_path / "mine.pth")
    return tmp_path / "mine.pth"


@torch.no_grad()
def scores(model: SoftMaskPretrain) -> list[torch.Tensor]:
    """Features and matching logits of three pairs."""
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tokens: Captions = model.tokenize(CAPTIONS[:3])
    states = model.visual_encoder(images)
    text = model.bert.encode(tokens.ids, tokens.packing)
    fused = model.bert.fuse(text, model.bert.remember(states))
    return [
        model.image_features(states[:, 0]),
        model.text_features(model.pooled(text)),
        model.match(fused.cls),
    ]


def same(one, other) -> bool:
    return all(map(torch.equal, one, other))


def test_a_folder_gives_the_same_scores_to_the_bit(model, checkpoint, tmp_path):
    expected = scores(model)
    folder = export(checkpoint, tmp_path / "shared" / "model", license="apache-2.0")
    checkpoint.unlink()
    for loaded in (
        SoftMaskPretrain.from_pretrained(str(folder)),
        SoftMaskBase.from_pretrained(str(folder)),
        load_model("softmask_pretrain", str(folder)),
        load_trained(folder).model,
    ):
        assert isinstance(loaded, SoftMaskPretrain) and not loaded.training
        assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
        assert same(scores(loaded), expected)
    assert load_trained(folder).image_processor.mean == tuple(MEAN)
    section = OmegaConf.load(folder / "config.yaml").datasets.captions_folder
    assert section.labels == ["cat", "dog"]  # which class has which number
    momentum = loaded.visual_encoder_m.state_dict()  # starts anew from the online encoder
    assert same(momentum.values(), loaded.visual_encoder.state_dict().values())
    files = sorted(folder.iterdir())
    names = [path.name for path in files]
    assert names == ["README.md", "config.yaml", "model.safetensors", "vocab.txt"]
    assert len({path.stat().st_mode for path in files}) == 1  # whoever reads one reads all
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert not {key for key in [*file.keys()] if "_m." in key or "queue" in key}
    for text in (folder / "config.yaml", folder / "README.md"):
        assert SECRET not in text.read_text()
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0" and "captions_folder" in card.text


def test_an_export_on_the_hub_is_read_from_its_cache(model, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://localhost:1")
    kept = tmp_path / "hub" / "models--me--scenes"
    export(checkpoint, kept / "snapshots" / "abc")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    for loaded in (
        SoftMaskPretrain.from_pretrained("me/scenes"),
        load_trained("hub:me/scenes").model,
    ):
        assert same(scores(loaded), scores(model))
    (kept / "snapshots" / "abc" / "vocab.txt").unlink()
    for name in ("me/scenes", "me/others"):
        with pytest.raises(
            UserError, match=f"no model '{name}': it is neither .*cannot be reached"
        ):
            SoftMaskPretrain.from_pretrained(name)


def test_lavis_own_class_loads_its_layout(checkpoint, model, make_model, albef_twin, tmp_path):
    folder = export(checkpoint, tmp_path / "out", layout="lavis")
    twin = albef_twin(make_model(seed=4))
    message = twin.load_checkpoint(str(folder / "model.pth"))
    assert message.missing_keys == message.unexpected_keys == []
    own = model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in twin.state_dict().items())


@torch.no_grad()
def test_albef_layout_has_token_types_that_add_nothing(checkpoint, model, tmp_path):
    folder = export(checkpoint, tmp_path / "out", layout="albef")
    state = torch.load(folder / "model.pth", weights_only=True)["model"]
    bert = plain_bert(model.text_encoder.shape).eval()
    prefix = "text_encoder."
    given = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    assert bert.load_state_dict(given, strict=False).missing_keys == []
    assert "text_encoder_m.bert.embeddings.token_type_embeddings.weight" in state
    tokens = model.tokenize(CAPTIONS[:1])
    own = model.bert.encode(tokens.ids, tokens.packing).states
    theirs = bert.bert(tokens.ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(own, theirs[model.bert.shape.fusion_layer][0], atol=1e-5, rtol=0)
    assert same(scores(SoftMaskPretrain.from_pretrained(str(folder / "model.pth"))), scores(model))
    assert "trained with [SEP]" in (folder / "README.md").read_text()


@pytest.mark.parametrize(("steps", "validated"), [(2, ["val"]), (3, [])])  # an epoch has two
def test_a_run_is_exported_with_its_metrics(tmp_path, capsys, steps, validated):
    options = [
        *(f"run.output_dir={tmp_path / 'runs'}", f"run.max_steps={steps}"),
        *("run.max_epoch=2", f"run.valid_splits={validated}", "run.test_splits=[test]"),
        *("run.batch_size_train=4", "run.batch_size_eval=4", "run.num_workers=0", "run.k_test=4"),
        *(f"datasets.scenes_retrieval.num.{split}=8" for split in ("train", "val", "test")),
    ]
    trained, results = launch.run("scenes/train/retrieval_tiny", options)
    folder = tmp_path / "out"
    assert cli.main(["export", str(trained.output_dir), str(folder)]) == 0
    assert capsys.readouterr().out.endswith(f"Model: {folder}\n")
    card = (folder / "README.md").read_text()
    assert "license:" not in card and "License:\nnone given." in card
    for split in (*validated, "test"):
        (found,) = (each for each in read_metrics(trained.output_dir) if each["split"] == split)
        assert f"| {split} | txt_r1 | {found['txt_r1']:.4g} |" in card
    model = SoftMaskRetrieval.from_pretrained(str(folder))
    own = trained.unwrap_dist_model(trained.model).state_dict()
    kept = {k: v for k, v in model.state_dict().items() if "_m." not in k and "queue" not in k}
    assert all(torch.equal(value, own[key]) for key, value in kept.items())
    evaluate = ["run.test_splits=[test]", f"model.pretrained={folder}", *options]
    _, again = launch.run("scenes/eval/retrieval_tiny", evaluate, evaluate=True)
    assert again["test"] == results["test"]


def test_what_cannot_be_exported_or_read_back_is_one_line(checkpoint, tmp_path):
    with pytest.raises(UserError, match="has files already: name a new folder"):
        export(checkpoint, checkpoint.parent)
    content = torch.load(checkpoint)
    torch.save({"model": content["model"]}, tmp_path / "plain.pth")
    with pytest.raises(UserError, match="plain.pth does not say which model"):
        export(tmp_path / "plain.pth", tmp_path / "out")
    content["model"]["temp"] = torch.tensor(torch.nan)
    torch.save(content, tmp_path / "nan.pth")
    with pytest.raises(UserError, match="nan.pth: 'temp' holds NaN"):
        export(tmp_path / "nan.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shared = export(checkpoint, tmp_path / "shared")
    with pytest.raises(UserError, match="shared does not say how it was trained: name a YAML"):
        launch.load_config(shared, evaluate=True)
    with pytest.raises(UserError, match="is a SoftMaskPretrain, and SoftMaskRetrieval was asked"):
        SoftMaskRetrieval.from_pretrained(str(checkpoint))
    with pytest.raises(UserError, match="'tyni' of SoftMaskPretrain, and no such file or folder"):
        SoftMaskPretrain.from_pretrained("tyni")
