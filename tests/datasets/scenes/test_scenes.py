"""Scenes: true captions, exact boxes, held-out compositions, and the datasets made of them."""

import re
import string
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from toy_builders import build_scenes
from transformers import BertTokenizerFast

from softmask_plugin.config.paths import PACKAGE
from softmask_plugin.datasets.scenes.grammar import (
    ABOVE,
    BELOW,
    COLOURS,
    COMPOSITIONS,
    LAYOUTS,
    LEFT,
    MAX_OBJECTS,
    RIGHT,
    SHAPES,
    SIZES,
    captions,
    heldout_compositions,
    make_scenes,
)
from softmask_plugin.datasets.scenes.render import OUTLINES, render, stencil
from softmask_plugin.errors import UserError

VOCABULARY = PACKAGE / "assets" / "scenes_vocab.txt"
THING = re.compile(rf"(?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")
seeds = st.integers(0, 2**40)
counts = st.integers(1, MAX_OBJECTS)
layouts = st.sampled_from(sorted(LAYOUTS))


def is_true(relation, a, b):
    """The relation in terms of boxes: things do not overlap along its axis."""
    return {
        LEFT: a.box[2] < b.box[0],
        RIGHT: a.box[0] > b.box[2],
        ABOVE: a.box[3] < b.box[1],
        BELOW: a.box[1] > b.box[3],
    }[relation]


def parse(text, scene):
    """Things that a caption names, in order, and its (relation, object) pairs."""
    by_composition = {thing.composition: thing for thing in scene.things}
    named = []
    for size, *composition in THING.findall(text):
        thing = by_composition[tuple(composition)]
        assert size in ("", thing.size)
        named.append(thing)
    relations = re.findall(f"{LEFT}|{RIGHT}|{ABOVE}|{BELOW}", text)
    return named, relations


@given(seeds, counts, st.sampled_from(["train", "val", "test"]), layouts)
@settings(max_examples=60, deadline=None)
def test_captions_are_true_and_complete(seed, objects, split, layout):
    for scene in make_scenes(split, 3, seed, objects, layout=layout):
        known = captions(scene)
        assert len({c.text for c in known}) == len(known) == (5 if objects > 1 else 4)
        for caption in known:
            named, relations = parse(caption.text, scene)
            assert set(named) == set(scene.things)
            assert len(relations) in (0, objects - 1)
            for relation, other in zip(relations, named[1:], strict=False):
                assert is_true(relation, named[0], other), caption.text
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption.text)


@given(seeds, counts, layouts)
@settings(max_examples=60, deadline=None)
def test_things_are_apart_inside_the_image_and_clearly_related(seed, objects, layout):
    for scene in make_scenes("train", 3, seed, objects, layout=layout):
        assert len(scene.compositions) == objects
        for thing in scene.things:
            assert min(thing.box) > 0.01 and max(thing.box) < 0.99
        for a, b in combinations(scene.things, 2):
            dx, dy = abs(a.x - b.x), abs(a.y - b.y)
            assert max(dx, dy) >= 1.5 * min(dx, dy)
            assert max(dx, dy) > (a.diameter + b.diameter) / 2


@given(seeds, counts)
@settings(max_examples=20, deadline=None)
def test_boxes_belong_to_the_words(seed, objects):
    (scene,) = make_scenes("test", 1, seed, objects)
    for caption in captions(scene):
        words = caption.text.split()
        told = {"size": SIZES, "colour": COLOURS, "shape": SHAPES}
        for index, box, role in caption.boxes:
            (thing,) = (t for t in scene.things if t.box == box)
            assert words[index] == getattr(thing, role) and words[index] in told[role]
        covered = {index for index, _, _ in caption.boxes}
        nouns = {i for i, w in enumerate(words) if any(w in names for names in told.values())}
        assert covered == nouns


