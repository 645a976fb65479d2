"""Files of ALBEF's own code: token types, and captions without [SEP].

The text side is compared with transformers' BERT, given type ids of 0.
"""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from omegaconf import OmegaConf
from toy_models import CAPTIONS, EVERY_MODEL, plain_bert
from toys import build

from softmask_plugin.config.options import read_options
from softmask_plugin.errors import UserError
from softmask_plugin.files.checkpoint import open_checkpoint
from softmask_plugin.models import (
    SoftMaskClassification,
    SoftMaskNlvr,
    SoftMaskPretrain,
    SoftMaskVqa,
    weights,
)
from softmask_plugin.runners.resume import load_run

# VQA's decoder takes over layers that attend to images: both encoders must be as wide
SHAPE = {"vit": {"patch_size": 8, "width": 32, "depth": 2, "heads": 2}}
TYPES = "embeddings.token_type_embeddings.weight"


@pytest.fixture
def bert(make_model):
    """A BERT in the shape of the models' text encoder whose token types are far from zero."""
    torch.manual_seed(7)
    made = plain_bert(make_model().text_encoder.shape).eval()
    with torch.no_grad():
        made.get_parameter(f"bert.{TYPES}").normal_()
    return made


@pytest.fixture
def original(make_model, bert, tmp_path):
    """A pre-trained checkpoint in the layout of ALBEF.pth, with that BERT in it."""
    state = make_model(seed=1, **SHAPE).state_dict()
    for encoder in ("text_encoder", "text_encoder_m"):
        state |= {f"{encoder}.{key}": tensor for key, tensor in bert.state_dict().items()}
    torch.save({"model": state}, tmp_path / "ALBEF.pth")
    return str(tmp_path / "ALBEF.pth")


def from_file(make_other, cls, path, **changes):
    """Build a model from a checkpoint, as a YAML file does."""
    section = {**asdict(make_other(cls, **SHAPE).options), "sep_token": None, "pretrained": path}
    return cls.from_config(OmegaConf.create({**section, **changes})).eval()


def original_ids(model, caption):
    """ALBEF's own tokens: [CLS], then the caption's."""
    tokenizer = model.tokenizer
    return [tokenizer.cls_token_id, *tokenizer(caption, add_special_tokens=False)["input_ids"]]


def reference(bert, ids):
    """Hidden states by layer, from transformers, of one caption's ids."""
    ids = torch.tensor([ids])
    found = bert.bert(ids, token_type_ids=torch.zeros_like(ids), output_hidden_states=True)
    return found.hidden_states


