"""Checkpoints in: this model's, LAVIS's, other sizes, and files that are none."""

from __future__ import annotations

import logging
from dataclasses import asdict

import pytest
import torch
from lavis.models.vit import interpolate_pos_embed
from omegaconf import OmegaConf
from toy_models import BLIP, TWINS, plain_bert

from softmask_plugin.errors import UserError
from softmask_plugin.files.checkpoint import open_checkpoint
from softmask_plugin.models import (
    SoftMaskBlipRetrieval,
    SoftMaskPretrain,
    SoftMaskRetrieval,
    weights,
)

POSITIONS = "bert.embeddings.position_embeddings.weight"
TYPES = "bert.embeddings.token_type_embeddings.weight"


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saved(path, state):
    torch.save({"model": state, "epoch": 3}, path)
    return str(path)


def test_a_checkpoint_comes_back_whole_and_the_queue_goes_on(make_model, make_batch, tmp_path):
    model, other = make_model(), make_model(seed=1)
    model(make_batch(4))
    other(make_batch(4))
    other(make_batch(4))
    other.load_from_pretrained(saved(tmp_path / "a.pth", model.state_dict()))
    assert equal(model.state_dict(), other.state_dict())
    for each in (model, other):
        torch.manual_seed(0)
        each(make_batch(4))
    assert equal(model.state_dict(), other.state_dict())
    assert int(other.queue_ptr) == 8


@pytest.mark.parametrize("cls", [SoftMaskPretrain, *BLIP])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_file_of_lavis_loads_to_the_last_tensor(make_other, tmp_path, caplog, cls, wrapped):
    twin = TWINS[cls](make_other(cls))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(torch.randn_like(parameter))  # momentum and online differ
    state = twin.state_dict()
    torch.save({"model": state} if wrapped else state, tmp_path / "lavis.pth")
    model = make_other(cls, seed=1)
    with caplog.at_level(logging.INFO):
        model.load_checkpoint(str(tmp_path / "lavis.pth"))
    assert equal(model.state_dict(), state)
    (line,) = [r.getMessage() for r in caplog.records if "loaded" in r.getMessage()]
    left = [key for key in state if key == "idx_queue"]  # numbers of other data's images
    assert f"loaded {len(state) - len(left)} of {len(state)} tensors" in line
    assert line.partition("; ")[2] == "".join(f"left as they were: {key}" for key in left)


def test_an_option_that_no_tensor_shows_is_compared(make_model, tmp_path, caplog):
    bert = {**asdict(make_model().options.bert), "image_cls": False}
    made = make_model(bert=bert)
    section = {**asdict(made.options), "arch": "softmask_pretrain"}
    for name, config in (("a.pth", {"model": section}), ("b.pth", None)):
        torch.save({"model": made.state_dict(), "config": config}, tmp_path / name)
    make_model(bert=bert).load_checkpoint(str(tmp_path / "a.pth"))
    make_model().load_checkpoint(str(tmp_path / "b.pth"))  # it does not say
    assert "trained with" not in caplog.text
    make_model().load_checkpoint(str(tmp_path / "a.pth"))
    assert "trained with model.bert.image_cls=False, and this model has True" in caplog.text


def test_another_vocabulary_of_the_same_size_is_noticed(make_model, tmp_path, caplog):
    model = make_model()
    words = model.tokenizer.convert_ids_to_tokens(range(len(model.tokenizer)))
    for vocabulary, warned in ((words, False), ([*words[:-2], words[-1], words[-2]], True)):
        torch.save({"model": model.state_dict(), "vocabulary": vocabulary}, tmp_path / "a.pth")
        model.load_checkpoint(tmp_path / "a.pth")
        assert ("a.pth was trained with another vocabulary" in caplog.text) is warned


def test_without_momentum_encoders_they_start_from_the_online_ones(make_model, tmp_path):
    donor = make_model()
    online = {k: v for k, v in donor.state_dict().items() if "_m." not in k and "queue" not in k}
    model = make_model(seed=1)
    queue = model.image_queue.clone()
    model.load_from_pretrained(saved(tmp_path / "a.pth", online))
    for name, tensor in model.state_dict().items():
        if "_m." in name:
            assert torch.equal(tensor, online[name.replace("_m.", ".")]), name
    assert torch.equal(model.image_queue, queue)
    # Tied tensors are still tied: a step keeps the MLM head's matrix the embedding
    model.momentum.update(0.5)
    text = model.text_encoder_m
    assert torch.equal(
        text.cls.predictions.decoder.weight, text.bert.embeddings.word_embeddings.weight
    )


def test_another_image_size_gets_its_position_embeddings_interpolated(make_model, tmp_path):
    small = make_model()
    large = make_model(seed=1, image_size=48)
    large.load_from_pretrained(saved(tmp_path / "a.pth", small.state_dict()))
    for name in ("visual_encoder", "visual_encoder_m"):
        ours, theirs = large.get_submodule(name), small.get_submodule(name)
        assert ours.pos_embed.shape == (1, 37, 48)
        torch.testing.assert_close(
            ours.pos_embed, interpolate_pos_embed(theirs.pos_embed.detach(), ours)
        )
        assert torch.equal(ours.pos_embed[:, :1], theirs.pos_embed[:, :1])
    assert large(
        {"image": torch.randn(2, 3, 48, 48), "text_input": ["a star", "a ring"]}
    ).loss.isfinite()