@given(seeds, counts)
@settings(max_examples=20, deadline=None)
def test_things_on_the_board_stand_in_the_middle_of_different_cells(seed, objects):
    (scene,) = make_scenes("test", 1, seed, objects, layout="board")
    middles = {1 / 6: 0, 1 / 2: 1, 5 / 6: 2}
    cells = {(middles[thing.x], middles[thing.y]) for thing in scene.things}
    assert len(cells) == objects
    assert {t.diameter for t in scene.things} <= set(LAYOUTS["board"].diameters.values())


def test_free_things_stand_anywhere():
    things = [t for scene in make_scenes("test", 300, layout="free") for t in scene.things]
    for values in ([t.x for t in things], [t.y for t in things], [t.diameter for t in things]):
        assert len(set(values)) == len(values)
    places, _ = np.histogramdd(
        np.array([(t.x, t.y) for t in things]), bins=4, range=[(0.1, 0.9)] * 2
    )
    assert places.min() > 0


@pytest.mark.parametrize(("size", "layout"), [(64, "board"), (64, "free"), (200, "board")])
def test_boxes_are_tight_around_what_is_drawn(size, layout):
    for scene in make_scenes("test", 72, objects=1, layout=layout):
        image = np.asarray(render(scene, size)).astype(int)
        ground = np.median(image[0], axis=0)  # the top row is never drawn on
        ys, xs = np.nonzero(np.abs(image - ground).max(axis=2) > 15)
        drawn = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        # Half a pixel for rounding, one for a tip too thin to be seen on this ground.
        assert np.abs(drawn - np.array(scene.things[0].box) * size).max() <= 1.5


def test_every_shape_and_colour_looks_different():
    assert set(OUTLINES) == set(SHAPES)
    for a, b in combinations(SHAPES, 2):
        first, second = (np.asarray(stencil(s, 15, 15), dtype=float) / 255 for s in (a, b))
        assert np.abs(first - second).mean() > 0.1, (a, b)
    grounds = [(212,) * 3, (230,) * 3]
    for x, y in combinations([*COLOURS.values(), grounds[0]], 2):
        assert np.linalg.norm(np.subtract(x, y)) > 70, (x, y)


@given(seeds)
@settings(max_examples=5, deadline=None)
def test_a_scene_depends_only_on_seed_split_and_index(seed):
    for split in ("train", "test"):
        many = make_scenes(split, 12, seed)
        assert make_scenes(split, 5, seed) == many[:5]
        assert len(set(many)) == 12
    assert make_scenes("train", 5, seed) != make_scenes("train", 5, seed + 1)
    assert make_scenes("val", 5, seed) != make_scenes("test", 5, seed)
    assert render(many[0], 32).tobytes() == render(many[0], 32).tobytes()


def test_heldout_compositions_never_reach_training():
    heldout = heldout_compositions(0.125)
    assert len(heldout) == 9
    train, test = make_scenes("train", 2000), make_scenes("test", 500)
    shown = set().union(*(scene.compositions for scene in train))
    assert shown == set(COMPOSITIONS) - heldout
    novel = [not heldout.isdisjoint(scene.compositions) for scene in test]
    assert 0.15 < np.mean(novel) < 0.35


@given(st.floats(0, 0.5))
def test_colours_and_shapes_share_the_held_out_evenly(fraction):
    heldout = heldout_compositions(fraction)
    for position, names, spread in ((0, COLOURS, 1), (1, SHAPES, 2)):
        lost = [sum(pair[position] == name for pair in heldout) for name in names]
        assert max(lost) - min(lost) <= spread and max(lost) <= 5


@pytest.mark.parametrize(("objects", "num"), [(1, 72), (2, 2556), (3, 500)])
def test_no_two_evaluation_scenes_show_the_same(objects, num):
    scenes = make_scenes("val", num, objects=objects)
    assert len({scene.compositions for scene in scenes}) == num


def vocabulary():
    """One token per word of the grammar, then letters and digits, which spell any ASCII text."""
    captions = "there is a an and picture of"
    tasks = """are both colour how image images many no one only other shape show shows size thing
        things what yes"""
    phrases = (*COLOURS, *SHAPES, *SIZES, LEFT, RIGHT, ABOVE, BELOW, captions, tasks)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(" ".join(phrases).split()))]
    characters = string.ascii_lowercase + string.digits
    tokens += [c for c in characters if c not in tokens]
    return tokens + [f"##{c}" for c in characters]


