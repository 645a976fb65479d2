"""Checkpoints of every bad kind: refused in one line that says which tensor, or loaded and told."""

from __future__ import annotations

import logging
import os
import pickle
import resource
import struct
import zipfile

import pytest
import torch
from forks import forked
from omegaconf import OmegaConf
from toy_models import plain_bert
from transformers import BertConfig, BertForMaskedLM

from softmask_plugin.errors import UserError
from softmask_plugin.files.checkpoint import open_checkpoint
from softmask_plugin.models import weights
from softmask_plugin.models.pretrain import SoftMaskPretrain


class Runs:
    """Unpickled, it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def refused(model, path, message):
    """The file is refused in one line that names it, and the model is left as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        model.load_checkpoint(str(path))
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def saved(path, state):
    torch.save(state, path)
    return path


# ---- files


@pytest.mark.parametrize("kept", [0, 1, 4, 100, 0.5, -500, -1], ids=str)
def test_a_truncated_file(make_model, tmp_path, kept):
    path = saved(tmp_path / "a.pth", make_model().state_dict())
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(make_model(seed=1), path, "is no readable checkpoint")


def test_damaged_bytes_are_refused_or_loaded_but_never_crash(make_model, tmp_path):
    path = saved(tmp_path / "a.pth", make_model().state_dict())
    content, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    model = make_model(seed=1)
    for place in torch.randint(len(content), (30,), generator=generator).tolist():
        damaged = bytearray(content)
        damaged[place : place + 8] = bytes(8)
        path.write_bytes(damaged)
        try:
            model.load_checkpoint(str(path))
        except UserError as error:
            assert "a.pth" in str(error)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    "content",
    [
        *({}, [], [1], None, 3, "text", {"model": {}}, {"model": None}, {"model": 3}),
        *({1: torch.ones(2)}, torch.ones(3), {"weight": torch.ones(3)}, {"temp": torch.ones(7)}),
    ],
    ids=repr,
)
def test_a_file_without_tensors_of_a_model(make_model, tmp_path, content):
    path = saved(tmp_path / "a.pth", content)
    refused(make_model(), path, "has no tensor that fits this model: is it a checkpoint")


# ---- tensors


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["vision_proj.weight", "text_encoder.bert.embeddings.LayerNorm.bias", "image_queue"]
)
def test_a_weight_that_is_not_finite_is_refused_by_name(make_model, tmp_path, name, value):
    state = make_model().state_dict()
    state[name] = state[name].clone()
    state[name].view(-1)[-1] = value
    refused(
        make_model(seed=1),
        saved(tmp_path / "a.pth", {"model": state}),
        f"'{name}' holds NaN or infinite values: take an earlier checkpoint",
    )


ODD = {
    "sparse": lambda tensor: tensor.to_sparse(),
    "on no device": lambda tensor: tensor.to("meta"),
    "complex": lambda tensor: tensor * 1j,
    "of 8 bits": lambda tensor: tensor.to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_tensor_of_another_kind_is_refused_by_name(make_model, tmp_path, kind):
    state = make_model().state_dict()
    state["vision_proj.bias"] = ODD[kind](state["vision_proj.bias"])
    path = saved(tmp_path / "a.pth", state)
    refused(make_model(seed=1), path, "'vision_proj.bias' is no plain tensor of real numbers")


@pytest.mark.parametrize(
    "embedding",
    [torch.ones(3), torch.ones(0), torch.ones(1, 8, 48), torch.ones(1, 5, 48, dtype=torch.long)],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.dtype}",
)
def test_position_embeddings_of_no_image(make_model, tmp_path, embedding):
    state = {**make_model().state_dict(), "visual_encoder.pos_embed": embedding}
    path = saved(tmp_path / "a.pth", state)
    refused(make_model(seed=1), path, r"'visual_encoder.pos_embed' of shape \(.* no square image")


@pytest.mark.parametrize("pointer", [-1, 24, 10**9])
def test_a_position_outside_of_the_queue(make_model, tmp_path, pointer):
    state = {**make_model().state_dict(), "queue_ptr": torch.tensor([pointer])}
    path = saved(tmp_path / "a.pth", state)
    refused(make_model(seed=1), path, f"'queue_ptr' is {pointer}, outside of its queue")


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("text_encoder.bert.embeddings.word_embeddings.weight", lambda tensor: tensor[:-1]),
        ("text_encoder.bert.embeddings.position_embeddings.weight", lambda tensor: tensor[1:]),
        ("visual_encoder.blocks.1.mlp.fc1.weight", lambda tensor: None),
        ("text_encoder.bert.encoder.layer.5.output.dense.weight", lambda _: torch.ones(32, 64)),
        ("visual_encoder.blocks.2.mlp.fc1.weight", lambda _: torch.ones(192, 48)),
    ],
    ids=["words", "positions", "missing", "another layer", "another block"],
)
def test_encoders_that_do_not_fit(make_model, tmp_path, key, change):
    state = make_model().state_dict()
    if (changed := change(state.pop(key, None))) is not None:
        state[key] = changed
    path = saved(tmp_path / "a.pth", state)
    refused(make_model(seed=1), path, f"does not fit the model's encoders: '{key}' is ")


