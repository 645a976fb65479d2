"""Statements, questions and expressions about scenes: each is parsed again and checked."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scene_truth import (
    HELDOUT,
    answer,
    caption_truth,
    entailment_label,
    hidden_by,
    meant,
    pair_truth,
    things_called,
)

from softmask_plugin.datasets.scenes.grammar import (
    COLOURS,
    COMPOSITIONS,
    LAYOUTS,
    SHAPES,
    allowed_compositions,
    heldout_compositions,
    make_scenes,
)
from softmask_plugin.datasets.scenes.render import render_item
from softmask_plugin.datasets.scenes.tasks import (
    ANSWERS,
    FOILS,
    KINDS,
    ask,
    compare,
    entail,
    foil_groups,
    foils,
    refer,
    references,
)

seeds = st.integers(0, 2**40)
splits = st.sampled_from(["train", "val", "test"])
layouts = st.sampled_from(sorted(LAYOUTS))


@given(seeds, splits, st.integers(2, 4), layouts)
@settings(max_examples=60, deadline=None)
def test_hypotheses_have_the_right_label(seed, split, objects, layout):
    pool = allowed_compositions(split, HELDOUT)
    for scene in make_scenes(split, 5, seed, objects, HELDOUT, layout):
        item = entail(scene, pool)
        assert item == entail(scene, pool)
        assert item["label"] == entailment_label(item)


def test_a_neutral_hypothesis_may_be_true_or_false_in_the_same_picture():
    items = [entail(scene, COMPOSITIONS) for scene in make_scenes("test", 60, objects=3)]
    neutral = [item for item in items if item["label"] == "neutral"]
    assert len(neutral) > 10
    for item in neutral:
        (scene,) = item["scenes"]
        hidden = hidden_by(item["curtain"], scene.things)
        value = item["sentence"].split()[-1]
        secret, values = ("colour", COLOURS) if value in COLOURS else ("shape", SHAPES)
        other = next(name for name in values if name != value)
        worlds = []
        for truth in (value, other):
            changed = [
                replace(thing, **{secret: truth}) if thing is hidden else thing
                for thing in scene.things
            ]
            worlds.append({**item, "scenes": (replace(scene, things=tuple(changed)),)})
        (one,), (two,) = (render_item(60, world, None) for world in worlds)
        assert (np.asarray(one) == np.asarray(two)).all()


@given(seeds, splits, st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_statements_about_pairs_have_the_right_label(seed, split, objects):
    pool, heldout = allowed_compositions(split, HELDOUT), heldout_compositions(HELDOUT)
    scenes = make_scenes(split, 10, seed, objects, HELDOUT)
    for left, right in zip(scenes[::2], scenes[1::2], strict=True):
        item = compare(left, right, pool)
        assert item == compare(left, right, pool)
        assert item["label"] == str(pair_truth(item))
        for before, after in zip((left, right), item["scenes"], strict=True):
            assert after.things[1:] == before.things[1:]
            assert after.things[0].box == before.things[0].box
            assert len(after.compositions) == objects
            assert split != "train" or heldout.isdisjoint(after.compositions)


@given(seeds, splits, st.integers(1, 4), layouts)
@settings(max_examples=60, deadline=None)
def test_questions_have_the_right_answer(seed, split, objects, layout):
    pool = allowed_compositions(split, HELDOUT)
    for scene in make_scenes(split, 5, seed, objects, HELDOUT, layout):
        question = ask(scene, pool)
        assert question == ask(scene, pool)
        assert question["answer"] == {answer(question): 1.0}
        assert answer(question) in ANSWERS and question["kind"] in KINDS


@given(seeds, st.integers(1, 4), layouts, st.sampled_from([None, "size", "colour", "shape"]))
@settings(max_examples=60, deadline=None)
def test_references_fit_only_one_thing_and_keep_the_secret(seed, objects, layout, secret):
    (scene,) = make_scenes("test", 1, seed, objects, HELDOUT, layout)
    found = references(scene.things, secret)
    assert len({reference.text for reference in found}) == len(found)
    for reference in found:
        (thing,), anchor = meant(reference.text, scene.things)
        assert thing is reference.thing and anchor is reference.anchor
        if secret and anchor is None:
            assert getattr(thing, secret) not in reference.text.split()
    item = refer(scene)
    assert (item["text"], item["box"]) in [(r.text, r.thing.box) for r in references(scene.things)]
    assert item["boxes"] == [thing.box for thing in scene.things]
    if secret is None:
        assert {reference.thing for reference in found} == set(scene.things)


def test_no_reference_is_left_out():
    """All nouns that fit exactly one thing are found."""
    sizes, colours, shapes = ("", "small "), ("", *(f"{c} " for c in COLOURS)), ("thing", *SHAPES)
    every = [s + c + n for s in (*sizes, "large ") for c in colours for n in shapes]
    for scene in make_scenes("test", 30, objects=3):
        unambiguous = {f"the {n}" for n in every if len(things_called(n, scene.things)) == 1}
        found = [r.text for r in references(scene.things) if r.anchor is None]
        # A noun of fewer words may be followed by "thing" alone, which names nothing.
        assert set(found) == unambiguous - {"the thing"}


@given(seeds, st.integers(2, 4), layouts)
@settings(max_examples=60, deadline=None)
def test_captions_are_true_and_foils_are_false(seed, objects, layout):
    for scene in make_scenes("test", 5, seed, objects, HELDOUT, layout):
        items = foils(scene)
        assert items == foils(scene) and tuple(item["group"] for item in items) == FOILS
        for item in items:
            assert caption_truth(item["caption"], scene.things)
            assert not caption_truth(item["foil"], scene.things), item


def test_foils_change_what_their_group_says():
    opposite = {"above": "below", "below": "above", "left": "right", "right": "left"}
    for item in (item for scene in make_scenes("test", 200) for item in foils(scene)):
        texts = [item[key].replace(" an ", " a ").split() for key in ("caption", "foil")]
        texts = [["a", *text[1:]] for text in texts]
        changed = [(a, b) for a, b in zip(*texts, strict=True) if a != b]
        if item["group"] == "swap":
            (a, b), (c, d) = changed
            assert (a, b) == (d, c) and sorted(texts[0]) == sorted(texts[1])
        else:
            ((old, new),) = changed
            values = {"colour": COLOURS, "shape": SHAPES, "size": ("small", "large")}
            if item["group"] == "relation":
                assert opposite[old] == new
            else:
                assert {old, new} <= {*values[item["group"]]}


@given(seeds, st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_a_curtain_hides_a_thing_that_the_foil_does_not_change(seed, objects):
    for scene in make_scenes("test", 5, seed, objects):
        items = foils(scene, curtain=True)
        assert tuple(item["group"] for item in items) == foil_groups(objects, True)
        for item in items:
            hidden = hidden_by(item["curtain"], scene.things)
            name = f"{hidden.size} {hidden.colour} {hidden.shape}"
            assert name in item["caption"] and name in item["foil"]
            assert not caption_truth(item["foil"], scene.things)
