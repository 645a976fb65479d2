"""Where vocabularies come from, and what a reader tells of each token."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertTokenizerFast

from softmask_plugin.errors import UserError
from softmask_plugin.tokenization import FUNCTION_WORDS, Captions, CaptionTokenizer
from softmask_plugin.vocabulary import build_tokenizer

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "pur", "##ple", "##s", "ring"]


@pytest.fixture
def reader(tmp_path):
    """A reader whose vocabulary cuts 'purples' in three."""
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES))
    return CaptionTokenizer(build_tokenizer(str(tmp_path / "vocab.txt")), max_length=8)


def karpathy(path, **captions):
    images = [
        {"filename": f"{number}.jpg", "split": split, "sentences": [{"raw": text}] * 2}
        for number, (split, text) in enumerate(captions.items())
    ]
    path.write_text(json.dumps({"images": images}))
    return str(path)


def test_a_karpathy_files_vocabulary_is_that_of_its_train_split(tmp_path):
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


def test_scenes_vocabulary_knows_its_special_tokens():
    tokenizer = build_tokenizer("scenes")
    special = (tokenizer.pad_token, tokenizer.cls_token, tokenizer.sep_token, tokenizer.mask_token)
    assert special == ("[PAD]", "[CLS]", "[SEP]", "[MASK]") and tokenizer.pad_token_id == 0
    assert tokenizer.unk_token_id not in tokenizer("a large blue star")["input_ids"]


@pytest.mark.parametrize("error", [OSError("line\nline"), ValueError("bad name")])
def test_a_hub_that_is_out_of_reach_gets_one_line(monkeypatch, error):
    def unreachable(*_, **__):
        raise error

    monkeypatch.setattr(BertTokenizerFast, "from_pretrained", unreachable)
    with pytest.raises(UserError, match="no tokenizer 'bert-base-uncased'") as caught:
        build_tokenizer("bert-base-uncased")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["", "no/such/vocab.txt", "folder"])
def test_a_path_that_leads_nowhere_gets_one_line(tmp_path, monkeypatch, name):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no tokenizer"):
        build_tokenizer(name and str(tmp_path / name))


def test_words_and_pieces(reader):
    captions = reader.tokenize(["a purples red", "purple zebra ring", ""])
    assert captions.words.tolist() == [
        [-1, 0, 1, 1, 1, 2, -1],
        [-1, 0, 0, 1, 2, -1, -1],  # an unknown word is a word
        [-1] * 7,
    ]
    assert captions.mask.sum(dim=1).tolist() == [7, 6, 2]
    assert captions.ids[2].tolist() == [2, 3, 0, 0, 0, 0, 0]
    maskable = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5], [1]]  # as in ALBEF, [SEP] too
    assert [row.nonzero().flatten().tolist() for row in reader.maskable(captions)] == maskable


def test_long_captions_are_cut_and_short_batches_not_padded(reader):
    long = reader.tokenize(["red ring " * 20])
    assert long.ids.shape == (1, 8) and long.ids[0, -1] == reader.tokenizer.sep_token_id
    assert reader.tokenize(["red"]).ids.shape == (1, 3)


def test_without_sep_a_caption_is_cls_and_its_own_tokens(reader):
    texts = ["a purples red", "ring", "", "red ring " * 20]
    bare = CaptionTokenizer(reader.tokenizer, max_length=8, sep_token=False)
    captions = bare.tokenize(texts)
    assert captions.ids[1].tolist() == [2, 10, 0, 0, 0, 0, 0, 0]
    assert captions.mask.sum(dim=1).tolist() == [6, 2, 1, 8]
    for text, ids, mask in zip(texts, captions.ids, captions.mask, strict=True):
        tokens = reader.tokenizer.convert_ids_to_tokens(ids[mask].tolist())
        assert tokens == ["[CLS]", *reader.tokenizer.tokenize(text)][:8]
    assert captions.words[0].tolist() == [-1, 0, 1, 1, 1, 2, -1, -1]
    assert bare.truncate(texts[-1]) == "red ring red ring red ring red"
    assert bare.truncate(texts[0]) == texts[0]
    assert bare.tokenize(["", ""]).ids.tolist() == [[2], [2]]


def test_pickable_words(reader):
    captions = reader.tokenize(["a purples red"])
    seen = captions.ids.clone()
    seen[0, 3] = reader.tokenizer.mask_token_id  # the middle piece of "purples"
    assert reader.pickable(captions, captions.ids, False).tolist() == captions.words.tolist()
    assert reader.pickable(captions, seen, False).tolist() == [[-1, 0, 1, -1, 1, 2, -1]]
    assert reader.pickable(captions, seen, True).tolist() == [[-1, -1, 1, -1, 1, 2, -1]]


def test_words_that_name_nothing():
    reader = CaptionTokenizer(build_tokenizer("scenes"), max_length=30)
    text = "there is a large blue star to the left of a ring and below the cross"
    captions = reader.tokenize([text])
    picked = reader.pickable(captions, captions.ids, content_only=True)
    left = torch.unique(picked[picked >= 0]).tolist()
    assert [text.split()[i] for i in left] == "large blue star left ring cross".split()
    assert {"a", "the", "with", "below"} <= FUNCTION_WORDS
    assert isinstance(captions, Captions)
