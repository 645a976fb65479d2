"""Bad captions and caption files of every kind, from the file to the losses."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image
from robustness.test_bad_configs import refusal
from toy_folders import write
from transformers import BertTokenizerFast

from softmask_plugin import cli
from softmask_plugin.datasets.tables.captions import parse_captions
from softmask_plugin.errors import UserError
from softmask_plugin.models import SoftMaskRetrieval, SoftMaskVqa
from softmask_plugin.nn.sampling import Draws
from softmask_plugin.processors import CaptionProcessor
from softmask_plugin.tokenization import CaptionTokenizer
from softmask_plugin.vocabulary import build_tokenizer

LONG = "a red ring " * 9_091  # 100,001 characters
CJK = "桌子上的红色圆圈"
SPECIAL = "a [MASK] [CLS] [SEP] [PAD] [UNK] ring"

# Captions and how they are parsed; None: they are skipped
CAPTIONS = {
    "empty": ("", None),
    "spaces": ("  \t ", None),
    "punctuation": ("?!... --", None),
    "None": (None, None),
    "NaN": (float("nan"), None),
    "true": (True, None),
    "object": ({"raw": "a"}, None),
    "number": (7, "7"),
    "fraction": (2.5, "2.5"),
    "100,000 characters": (LONG, LONG.strip()),
    "one long word": ("x" * 100_000, "x" * 100_000),
    "CJK": (CJK, CJK),
    "special tokens": (SPECIAL, SPECIAL),
    "line breaks": ("a red\r\nring", "a red\r\nring"),
    "right to left": ("חתול שחור", "חתול שחור"),
    "emoji": ("a 🐈 cat", "a 🐈 cat"),
    "half a surrogate pair": ("a \ud83d cat", "a ? cat"),
    "zero byte": ("a\0cat", "a\0cat"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer(build_tokenizer("scenes"), max_length=30)


# ---- one caption


@pytest.mark.parametrize("kind", CAPTIONS)
def test_a_caption_is_parsed_or_skipped_and_counted(tmp_path, caplog, kind):
    caption, expected = CAPTIONS[kind]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"image": "a.jpg", "caption": ["fine", caption]}]))
    (item,) = parse_captions(path)
    assert item["caption"] == (["fine"] if expected is None else ["fine", expected])
    told = "entry 1: 1 unusable captions in ['fine', " in caplog.text
    assert told == (expected is None)


@pytest.mark.parametrize("kind", CAPTIONS)
def test_what_a_file_lets_through_gives_finite_losses(make_model, make_batch, kind):
    """Processed or not, and the empty text that may be left of it."""
    given = CAPTIONS[kind][1] or ""
    texts = [given, CaptionProcessor()(given), ""]
    model = make_model().train()
    out = model({**make_batch(3), "text_input": texts})
    out["loss"].backward()
    assert out["loss"].isfinite() and out.word[2] == -1
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_100_000_characters_fit_into_a_table(tmp_path, suffix):
    with (tmp_path / f"a.{suffix}").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t" if suffix == "tsv" else ",")
        rows.writerows([["image", "caption"], ["a.jpg", LONG]])
    assert parse_captions(tmp_path / f"a.{suffix}")[0]["caption"] == [LONG.strip()]


def test_a_long_caption_is_cut_to_the_allowed_tokens(tokenizer):
    captions = tokenizer.tokenize([LONG, "x" * 100_000, "a ring"])
    assert captions.ids.shape == (3, 30)
    assert captions.mask.sum(dim=1).tolist() == [30, 3, 4]


@pytest.mark.parametrize("caption", [None, 5, 1.5, ["a"], b"a"], ids=str)
def test_other_types_are_refused_in_one_line(tokenizer, caption):
    with pytest.raises(UserError, match="a caption must be text, not "):
        tokenizer.tokenize(["a ring", caption])


# ---- "[MASK]" in a caption's text


@pytest.fixture
def spelling(tmp_path):
    """A tokenizer that knows the words and brackets of special tokens as ordinary tokens."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] [ ] mask cls sep pad unk a ring".split()
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return CaptionTokenizer(build_tokenizer(str(tmp_path / "vocab.txt")), max_length=40)