@torch.no_grad()
@pytest.mark.parametrize("cls", EVERY_MODEL)
def test_text_states_are_those_of_bert_with_its_token_types(make_other, original, bert, cls):
    model = from_file(make_other, cls, original)
    captions = model.tokenize(CAPTIONS)
    states = captions.packing.pad(model.bert.encode(captions.ids, captions.packing).states)
    for caption, own, mask in zip(CAPTIONS, states, captions.mask, strict=True):
        theirs = reference(bert, original_ids(model, caption))[model.bert.shape.fusion_layer][0]
        torch.testing.assert_close(own[mask], theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_momentum_decoder_and_word_head_too(make_other, original, bert):
    model, vqa = (from_file(make_other, c, original) for c in (SoftMaskPretrain, SoftMaskVqa))
    ids = original_ids(model, CAPTIONS[0])
    embedded, *_, last = reference(bert, ids)
    tokens = model.tokenize(CAPTIONS[:1])
    for each in (model.bert, model.text_encoder_m.bert, vqa.text_decoder.bert):
        own = each.embeddings(tokens.ids, tokens.packing)
        torch.testing.assert_close(own, embedded[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.text_encoder(last), bert.cls(last), atol=1e-5, rtol=0)


@torch.no_grad()
def test_bert_weights_keep_their_token_types(make_model, bert, tmp_path):
    bert.save_pretrained(tmp_path)
    model = make_model().eval()
    weights.initialise(model, vit=None, bert=str(tmp_path))
    tokens = model.tokenize(CAPTIONS[:1])
    assert tokens.ids[0, -1] == model.tokenizer.sep_token_id  # as BERT was trained
    own = model.bert.encode(tokens.ids, tokens.packing).states
    theirs = reference(bert, tokens.ids[0].tolist())[model.bert.shape.fusion_layer][0]
    torch.testing.assert_close(own, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("types", [torch.zeros(0, 32), torch.zeros(2, 7), torch.tensor(1.0)])
def test_token_types_of_another_shape_get_one_line(make_model, original, tmp_path, types):
    state = open_checkpoint(original).state
    state[f"text_encoder.bert.{TYPES}"] = types
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match="a.pth: 'text_encoder.bert.*token_type.* does not fit"):
        make_model(**SHAPE).load_checkpoint(str(tmp_path / "a.pth"))


@pytest.mark.parametrize(("cls", "kind"), [(SoftMaskClassification, "ve"), (SoftMaskNlvr, "nlvr")])
def test_statements_of_entailment_and_nlvr2_are_not_cut(cls, kind):
    section = OmegaConf.load(cls.default_config_path(kind)).model
    options = read_options(cls.OPTIONS, section)
    assert options.max_txt_len == options.bert.max_positions == 512


def ends(model):
    """Last tokens of a short and of a long caption."""
    captions = model.tokenize(["a star", "red " * 50])
    last = captions.ids[[0, 1], captions.mask.sum(dim=1) - 1]
    return model.tokenizer.convert_ids_to_tokens(last.tolist())


def with_config(path, name, **section):
    """A copy of a checkpoint that records a configuration."""
    content = torch.load(path)
    torch.save({**content, "config": {"model": {"arch": "softmask_pretrain", **section}}}, name)
    return str(name)


def test_only_files_of_albefs_own_code_leave_sep_out(make_other, original, tmp_path):
    model = from_file(make_other, SoftMaskPretrain, original)
    assert model.options.sep_token is False and ends(model) == ["star", "red"]
    assert model.tokenize(["a star", "red " * 50]).ids.shape == (2, model.options.max_txt_len)
    torch.save(model.state_dict(), tmp_path / "lavis.pth")
    model.load_checkpoint(str(tmp_path / "lavis.pth"))
    assert model.options.sep_token is True and ends(model) == ["[SEP]", "[SEP]"]


def test_by_hand_comes_before_the_record_which_comes_before_the_layout(
    make_other, original, tmp_path
):
    recorded = with_config(original, tmp_path / "a.pth", sep_token=True)
    unknown = with_config(original, tmp_path / "b.pth", sep_token=None)
    for path, by_hand, expected in [
        (original, True, True),
        (recorded, False, False),
        (recorded, None, True),
        (unknown, None, False),
    ]:
        model = from_file(make_other, SoftMaskPretrain, path, sep_token=by_hand)
        assert model.options.sep_token is expected, (path, by_hand)
        assert ends(model) == (["[SEP]", "[SEP]"] if expected else ["star", "red"])


def save(runner):
    """Save a checkpoint of a run's start."""
    with runner.log.progress(0, 1):
        runner._save_checkpoint(0)


def test_a_run_records_it_and_resumes_with_it_only(make_other, make_model, original, tmp_path):
    model = from_file(make_other, SoftMaskPretrain, original)
    runner = build(tmp_path / "run", model=model)
    save(runner)
    saved = runner.output_dir / "checkpoint_0.pth"
    again = from_file(make_other, SoftMaskPretrain, str(saved))
    assert again.options.sep_token is False and ends(again) == ["star", "red"]
    load_run(saved, again, torch.device("cpu"))
    with pytest.raises(UserError, match=r"without \[SEP\].* set model.sep_token=false"):
        load_run(saved, make_model(**SHAPE), torch.device("cpu"))


def test_a_run_of_before_goes_on_with_sep(make_model, tmp_path):
    """It recorded nothing, and always had [SEP]."""
    runner = build(tmp_path, model=make_model(), resume_ckpt_path="auto")
    runner.resolved_config["model"] = {"arch": "softmask_pretrain"}
    save(runner)
    again = build(tmp_path, model=make_model(seed=1), resume_ckpt_path="auto")
    again.resolved_config["model"]["arch"] = "softmask_pretrain"
    again._resume()
    assert torch.equal(
        again.model.bert.embeddings.LayerNorm.weight, runner.model.bert.embeddings.LayerNorm.weight
    )
    without = build(tmp_path, model=make_model(sep_token=False), resume_ckpt_path="auto")
    with pytest.raises(UserError, match="set model.sep_token=true"):
        without._resume()


def test_answers_end_with_sep_as_in_albef(make_other, original):
    vqa = from_file(make_other, SoftMaskVqa, original)
    assert ends(vqa) == ["star", "red"]
    assert vqa.answer_tokenizer.tokenize(["star"]).ids[0, -1] == vqa.tokenizer.sep_token_id