def test_other_shapes_are_left_out_and_warned_of(make_model, tmp_path, caplog):
    state = make_model().state_dict()
    state["vision_proj.weight"] = torch.ones(3, 3)
    model = make_model(seed=1)
    before = model.vision_proj.weight.clone()
    model.load_checkpoint(str(saved(tmp_path / "a.pth", state)))
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    loaded = f"loaded {len(state) - 1} of {len(state)} tensors"
    assert loaded in record.getMessage() and "; other shape: vision_proj" in record.getMessage()
    assert torch.equal(model.vision_proj.weight, before)


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: key.replace("encoder.", "encoder._orig_mod.", 1),
    ],
    ids=["DistributedDataParallel", "torch.compile", "both", "compiled parts"],
)
def test_names_that_wrappers_changed(make_model, tmp_path, rename):
    state = make_model().state_dict()
    path = saved(tmp_path / "a.pth", {"model": {rename(key): v for key, v in state.items()}})
    model = make_model(seed=1)
    model.load_checkpoint(str(path))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# ---- bombs


def memory_taken(function, *arguments):
    """Call a function in a fork; the message it is refused with, and what it took at most, MiB."""

    def measured():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        limit = before * 2**10 + 2**34  # of the address space, to spare the machine if it fails
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            function(*arguments)
        except UserError as error:
            print(error)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 2**10)

    done = forked(measured)
    message, taken = done.stdout.splitlines()
    return message, int(taken)


def laughs(levels=9):
    """Ten of ten of ten ... of a word, which a pickle refers to and does not repeat."""
    return [laughs(levels - 1)] * 10 if levels else "ha"


def references(path, text, beside=False):
    """Thirty keys, each of which repeats the next one."""
    config = {"model": {f"k{i}": text(f"${{model.k{i + 1}}}") for i in range(30)} | {"k30": "ha"}}
    torch.save({"model": {}, **({} if beside else {"config": config})}, path)
    if beside:
        OmegaConf.save(config, path.with_name("config.yaml"))


def circling(path):
    """A list that holds itself many times."""
    content: list = []
    content.extend([content] * 20_000)
    torch.save({"model": {}, "x": content}, path)