@pytest.mark.parametrize("token", ["[MASK]", "[CLS]", "[SEP]", "[PAD]", "[UNK]"])
def test_a_special_tokens_text_is_its_characters(spelling, token):
    captions = spelling.tokenize([f"a {token} ring", f"{token}{token}", f"[{token}"])
    tokens = spelling.tokenizer.convert_ids_to_tokens(captions.ids[0].tolist())
    name = token.strip("[]").lower()
    assert tokens == ["[CLS]", "a", "[", name, "]", "ring", "[SEP]", "[PAD]"]
    assert captions.words[0].tolist() == [-1, 0, 1, 2, 3, 4, -1, -1]
    assert captions.mask.sum(dim=1).tolist() == [7, 8, 6]
    assert ((captions.words >= 0) == (captions.mask & ~spelling.is_special[captions.ids])).all()
    assert spelling.tokenize([f"a {name} ring"]).ids.shape == (1, 5)


def test_mlm_predicts_a_special_tokens_text_as_words_and_the_mask_may_pick_it(make_model):
    model = make_model(text={"mask_prob": 1.0})
    tokenizer = model.caption_tokenizer
    text = model.tokenize_masked([SPECIAL, "a ring"], Draws(0, 0))
    clean = tokenizer.tokenize([SPECIAL, "a ring"])
    special = {tokenizer.tokenizer.convert_tokens_to_ids(t) for t in ("[MASK]", "[CLS]", "[PAD]")}
    assert not special & set(text.targets.tolist())
    # all but [CLS] and padding
    assert len(text.targets) == int(clean.mask.sum()) - 2
    pickable = tokenizer.pickable(clean, clean.ids, content_only=False)
    assert torch.equal(pickable >= 0, clean.words >= 0)
    assert int(pickable.max()) == len(SPECIAL.replace("[", " [ ").replace("]", " ] ").split()) - 1


def test_ordinary_captions_are_tokenized_as_before(tokenizer):
    plain = [
        "a red ring",
        "A (red) ring, [left] of it!",
        "tail[5] of [mask] <s> [",
        "it's [ MASK ]",
    ]
    for text in plain:
        assert tokenizer.tokenize([text]).ids.tolist() == [tokenizer.tokenizer(text)["input_ids"]]


# ---- vocabularies


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a\nred\n",
        bytes(range(256)),
        b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\na\n",
        b"\n\n\n",
    ],
    ids=["empty", "no special tokens", "no text", "a token twice", "blank lines"],
)
def test_a_bad_vocabulary_gives_a_one_line_error(tmp_path, content):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"vocab.txt is no usable vocabulary \(model.tokenizer\)"):
        build_tokenizer(str(tmp_path / "vocab.txt"))


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": "{"},
        {"tokenizer.json": "{}"},
        {"vocab.txt": "a\nb"},
        {"vocab.txt": "[UNK]", "tokenizer_config.json": "[1]"},
        {"vocab.txt": "[UNK]", "tokenizer_config.json": '{"mask_token": 5}'},
    ],
    ids=str,
)
def test_a_damaged_tokenizer_folder_gets_one_line(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="model.tokenizer"):
        build_tokenizer(str(tmp_path))


def test_a_folder_is_a_tokenizer_too(tmp_path):
    build_tokenizer("scenes").save_pretrained(tmp_path)
    assert isinstance(build_tokenizer(str(tmp_path)), BertTokenizerFast)


# ---- whole files, by way of the command

