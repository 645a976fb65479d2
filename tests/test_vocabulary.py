"""Tokenizers: where their vocabulary comes from."""

from __future__ import annotations

import json

import pytest
from transformers import BertTokenizerFast

from softmask_plugin.errors import UserError
from softmask_plugin.vocabulary import build_tokenizer


def karpathy(path, **captions):
    images = [
        {"filename": f"{number}.jpg", "split": split, "sentences": [{"raw": text}] * 2}
        for number, (split, text) in enumerate(captions.items())
    ]
    path.write_text(json.dumps({"images": images}))
    return str(path)


def test_a_karpathy_files_vocabulary_comes_from_its_train_split(tmp_path):
    source = karpathy(
        tmp_path / "a.json", train="a zebra", restval="a koala", val="wombat", test="quokka"
    )
    first, again = (build_tokenizer(source).get_vocab() for _ in range(2))
    assert first == again
    assert {"zebra", "koala"} <= first.keys()
    assert not {"w", "##w", "q", "##q"} & first.keys()  # not even letters of the other splits


def test_a_karpathy_file_without_a_train_split_gives_no_vocabulary(tmp_path):
    with pytest.raises(UserError, match="no image of split 'train'"):
        build_tokenizer(karpathy(tmp_path / "a.json", test="a quokka"))


def test_a_vocabulary_made_from_captions_covers_them_and_is_the_same_each_time(tmp_path):
    captions = ["A man rides a brown horse.", "two dogs; one frisbee!", "Étude in blue: ocean"] * 2
    rows = [{"image": f"{i}.jpg", "caption": [c]} for i, c in enumerate(captions)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    first, again = (build_tokenizer(str(tmp_path / f"{name}.json")) for name in "ab")
    assert first.get_vocab() == again.get_vocab()
    ids = first(captions)["input_ids"]
    assert first.unk_token_id not in sum(ids, [])
    assert first.tokenize("HORSE") == first.tokenize("horse") == ["horse"]
    limited = build_tokenizer(str(tmp_path / "a.json"), vocab_size=60)
    assert len(limited) <= 60 < len(first)


def test_a_file_with_captions_and_questions_gives_the_words_of_both(tmp_path):
    row = {"image": "a.jpg", "caption": "grass", "question": "which animal", "answer": "zebra"}
    (tmp_path / "a.json").write_text(json.dumps([row] * 3))
    tokenizer = build_tokenizer(str(tmp_path / "a.json"))
    text = "grass which animal zebra"
    assert tokenizer.tokenize(text) == text.split()


def test_scenes_vocabulary_knows_its_special_tokens():
    tokenizer = build_tokenizer("scenes")
    special = (tokenizer.pad_token, tokenizer.cls_token, tokenizer.sep_token, tokenizer.mask_token)
    assert special == ("[PAD]", "[CLS]", "[SEP]", "[MASK]") and tokenizer.pad_token_id == 0
    assert tokenizer.unk_token_id not in tokenizer("a large blue star")["input_ids"]


@pytest.mark.parametrize("error", [OSError("line\nline"), ValueError("bad name")])
def test_an_unreachable_hub_gets_one_line(monkeypatch, error):
    def unreachable(*_, **__):
        raise error

    monkeypatch.setattr(BertTokenizerFast, "from_pretrained", unreachable)
    with pytest.raises(UserError, match="no tokenizer 'bert-base-uncased'") as caught:
        build_tokenizer("bert-base-uncased")
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_of_captions_may_end_in_capitals(tmp_path):
    rows = [{"image": "a.jpg", "caption": "a red fox"}] * 2
    for name in ("a.json", "B.JSON"):
        (tmp_path / name).write_text(json.dumps(rows))
    one, other = (build_tokenizer(str(tmp_path / name)) for name in ("a.json", "B.JSON"))
    assert one.get_vocab() == other.get_vocab() and "fox" in one.get_vocab()


def test_a_saved_tokenizer_in_the_users_home(tmp_path, monkeypatch):
    build_tokenizer("scenes").save_pretrained(tmp_path / "bert")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build_tokenizer("~/bert").get_vocab() == build_tokenizer("scenes").get_vocab()


@pytest.mark.parametrize("name", ["", "no/such/vocab.txt", "folder"])
def test_a_path_that_leads_nowhere_gets_one_line(tmp_path, monkeypatch, name):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no tokenizer"):
        build_tokenizer(name and str(tmp_path / name))