def compressed(path):
    torch.save({"model": {"temp": torch.zeros(2**24)}}, path)
    with zipfile.ZipFile(path) as archive:
        members = [(each, archive.read(each)) for each in archive.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in members:
            archive.writestr(*member)


def two_ends(path):
    """Compressed, with the first bytes of an end after the end, which Python takes for one."""
    compressed(path)
    path.write_bytes(path.read_bytes() + b"PK\5\6")


def two_lists(path):
    """Compressed, with a list of members for torch and an empty one for Python."""
    compressed(path)
    content = path.read_bytes()
    end = content.rfind(b"PK\5\6")
    count, size, start = struct.unpack("<10xH2L2x", content[end:])
    large = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    path.write_bytes(content[:end] + large + bytes(56) + locator + b"PK\5\6" + bytes(18))


def safetensors(path):
    header = b'{"temp": {"dtype": "F32", "shape": [1000000000], "data_offsets": [0, 4000000000]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header)


ONE = torch.zeros(1)
BOMBS = {
    "a.safetensors": safetensors,
    "compressed.pth": compressed,
    "two ends.pth": two_ends,
    "two lists.pth": two_lists,
    "expanded.pth": lambda path: torch.save({"model": {"temp": ONE.expand(10**9)}}, path),
    "of old.pth": lambda path: torch.save(
        {"model": {"temp": ONE.expand(10**9)}}, path, _use_new_zipfile_serialization=False
    ),
    "repeated.pth": lambda path: torch.save({"optimizer": [torch.ones(10**5)] * 10**4}, path),
    "laughing.pth": lambda path: torch.save({"model": {}, "config": {"model": laughs()}}, path),
    "referring.pth": lambda path: references(path, lambda key: key * 2),
    "listing.pth": lambda path: references(path, lambda key: [key] * 2),
    "config.yaml": lambda path: references(path.with_name("a.pth"), lambda key: key * 2, True),
    "circling.pth": circling,
    "wordy.pth": lambda path: torch.save({"vocabulary": ["a" * 10**5] * 10**4}, path),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_that_unfolds_to_far_more_is_refused_before_it_does(make_model, tmp_path, name):
    path = tmp_path / name
    BOMBS[name](path)
    opened = tmp_path / "a.pth" if name == "config.yaml" else path
    message, taken = memory_taken(make_model().load_checkpoint, str(opened))
    assert str(path) in message and ("fill the memory" in message or "no readable" in message)
    assert path.stat().st_size < 2**21 and taken < 50


@pytest.mark.parametrize(
    "change",
    [
        {"vit": {"width": 3 * 10**8}},
        {"vit": {"depth": 10**9}},
        {"vit": {"patch_size": 10**6}, "image_size": 10**6},
        {"bert": {"vocab_size": 10**9}},
        {"bert": {"layers": 10**9}},
        {"bert": {"max_positions": 10**9}},
        {"bert": {"intermediate": 10**9}},
        {"queue_size": 10**9},
        {"embed_dim": 10**9},
    ],
    ids=str,
)
def test_a_model_far_larger_than_its_checkpoint_is_not_built(make_model, tmp_path, change):
    """As its configuration, which may come with it, would have it."""
    model = make_model()
    path = saved(tmp_path / "a.pth", {"model": model.state_dict()})
    section = OmegaConf.merge(
        OmegaConf.structured(model.options), change, {"pretrained": str(path)}
    )
    message, taken = memory_taken(SoftMaskPretrain.from_config, section)
    assert f"{path} does not fit the model, which would be far larger: set model.vit" in message
    assert taken < 400


def test_a_trusted_file_may_be_of_any_size(make_model, tmp_path, monkeypatch):
    model, path = make_model(), tmp_path / "a.pth"
    saved(path, {"model": model.state_dict(), "optimizer": [torch.ones(10**5)] * 10**4})
    monkeypatch.setattr(weights, "_SMALL", 10**9)  # as if the model were so much larger
    section = {**OmegaConf.structured(model.options), "pretrained": str(path)}
    with pytest.raises(UserError, match="only for a file that you trust: model.trust_checkpoint"):
        SoftMaskPretrain.from_config(OmegaConf.create(section))
    SoftMaskPretrain.from_config(OmegaConf.create({**section, "trust_checkpoint": True}))


@pytest.mark.parametrize("beside", [False, True], ids=["within", "beside"])
def test_a_configuration_of_too_many_levels(make_model, tmp_path, beside):
    content = tmp_path / "config.yaml" if beside else tmp_path / "a.pth"
    config: dict = {}
    for _ in range(400):
        config = {"a": config}
    saved(tmp_path / "a.pth", {"model": {}, **({} if beside else {"config": {"model": config}})})
    if beside:
        content.write_text("model: " + "[" * 400 + "]" * 400)
    with pytest.raises(UserError, match=f"{content} has too many levels"):
        make_model().load_checkpoint(str(tmp_path / "a.pth"))


# ---- code


@pytest.fixture(params=["", "1"], ids=["as a rule", "torch told to run code"])
def anything_goes(request, monkeypatch):
    """An environment in which torch reads any object, unless asked not to."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", request.param)


def evil(path, marker, how):
    """A file that makes the folder ``marker`` when its objects are unpickled."""
    if how == "zip":
        torch.save({"model": {"temp": torch.ones(())}, "config": Runs(marker)}, path)
    elif how == "legacy":
        torch.save({"a": Runs(marker)}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps({"model": Runs(marker)}, protocol=how))
    return str(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.usefixtures("anything_goes")
@pytest.mark.parametrize("how", ["zip", "legacy", 2, pickle.DEFAULT_PROTOCOL])
@pytest.mark.parametrize("key", ["pretrained", "finetuned", "vit_weights", "bert_weights"])
def test_no_weights_of_a_yaml_run_code(make_model, tmp_path, key, how):
    marker, folder = tmp_path / "ran", tmp_path / "bert"
    folder.mkdir()
    name = "pytorch_model.bin" if key == "bert_weights" else "a.pth"
    file = evil(folder / name, marker, how)
    BertConfig().save_pretrained(folder)
    section = {**OmegaConf.structured(make_model().options)}
    section[key] = str(folder) if key == "bert_weights" else file
    section["load_finetuned"] = key == "finetuned"
    with pytest.raises(UserError, match=f"{name} is no readable checkpoint .*run code") as caught:
        SoftMaskPretrain.from_config(OmegaConf.create(section))
    assert not marker.exists() and "\n" not in str(caught.value)


def test_code_runs_where_the_yaml_trusts_the_file(make_model, tmp_path):
    """So the marker above would be seen."""
    marker = tmp_path / "ran"
    file = evil(tmp_path / "a.pth", marker, "zip")
    section = {**OmegaConf.structured(make_model().options), "pretrained": file}
    with pytest.raises(UserError, match="does not fit the model's encoders"):
        SoftMaskPretrain.from_config(OmegaConf.create({**section, "trust_checkpoint": True}))
    assert marker.exists()


# ---- a BERT's own file


def bert_of(model, folder) -> BertForMaskedLM:
    """A BERT of the model's shape, whose description lies in the folder."""
    bert = plain_bert(model.text_encoder.shape)
    bert.config.save_pretrained(folder)
    return bert


def folded(state):
    """A BERT's tensors, its first token type added to the positions."""
    positions = "bert.embeddings.position_embeddings.weight"
    types = state["bert.embeddings.token_type_embeddings.weight"]
    return {**state, positions: state[positions] + types[0]}


@pytest.mark.parametrize("release", ["first", "without its head", "now"])
def test_the_keys_of_every_release_of_bert(make_model, tmp_path, release):
    model = make_model()
    bert = bert_of(model, tmp_path)
    state = bert.state_dict()
    if release == "first":
        names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, old in names.items():
            state = {key.replace(new, old): tensor for key, tensor in state.items()}
    elif release == "without its head":
        state = {key.removeprefix("bert."): t for key, t in state.items() if "cls." not in key}
    torch.save(state, tmp_path / "pytorch_model.bin")
    weights.initialise(model, vit=None, bert=str(tmp_path))
    own, theirs = model.text_encoder.state_dict(), folded(bert.state_dict())
    shared = [name for name in own.keys() & theirs.keys() if release == "now" or "cls" not in name]
    assert len(shared) > 80
    assert all(torch.equal(own[name], theirs[name]) for name in shared)


def test_a_bert_in_safetensors(make_model, tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    model = make_model()
    state = {key: tensor.clone() for key, tensor in bert_of(model, tmp_path).state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    weights.initialise(model, vit=None, bert=str(tmp_path))
    own, theirs = model.text_encoder.state_dict(), folded(state)
    assert all(torch.equal(own[name], theirs[name]) for name in own.keys() & theirs.keys())
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="model.safetensors is no readable checkpoint"):
        weights.initialise(model, vit=None, bert=str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\x03\x04", "nan"], ids=repr)
def test_a_damaged_bert_gets_one_line(make_model, tmp_path, content):
    model = make_model()
    bert = bert_of(model, tmp_path)
    if content == "nan":
        with torch.no_grad():
            bert.bert.embeddings.LayerNorm.bias.fill_(float("nan"))
        torch.save(bert.state_dict(), tmp_path / "pytorch_model.bin")
        message = "'bert.embeddings.LayerNorm.bias' holds NaN"
    else:
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        message = "pytorch_model.bin is no readable checkpoint"
    with pytest.raises(UserError, match=message) as caught:
        weights.initialise(model, vit=None, bert=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_vit_that_is_not_finite_is_refused_by_name(make_model, tmp_path):
    state = make_model().visual_encoder.state_dict()
    state["norm.weight"] = state["norm.weight"] + float("inf")
    with pytest.raises(UserError, match=r"vit.pth: 'norm.weight' holds NaN or infinite"):
        weights.initialise(make_model(), str(saved(tmp_path / "vit.pth", state)), None)


def test_finetuned_weights_that_are_not_named(make_model):
    section = {**OmegaConf.structured(make_model().options), "load_finetuned": True}
    with pytest.raises(UserError, match="load_finetuned is true, but model.finetuned names no"):
        SoftMaskPretrain.from_config(OmegaConf.create(section))


def test_a_token_may_be_what_ends_a_line_elsewhere(tmp_path):
    words = ["[PAD]", "\u2028", "a\x85b"]
    torch.save({"model": {"temp": torch.ones(())}}, tmp_path / "checkpoint_best.pth")
    (tmp_path / "vocab.txt").write_text("\n".join([*words, ""]), "utf-8")
    assert open_checkpoint(tmp_path).vocabulary == words
