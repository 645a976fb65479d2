"""Captions to token ids, and what is known about each token."""

from __future__ import annotations

import pytest
import torch

from softmask_plugin.explain import explain, word_maps
from softmask_plugin.tokenization import FUNCTION_WORDS, Captions, CaptionTokenizer
from softmask_plugin.vocabulary import build_tokenizer

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "pur", "##ple", "##s", "ring"]


@pytest.fixture
def tokenizer(tmp_path):
    """A tokenizer whose vocabulary splits 'purples' in three."""
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES))
    return CaptionTokenizer(build_tokenizer(str(tmp_path / "vocab.txt")), max_length=8)


def test_words_and_pieces(tokenizer):
    captions = tokenizer.tokenize(["a purples red", "purple zebra ring", ""])
    assert captions.words.tolist() == [
        [-1, 0, 1, 1, 1, 2, -1],
        [-1, 0, 0, 1, 2, -1, -1],  # an unknown word is a word
        [-1] * 7,
    ]
    assert captions.mask.sum(dim=1).tolist() == [7, 6, 2]
    assert captions.ids[2].tolist() == [2, 3, 0, 0, 0, 0, 0]
    maskable = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5], [1]]  # as in ALBEF, [SEP] too
    assert [row.nonzero().flatten().tolist() for row in tokenizer.maskable(captions)] == maskable


def test_long_captions_are_cut_and_short_batches_not_padded(tokenizer):
    long = tokenizer.tokenize(["red ring " * 20])
    assert long.ids.shape == (1, 8) and long.ids[0, -1] == tokenizer.tokenizer.sep_token_id
    assert tokenizer.tokenize(["red"]).ids.shape == (1, 3)


def test_without_sep_a_caption_is_cls_and_its_own_tokens(tokenizer):
    texts = ["a purples red", "ring", "", "red ring " * 20]
    bare = CaptionTokenizer(tokenizer.tokenizer, max_length=8, sep_token=False)
    captions = bare.tokenize(texts)
    assert captions.ids[1].tolist() == [2, 10, 0, 0, 0, 0, 0, 0]
    assert captions.mask.sum(dim=1).tolist() == [6, 2, 1, 8]
    for text, ids, mask in zip(texts, captions.ids, captions.mask, strict=True):
        tokens = tokenizer.tokenizer.convert_ids_to_tokens(ids[mask].tolist())
        assert tokens == ["[CLS]", *tokenizer.tokenizer.tokenize(text)][:8]
    assert captions.words[0].tolist() == [-1, 0, 1, 1, 1, 2, -1, -1]
    assert bare.truncate(texts[-1]) == "red ring red ring red ring red"
    assert bare.truncate(texts[0]) == texts[0]
    assert bare.tokenize(["", ""]).ids.tolist() == [[2], [2]]


def test_a_word_between_spaces_may_be_several_words_or_none(tokenizer):
    text = "a circlestar, red & \u200b [MASK] heart"
    split = tokenizer.split_words(text)
    words = CaptionTokenizer(tokenizer.tokenizer, max_length=20).tokenize([text]).words[0]
    assert [len(each) for each in split] == [1, 2, 1, 1, 0, 3, 1]
    assert [n for each in split for n in each] == list(range(int(words.max()) + 1))
    assert tokenizer.split_words(" ") == []


def test_pickable_words(tokenizer):
    captions = tokenizer.tokenize(["a purples red"])
    seen = captions.ids.clone()
    seen[0, 3] = tokenizer.tokenizer.mask_token_id  # the middle piece of "purples"
    assert tokenizer.pickable(captions, captions.ids, False).tolist() == captions.words.tolist()
    assert tokenizer.pickable(captions, seen, False).tolist() == [[-1, 0, 1, -1, 1, 2, -1]]
    assert tokenizer.pickable(captions, seen, True).tolist() == [[-1, -1, 1, -1, 1, 2, -1]]


def test_a_word_that_begins_like_a_function_word_can_be_picked(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "with", "##ered", "tree"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    tokenizer = CaptionTokenizer(build_tokenizer(str(tmp_path / "vocab.txt")), max_length=10)
    captions = tokenizer.tokenize(["a withered tree with"])
    picked = tokenizer.pickable(captions, captions.ids, content_only=True)
    assert picked.tolist() == [[-1, -1, 1, 1, 2, -1, -1]]


def test_words_that_name_nothing():
    tokenizer = CaptionTokenizer(build_tokenizer("scenes"), max_length=30)
    text = "there is a large blue star to the left of a ring and below the cross"
    captions = tokenizer.tokenize([text])
    picked = tokenizer.pickable(captions, captions.ids, content_only=True)
    left = torch.unique(picked[picked >= 0]).tolist()
    assert [text.split()[i] for i in left] == "large blue star left ring cross".split()
    assert {"a", "the", "with", "below"} <= FUNCTION_WORDS
    assert isinstance(captions, Captions)


def test_a_plain_string_is_one_caption(make_model, make_batch):
    """As in LAVIS's examples."""
    model, image = make_model().eval(), make_batch(1)["image"]
    text = "a small red circle"
    assert torch.equal(model.tokenize(text).ids, model.tokenize([text]).ids)
    one, same = word_maps(model, image, text), word_maps(model, image, [text])
    assert torch.equal(one.maps, same.maps)
    (found,) = explain(model, image, text)
    assert found.words == text.split()