ROWS = [{"image": "a.png", "caption": "a red ring"}, {"image": "b.png", "caption": "a star"}]
FILES = {
    "empty": ("", "train.json is not valid JSON"),
    "spaces": ("  \n", "train.json is not valid JSON"),
    "malformed": ("[{", "train.json is not valid JSON"),
    "no rows": ("[]", "train.json holds no rows"),
    "another layout": ('{"annotations": []}', "no 'image' and no 'caption' among ['annotations']"),
    "absolute paths": ([{"image": "/etc/a.png", "caption": "a"}], "is outside the images"),
    "..": ([{"image": "../photos/a.png", "caption": "a"}], "is outside the images folder"),
    "a drive": ([{"image": "C:/a.png", "caption": "a"}], "is outside the images folder"),
    "missing images": ([{"image": "c.png", "caption": "a"}], "none of the 1 images exists"),
    "a name of two lines": ([{"image": "a\nb", "caption": "a"}], r"photos/a\nb; set"),
    "no text": (b"\xff\xfe\x00", "is not UTF-8 text: save it as UTF-8"),
}


@pytest.fixture
def here(config, tmp_path):
    """Two pictures and a YAML file to train on them, in the current folder."""
    Path("photos").mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (9, 9), colour).save(f"photos/{name}.png")
    processors = {mode: {"name": f"softmask_image_{mode}", "image_size": 60} for mode in ("train",)}
    data = {"images": "photos", "captions": {"train": "train.json"}, "vis_processor": processors}
    changed = OmegaConf.load(config)
    changed.datasets = {"captions_folder": data}
    changed.run |= {"batch_size_train": 2, "test_splits": []}
    OmegaConf.save(changed, config)
    return tmp_path


@pytest.mark.parametrize("kind", FILES)
def test_a_bad_caption_file_ends_in_one_line(here, capsys, kind):
    content, message = FILES[kind]
    write("train.json", content)
    assert message in refusal(capsys)


def test_what_is_usable_of_a_bad_file_is_trained_on(here, caplog):
    """Missing images, a name twice, an image_id twice, and no caption at all, in one file."""
    rows = [*ROWS, {**ROWS[0], "caption": "again"}, {"image": "c.png", "caption": "gone"}]
    rows += [{"image": "a.png"}, {"image": "b.png", "caption": [None, "again"], "image_id": 1}]
    write("train.json", rows)
    with caplog.at_level(logging.INFO):
        assert cli.main(["train", "--cfg-path", "my.yaml"]) == 0
    assert "captions_folder train: 2 items, 2 images" in caplog.text
    assert "Skipped 1 missing images" in caplog.text
    assert "Skipped 2 rows or captions of train.json" in caplog.text
    (log,) = Path("runs").glob("*/skipped_images.log")
    assert len(log.read_text().splitlines()) == 3


# ---- models that read texts of other kinds


def test_special_tokens_in_a_question_and_its_answer(make_other, make_batch):
    model = make_other(SoftMaskVqa)
    batch = {
        "image": make_batch(2)["image"],
        "text_input": ["is it [MASK]", ""],
        "answer": ["[SEP]", "[PAD]"],
        "n_answers": torch.ones(2, dtype=torch.long),
        "weight": torch.ones(2),
    }
    assert model.train()(batch)["loss"].isfinite()
    answers = ["[SEP]", "a ring", "?", "x" * 100_000]
    assert set(model.eval().predict_answers(batch, answers)) <= set(answers)


def test_a_gallery_of_odd_captions_is_ranked(make_other):
    class Loader(list):
        dataset = type("Data", (), {"text": ["", "?!", SPECIAL, CJK, LONG], "image": ["a", "b"]})

    model = make_other(SoftMaskRetrieval).eval()
    scores, _ = model.compute_sim_matrix(Loader([{"image": torch.randn(2, 3, 32, 32)}]), {})
    assert scores.shape == (2, 5) and torch.from_numpy(scores).isfinite().all()


def test_processors_turn_any_value_of_a_file_into_text():
    for name in ("softmask_caption", "softmask_question"):
        process = registry.get_processor_class(name)()
        for given, _ in CAPTIONS.values():
            if not isinstance(given, dict):
                assert isinstance(process(given), str)
