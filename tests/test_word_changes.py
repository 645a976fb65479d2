"""Captions with one word changed, against plain Python and against what is true of scenes."""

from __future__ import annotations

import re
from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scene_truth import DIRECTIONS, NOUN, lies, things_called

from softmask_plugin.datasets.scenes.grammar import captions as scene_captions
from softmask_plugin.datasets.scenes.grammar import make_scenes
from softmask_plugin.tokenization import CaptionTokenizer
from softmask_plugin.vocabulary import build_tokenizer
from softmask_plugin.word_changes import change_words

PIECES = "the on red blue tall dog cat hat pur ro ##ple ##se .".split()
FIXED = {"the", "on", "."}
WORDS = "the on red blue tall dog cat hat purple rose .".split()
LENGTH = {"purple": 2, "rose": 2}


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES]
    return CaptionTokenizer(build_tokenizer(vocabulary), max_length=40)


def changes_of(captions):
    """For each caption, the words that may change and the weight of each new word, by index."""
    frames, before, after = Counter(), Counter(), Counter()
    split = [["", *caption.split(), ""] for caption in captions]
    for words in split:
        for left, word, right in zip(words, words[1:], words[2:], strict=False):
            frames[left, word, right] += 1
            before[left, word] += 1
            after[word, right] += 1
    for words in split:
        exact, halves = {}, {}
        for i, old in enumerate(words[1:-1]):
            left, right = words[i], words[i + 2]
            new = [
                word
                for word in {*sum(split, [])} - {*words} - FIXED
                if old not in FIXED and LENGTH.get(word, 1) == LENGTH.get(old, 1)
            ]
            found = {word: frames[left, word, right] for word in new}
            exact[i] = {word: weight for word, weight in found.items() if weight}
            found = {word: before[left, word] * after[word, right] for word in new}
            halves[i] = {word: weight for word, weight in found.items() if weight}
        best = exact if any(exact.values()) else halves
        yield {i: weights for i, weights in best.items() if weights}


def change(tokenizer, captions, seed=0):
    batch = tokenizer.tokenize(captions)
    ids = tokenizer.change_words(batch, batch.ids, torch.Generator().manual_seed(seed))
    decode = tokenizer.tokenizer.convert_ids_to_tokens
    return [
        " ".join(decode(row[words >= 0].tolist())).replace(" ##", "")
        for row, words in zip(ids, batch.words, strict=True)
    ]


def difference(old, new):
    """Where two captions differ, and the new word: at most one place."""
    pairs = list(zip(old.split(), new.split(), strict=True))
    found = [(i, b) for i, (a, b) in enumerate(pairs) if a != b]
    assert len(found) <= 1
    return found[0] if found else None


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join), min_size=1, max_size=8))
def test_a_change_is_one_that_plain_python_allows(tokenizer, captions):
    for old, new, allowed in zip(
        captions, change(tokenizer, captions), changes_of(captions), strict=True
    ):
        found = difference(old, new)
        if found is None:
            assert not allowed
        else:
            assert found[1] in allowed[found[0]]


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (  # the same frame: two of three hats are blue; "tall" and "purple" have other frames
            ["the red hat .", "the blue hat .", "the blue hat .", "the tall hat .", "tall cat"],
            {"the blue hat .": 2, "the tall hat .": 1},
        ),
        (  # no frame is shared: "blue" follows "the" twice and stands before "hat" three times
            ["the red hat", "the blue dog", "the blue .", *["blue hat"] * 3, "tall hat"],
            {"the blue hat": 1},
        ),
        (  # a word of two tokens changes as a whole
            ["the rose .", "the purple .", "the dog ."],
            {"the purple .": 1},
        ),
    ],
)
def test_new_words_are_drawn_as_often_as_they_occur_in_the_frame(tokenizer, captions, expected):
    drawn = Counter(change(tokenizer, captions, seed)[0] for seed in range(600))
    total = sum(expected.values())
    assert drawn.keys() == expected.keys()
    for text, weight in expected.items():
        assert drawn[text] / 600 == pytest.approx(weight / total, abs=0.06)


def test_words_that_mlm_replaced_stay(tokenizer):
    batch = tokenizer.tokenize(
        ["the red dog .", "the blue cat .", "the red cat .", "the blue dog ."]
    )
    seen = batch.ids.clone()
    seen[:, 2] = tokenizer.tokenizer.mask_token_id
    for seed in range(20):
        ids = tokenizer.change_words(batch, seen, torch.Generator().manual_seed(seed))
        assert (ids != seen).nonzero()[:, 1].tolist() == [3] * 4
        assert torch.equal(batch.ids[:, 3], ids[[1, 0, 3, 2], 3])


def test_the_generator_decides(tokenizer):
    captions = ["the red dog .", "the blue cat .", "the tall hat .", "the red cat ."] * 4
    assert change(tokenizer, captions, 3) == change(tokenizer, captions, 3)
    assert len({tuple(change(tokenizer, captions, seed)) for seed in range(5)}) > 1


def test_captions_without_words_stay(tokenizer):
    for captions in ([""], ["", "."], ["the", "the"], ["zebra .", "ape ."]):
        ids = tokenizer.tokenize(captions).ids
        words = tokenizer.tokenize(captions).words
        fixed = torch.zeros_like(ids, dtype=torch.bool)
        assert torch.equal(change_words(ids, words, tokenizer.is_content, fixed), ids)


def is_true(caption, things):
    """Whether things are as a caption says."""
    how = rf"(?:({'|'.join(DIRECTIONS)}) )?an? ({NOUN})"
    named = [(match[1], things_called(match[2], things)) for match in re.finditer(how, caption)]
    if not all(found for _, found in named):
        return False
    (first, *_), *_ = (found for _, found in named)
    return all(way is None or any(lies(first, way, a) for a in found) for way, found in named)


@pytest.mark.parametrize("objects", [1, 2, 3])
def test_every_changed_caption_of_scenes_is_false(objects):
    tokenizer, rng = CaptionTokenizer(build_tokenizer("scenes"), max_length=40), Random(0)
    changed = 0
    for seed in range(6):
        scenes = make_scenes("train", 64, seed, objects)
        captions = [rng.choice(scene_captions(scene)).text for scene in scenes]
        for old, new, scene in zip(captions, change(tokenizer, captions), scenes, strict=True):
            assert is_true(old, scene.things)
            if new != old:
                changed += 1
                assert not is_true(new, scene.things), (old, new)
    assert changed > 0.97 * 6 * 64
