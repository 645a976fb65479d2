"""Tasks about scenes: what can be guessed without the image, or from a part of the input."""

import math
import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from scene_truth import HELDOUT, NOUN, hidden_by, nouns, things_called

from softmask_plugin.datasets.scenes.grammar import (
    COLOURS,
    SHAPES,
    SIZES,
    allowed_compositions,
    heldout_compositions,
    make_scenes,
)
from softmask_plugin.datasets.scenes.tasks import FOILS, KINDS, ask, compare, entail, foils


def naive_bayes(features, labels):
    """Share of held-out items that a naive Bayes classifier of token pairs gets right."""
    pairs = [
        {*tokens, *(f"{a} {b}" for a, b in combinations(sorted(tokens), 2))}
        for tokens in map(set, features)
    ]
    half, classes = len(pairs) // 2, sorted(set(labels))
    counts = {c: Counter() for c in classes}
    totals = Counter(labels[:half])
    for tokens, label in zip(pairs[:half], labels[:half], strict=True):
        counts[label].update(tokens)

    def score(tokens, c):
        likelihood = (math.log((counts[c][t] + 1) / (totals[c] + 2)) for t in tokens)
        return math.log(totals[c]) + sum(likelihood)

    guesses = [max(classes, key=lambda c, t=tokens: score(t, c)) for tokens in pairs[half:]]
    return np.mean([g == truth for g, truth in zip(guesses, labels[half:], strict=True)])


NAMING = rf"\b({'|'.join((*COLOURS, *SHAPES, *SIZES))}|above|below|left|right)\b"


def cell(x, y):
    return f"{x:.1f},{y:.1f}"


@pytest.fixture(scope="module")
def pool():
    return allowed_compositions("train", HELDOUT)


@pytest.fixture(scope="module")
def scenes():
    return make_scenes("train", 4000, objects=3)


@pytest.fixture(scope="module")
def hypotheses(scenes, pool):
    return [entail(scene, pool) for scene in scenes]


@pytest.fixture(scope="module")
def questions(scenes, pool):
    return [ask(scene, pool) for scene in scenes]


@pytest.fixture(scope="module")
def pairs(scenes, pool):
    return [compare(*two, pool) for two in zip(scenes, scenes[1:], strict=False)]


def test_entailment_needs_both_the_words_and_the_picture(hypotheses):
    labels = [item["label"] for item in hypotheses]
    assert all(abs(n / len(labels) - 1 / 3) < 0.03 for n in Counter(labels).values())
    assert naive_bayes([item["sentence"].split() for item in hypotheses], labels) < 1 / 3 + 0.04

    def seen(item):
        (scene,) = item["scenes"]
        hidden = hidden_by(item["curtain"], scene.things)
        x0, y0, x1, y1 = item["curtain"]
        yield f"curtain {cell((x0 + x1) / 2, (y0 + y1) / 2)} {x1 - x0:.1f}"
        for thing in scene.things:
            if thing is not hidden:
                yield from (*thing.composition, thing.size, cell(thing.x, thing.y))

    assert naive_bayes([list(seen(item)) for item in hypotheses], labels) < 1 / 3 + 0.04
    templates = Counter(re.sub(NOUN, "X", item["sentence"]).split()[-2] for item in hypotheses)
    assert min(templates.values()) > 500  # "is red" and "a circle"


def test_contradictions_often_bind_what_is_shown_wrongly(hypotheses):
    wrong = [item for item in hypotheses if item["label"] == "contradiction"]
    shown = [
        item["sentence"].split()[-1] in {word for t in scene.things for word in t.composition}
        for item in wrong
        for scene in item["scenes"]
    ]
    assert np.mean(shown) > 0.4


def test_nlvr_needs_both_images(pairs):
    labels = [item["label"] == "True" for item in pairs]
    assert abs(np.mean(labels) - 0.5) < 0.03
    assert naive_bayes([item["sentence"].split() for item in pairs], labels) < 0.54
    alone = {"both": 0.75, "only": 0.5, "one": 0.5, "the": 5 / 6}
    for word, expected in alone.items():
        for side in (0, 1):
            seen = {}
            for item in pairs:
                text = item["sentence"]
                if text.split()[0] == word:
                    things = item["scenes"][side].things
                    what = tuple(bool(things_called(noun, things)) for noun in nouns(text))
                    seen.setdefault(what, Counter())[item["label"]] += 1
            total = sum(sum(counts.values()) for counts in seen.values())
            assert total > 800
            guessed = sum(max(counts.values()) for counts in seen.values()) / total
            assert guessed == pytest.approx(expected, abs=0.04), (word, side)


def test_answers_cannot_be_guessed_from_the_question(questions):
    by_kind = {kind: [q for q in questions if q["kind"] == kind] for kind in KINDS}
    assert min(map(len, by_kind.values())) > 300
    values = {"colour": 7, "shape": 7, "size": 2, "exists": 2, "count": 4}
    for kind, asked in by_kind.items():
        answers = [next(iter(question["answer"])) for question in asked]
        # In training each shape lacks one colour, and each colour one shape or two.
        assert len(set(answers)) >= values[kind]
        chance = 1 / values[kind]
        deviation = math.sqrt(chance * (1 - chance) / len(asked))
        most = Counter(answers).most_common(1)[0][1] / len(answers)
        assert most < chance + 3.5 * deviation, kind
        guessed = naive_bayes([question["question"].split() for question in asked], answers)
        assert guessed < chance + 3.5 * math.sqrt(2) * deviation, kind


def test_absent_things_often_have_a_colour_and_a_shape_that_are_shown(questions):
    absent = [q for q in questions if q["answer"] == {"no": 1.0}]
    bound = []
    for question in absent:
        colour, shape = question["question"].split()[-2:]
        colours, shapes = zip(*question["scenes"][0].compositions, strict=True)
        bound.append(colour in colours and shape in shapes)
    assert 0.4 < np.mean(bound) < 0.6


def test_training_never_names_what_is_held_out(hypotheses, pairs, questions):
    heldout = {" ".join(pair) for pair in heldout_compositions(HELDOUT)}
    for item in (*hypotheses, *pairs, *questions):
        text = item["question"] if "question" in item else item["sentence"]
        assert not any(name in text for name in heldout)
    for item in hypotheses:  # nor across the verb, as in "the circle is cyan"
        words = re.fullmatch(r"the (?:small |large )?(\w+) is (\w+)", item["sentence"])
        if words and words[1] in SHAPES:
            assert f"{words[2]} {words[1]}" not in heldout


@pytest.mark.parametrize("objects", [2, 3])
def test_foils_cannot_be_told_by_their_words(objects):
    scenes = make_scenes("train", 1500, objects=objects, heldout=0)
    items = [item for scene in scenes for item in foils(scene)]
    for group in FOILS:
        texts = [
            [f"{i} {word}" for i, word in enumerate(re.findall(NAMING, item[key]))]
            for item in items
            if item["group"] == group
            for key in ("caption", "foil")
        ]
        labels = ["caption", "foil"] * (len(texts) // 2)
        assert naive_bayes(texts, labels) < 0.53, group
