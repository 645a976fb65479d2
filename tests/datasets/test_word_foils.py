"""Foils for a file of captions: what changes into what, and the file."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import product
from math import log

import pytest
import torch
from scipy.spatial.distance import cosine

from softmask_plugin import cli
from softmask_plugin.datasets import word_foils
from softmask_plugin.datasets.word_foils import make_foils, write_foils
from softmask_plugin.word_changes import Words

PEOPLE, COLOURS, PLACES = ("man", "person"), ("red", "blue", "green"), ("park", "street", "pool")


@pytest.fixture
def items():
    """Nine images, each of a "man" to one and of a "person" to another; nine of a man alone; and
    seven of a winter, which one caption has where others have a colour."""
    found = []
    for number, (colour, place) in enumerate(product(COLOURS, PLACES)):
        man, person = (f"A {who} in a {colour} hat at the {place}." for who in PEOPLE)
        found.append({"image": f"{number}.jpg", "caption": [man, person]})
        found.append({"image": f"{number}b.jpg", "caption": [man]})
    winter = ["A man in a winter hat.", *["The long winter is over."] * 6]
    found += [{"image": f"{i}c.jpg", "caption": [text]} for i, text in enumerate(winter)]
    return found


def changes(foils):
    """The old and the new word of each foil."""
    found = []
    for row in foils:
        old, new = (word_foils.WORD.findall(row[key]) for key in ("caption", "foil"))
        ((a, b),) = [pair for pair in zip(old, new, strict=True) if pair[0] != pair[1]]
        found.append((a, b))
    return found


def drawn(items):
    return Counter(pair for seed in range(20) for pair in changes(make_foils(items, seed)))


def test_a_word_gives_way_to_one_of_its_kind_that_is_no_other_name_for_it(items, monkeypatch):
    alike = {(a, b) for kind in (COLOURS, PLACES) for a, b in product(kind, kind) if a != b}
    assert drawn(items).keys() == alike
    with monkeypatch.context() as patch:
        patch.setattr(word_foils, "RIVALS", 1e9)
        assert drawn(items).keys() == alike | {("man", "person")}
    monkeypatch.setattr(word_foils, "ALIKE", -1)
    assert drawn(items).keys() > alike | {("red", "winter")}


def test_two_names_for_a_thing_are_told_by_captions_of_one_image(items):
    apart = [
        {"image": f"{item['image']}{i}", "caption": [caption]}
        for item in items
        for i, caption in enumerate(item["caption"])
    ]
    assert ("man", "person") in drawn(apart)


def test_a_foil_has_no_word_that_another_caption_of_its_image_has(items):
    for item in items:
        item["caption"].append("It is red, blue or green.")
    assert {old for old, _ in drawn(items)} == {*PLACES}


def test_spelling_and_rows_stay(items):
    captions = ["Red hats at the park.", "Blue hats at the park.", "Green hats at the park."]
    found = make_foils([{"image": f"{i}.jpg", "caption": [c]} for i, c in enumerate(captions * 5)])
    assert len(found) == 15
    for number, row in enumerate(found):
        assert row["image"] == f"{number}.jpg" and row["group"] == "word"
        assert row["caption"] == captions[number % 3]
        assert row["foil"] in captions and row["foil"] != row["caption"]


def test_likeness_is_the_cosine_of_ppmi(items, monkeypatch):
    captions = [caption[:-1].lower().split() for item in items for caption in item["caption"]]
    names = [*PEOPLE, *COLOURS, *PLACES, "hat"]
    types = {
        word: i
        for i, word in enumerate([*names, "a", "in", "at", "the", "long", "winter", "is", "over"])
    }
    seen = defaultdict(Counter)
    for words in captions:
        for left, word, right in zip(["", *words], words, [*words[1:], ""], strict=False):
            if word in names:
                seen[word].update([(left, None), (None, right), (left, right)])
    total = sum(sum(each.values()) for each in seen.values())
    of_place = sum(seen.values(), Counter())

    def ppmi(word):
        chance = {p: sum(seen[word].values()) * of_place[p] / total for p in of_place}
        return [max(0, log(seen[word][p] / chance[p])) if seen[word][p] else 0 for p in of_place]

    expected = torch.tensor([[1 - cosine(ppmi(a), ppmi(b)) for b in names] for a in names])
    words = Words(
        torch.tensor([i for i, words in enumerate(captions) for _ in words]),
        torch.tensor([i for i, words in enumerate(captions) for _ in words]),
        torch.tensor([types[word] for words in captions for word in words]),
        torch.ones(len(names)),
    )
    for threshold in (0.1, 0.3, 0.6, 0.9):
        monkeypatch.setattr(word_foils, "ALIKE", threshold)
        assert word_foils._alike(words).tolist() == (expected >= threshold).tolist()


def test_pieces_of_a_file_give_what_the_whole_gives(items, monkeypatch):
    whole = drawn(items)
    monkeypatch.setattr(word_foils, "IMAGES", 2)
    parts = drawn(items)
    assert whole.keys() == parts.keys() and whole.total() == parts.total()


def test_the_command_writes_a_file(items, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [*items, {"image": "z.jpg", "caption": ["Nothing like it"]}]
    (tmp_path / "val.json").write_text(json.dumps(rows))
    assert cli.main(["foils", "val.json", "-o", "made.json", "--seed", "3"]) == 0
    made = json.loads((tmp_path / "made.json").read_text())
    assert made == make_foils(rows, seed=3) != make_foils(rows, seed=4)
    said = f"{len(made)} captions changed, {35 - len(made)} left out: made.json"
    assert said in capsys.readouterr().out
    assert set(made[0]) == {"image", "caption", "foil", "group"}


def test_a_file_without_kinds_of_words_is_an_error(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\n1.jpg,a dog\n2.jpg,a cat\n")
    with pytest.raises(word_foils.UserError, match="no caption of .*a.csv can be changed"):
        write_foils(tmp_path / "a.csv", tmp_path / "foils.json")
    assert not (tmp_path / "foils.json").exists()
    with pytest.raises(word_foils.UserError, match="a.csv would be overwritten: name another"):
        write_foils(tmp_path / "a.csv", tmp_path / "." / "a.csv")