@pytest.mark.parametrize("size", [0, 7, 40])
def test_another_queue_size_starts_its_queue_anew(make_model, make_batch, tmp_path, size, caplog):
    donor = make_model()
    for _ in range(5):
        donor(make_batch(4))
    assert int(donor.queue_ptr) == 20
    model = make_model(seed=1, queue_size=size)
    with caplog.at_level(logging.INFO):
        model.load_from_pretrained(saved(tmp_path / "a.pth", donor.state_dict()))
    assert "other shape: image_queue" in caplog.text
    model(make_batch(4))
    assert int(model.queue_ptr) == (4 if size else 0)
    torch.testing.assert_close(model.image_queue.norm(dim=0), torch.ones(size))


@pytest.mark.parametrize(
    "content",
    [b"", b"hello world", b"{}", b"PK\x03\x04...", b"\x89PNG\r\n" + bytes(99), b"\xff\xfe", b"."],
)
def test_files_of_another_kind_get_one_line(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match="a.pth is no readable checkpoint") as caught:
        open_checkpoint(str(tmp_path / "a.pth"))
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file_gets_one_line(make_model, tmp_path):
    run = tmp_path / "runs" / "newest"
    run.mkdir(parents=True)
    (run / "checkpoint_0.pth").touch()
    hints = {
        tmp_path / "no.pth": "give a file, a run's folder or a URL",
        tmp_path: "of no run that has saved one yet",
        run.parent: f"name one of the runs in it, such as the newest, {run}",
    }
    for path, hint in hints.items():
        with pytest.raises(UserError, match=f"no checkpoint at {path}: .*{hint}"):
            make_model().load_checkpoint(str(path))


def test_encoders_start_from_their_own_pretraining(make_model, tmp_path):
    """And the momentum encoders with them, as ALBEF copies them."""
    donor, other = make_model(image_size=48), make_model(seed=1)
    torch.save(donor.visual_encoder.state_dict(), tmp_path / "vit.pth")
    section = {**OmegaConf.structured(other.options), "vit_weights": str(tmp_path / "vit.pth")}
    model = type(other).from_config(OmegaConf.create(section))
    for name in ("visual_encoder", "visual_encoder_m"):
        encoder = model.get_submodule(name)
        assert torch.equal(encoder.norm.weight, donor.visual_encoder.norm.weight), name
        assert encoder.pos_embed.shape == (1, 17, 48)
    state = model.state_dict()
    for name, tensor in state.items():
        if "_m." in name:
            assert torch.equal(tensor, state[name.replace("_m.", ".")]), name


def test_a_berts_weights_are_read_from_a_folder(make_model, tmp_path):
    model = make_model()
    bert = plain_bert(model.text_encoder.shape)
    bert.save_pretrained(tmp_path)
    cross = model.text_encoder.bert.encoder.layer[3].crossattention.self.key.weight.clone()
    weights.initialise(model, vit=None, bert=str(tmp_path))
    own, theirs = model.text_encoder.state_dict(), bert.state_dict()
    theirs[POSITIONS] += theirs[TYPES][0]
    assert len(own.keys() & theirs.keys()) > 80
    for name in own.keys() & theirs.keys():
        assert torch.equal(own[name], theirs[name]), name
    assert torch.equal(
        model.text_encoder.bert.encoder.layer[3].crossattention.self.key.weight, cross
    )


def test_a_bert_that_cannot_be_had_gets_one_line(make_model, tmp_path):
    with pytest.raises(UserError, match="no BERT .*model.bert_weights") as caught:
        weights.initialise(make_model(), vit=None, bert=str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1


def test_a_vit_file_that_is_none_gets_one_line(make_model, tmp_path):
    torch.save({"weight": torch.ones(3)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="a.pth has no tensor that fits the encoder"):
        weights.initialise(make_model(), vit=str(tmp_path / "a.pth"), bert=None)


@pytest.mark.parametrize("cls", [SoftMaskRetrieval, SoftMaskBlipRetrieval])
def test_images_of_other_data_are_no_positives(make_other, make_batch, tmp_path, cls):
    """Each data set numbers its images from 0."""
    trained = make_other(cls, queue_size=8)
    trained.train()({**make_batch(4), "image_id": torch.arange(4)})
    torch.save(trained.state_dict(), tmp_path / "other.pth")
    model = make_other(cls, queue_size=8, seed=1)
    model.load_checkpoint(str(tmp_path / "other.pth"))
    assert torch.equal(model.image_queue, trained.image_queue)
    assert model.positives(4, torch.arange(4)).sum(dim=1).tolist() == [1, 1, 1, 1]