def test_vocabulary_file_holds_the_grammar():
    assert VOCABULARY.read_text(encoding="utf-8").splitlines() == vocabulary()
    assert len(set(vocabulary())) == len(vocabulary())
    tokenizer = BertTokenizerFast(vocab_file=str(VOCABULARY))
    for objects in range(1, MAX_OBJECTS + 1):
        for scene in make_scenes("test", 72, objects=objects):
            for caption in captions(scene):
                assert tokenizer.tokenize(caption.text) == caption.text.split()
    assert "[UNK]" not in tokenizer.tokenize("2 zebras graze beneath 15 baobabs")


# The datasets and builders


def test_retrieval_datasets_have_the_layout_of_lavis():
    datasets = build_scenes("scenes_retrieval", 6)
    assert list(datasets) == ["train", "val", "test"]
    test = datasets["test"]
    assert len(test) == len(test.image) == 6 and len(test.text) == 12
    for image, texts in test.img2txt.items():
        assert [test.txt2img[text] for text in texts] == [image] * 2
        (scene,) = test.annotation[image]["scenes"]
        word_boxes = test.annotation[image]["word_boxes"]
        for text, boxes, caption in zip(texts, word_boxes, captions(scene), strict=False):
            # The processor changes nothing, so that word indices hold for the processed text.
            assert test.text[text] == caption.text and boxes == caption.boxes
            named = {test.text[text].split()[index] for index, _, _ in boxes}
            assert {word for t in scene.things for word in t.composition} <= named
    batch = next(iter(DataLoader(test, batch_size=6, collate_fn=test.collater)))
    assert batch["image"].shape == (6, 3, 60, 60) and batch["index"].tolist() == list(range(6))
    assert batch["image"].dtype == torch.float32


def test_training_draws_captions_by_torchs_seed():
    train = build_scenes("scenes_pretrain", 6)["train"]
    torch.manual_seed(0)
    first = [train[3]["text_input"] for _ in range(60)]
    torch.manual_seed(0)
    assert [train[3]["text_input"] for _ in range(60)] == first
    (scene,) = train.annotation[3]["scenes"]
    assert set(first) == {caption.text for caption in captions(scene)}
    sample = train[3]
    assert sample["image"].shape == (3, 60, 60)
    assert (sample["image_id"], sample["instance_id"]) == (3, "3")


def test_images_do_not_depend_on_workers():
    test = build_scenes("scenes_retrieval", 6)["test"]
    plain, parallel = (
        torch.cat([batch["image"] for batch in DataLoader(test, batch_size=2, num_workers=workers)])
        for workers in (0, 2)
    )
    assert torch.equal(plain, parallel)


def test_one_key_sets_the_image_size_everywhere():
    datasets = build_scenes("scenes_retrieval", 6, {"image_size": 48})
    assert datasets["train"][0]["image"].shape == datasets["val"][0]["image"].shape == (3, 48, 48)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 15}, "image_size is 15"),
        ({"image_size": "big"}, "whole number"),
        ({"objects": 0}, "from 1 to 4"),
        ({"objects": True}, "whole number"),
        ({"seed": -1}, "seed is -1"),
        ({"heldout": 0.6}, "from 0 to 0.5"),
        ({"num": {"test": 0}}, "num.test is 0"),
        ({"num": {"test": 2557}}, "only 2556 do: ask for fewer"),
        ({"num": 500}, "each of train, val, test"),
        ({"num": {"tset": 5}}, "num.tset: did you mean 'test'"),
        ({"captions_per_image": 6}, "has 5 captions"),
        ({"objects": 1, "captions_per_image": 5}, "has 4 captions"),
        ({"held_out": 0.1}, "did you mean 'heldout'"),
        ({"layout": "bord"}, "did you mean 'board'"),
    ],
)
def test_wrong_settings_give_a_one_line_error(changes, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        build_scenes("scenes_retrieval", 6, changes)
    assert "\n" not in str(error.value)
