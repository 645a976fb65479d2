"""Statements, questions and expressions about scenes: each is read back and checked by itself."""

import gc
import json
import math
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

import softmask_plugin  # noqa: F401  (registers the builders, processors and tasks)
from softmask_plugin.datasets.scene_task_datasets import SceneEntailmentDataset
from softmask_plugin.datasets.scene_tasks import (
    ANSWERS,
    KINDS,
    Pair,
    ask,
    entail,
    pair_up,
    refer,
    references,
)
from softmask_plugin.datasets.scenes import (
    COLOURS,
    COMPOSITIONS,
    LAYOUTS,
    SHAPES,
    allowed_compositions,
    heldout_compositions,
    make_scenes,
)
from softmask_plugin.errors import UserError
from softmask_plugin.tokenization import build_tokenizer

HELDOUT = 0.125
TASKS = ("entailment", "nlvr", "vqa", "grounding")
seeds = st.integers(0, 2**40)
splits = st.sampled_from(["train", "val", "test"])
layouts = st.sampled_from(sorted(LAYOUTS))

# What a sentence says, read without the code that wrote it

DIRECTIONS = {
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
NOUN = rf"(?:(small|large) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)}|thing)"


def things_called(noun, things):
    """All things that fit "red circle", "large thing", ..."""
    size, colour, shape = re.fullmatch(NOUN, noun).groups()
    wanted = {"size": size, "colour": colour, "shape": None if shape == "thing" else shape}
    return [t for t in things if all(v in (None, getattr(t, k)) for k, v in wanted.items())]


def lies(thing, how, anchor):
    """Whether a thing lies within 45 degrees of a direction, seen from another."""
    way = np.array([thing.x - anchor.x, thing.y - anchor.y])
    return way @ DIRECTIONS[how] > math.cos(math.pi / 4) * np.linalg.norm(way)


def meant(expression, things):
    """All things that fit "the red circle" or "the thing above the red circle", and the anchor."""
    related = re.fullmatch(rf"the thing ({'|'.join(DIRECTIONS)}) the (.+)", expression)
    if related is None:
        return things_called(expression.removeprefix("the "), things), None
    (anchor,) = things_called(related[2], things)
    return [t for t in things if t is not anchor and lies(t, related[1], anchor)], anchor


def hidden_by(curtain, things):
    """The one thing behind a curtain that touches no other."""
    (x0, y0, x1, y1), behind = curtain, []
    for thing in things:
        a0, b0, a1, b1 = thing.box
        if x0 <= a0 and y0 <= b0 and a1 <= x1 and b1 <= y1:
            behind.append(thing)
        else:
            assert a1 <= x0 or x1 <= a0 or b1 <= y0 or y1 <= b0
    (thing,) = behind
    return thing


def entailment_label(item):
    expression, value = re.fullmatch(r"(the .+) is (?:an? )?(\w+)", item.text).groups()
    (thing,), anchor = meant(expression, item.scene.things)
    hidden = hidden_by(item.curtain, item.scene.things)
    assert anchor is not hidden
    if thing is hidden:
        return "neutral"
    assert value in COLOURS or value in SHAPES
    return "entailment" if value in thing.composition else "contradiction"


def nouns(text):
    """The things that a statement or question names with an article."""
    return [match[0].partition(" ")[2] for match in re.finditer(rf"\ban? {NOUN}", text)]


def pair_truth(item):
    """Whether a statement about two images is true."""
    shown = [
        [bool(things_called(noun, scene.things)) for noun in nouns(item.text)]
        for scene in (item.left, item.right)
    ]
    (left, *left_second), (right, *right_second) = shown
    if item.text.startswith("both images show"):
        return left and right
    if item.text.startswith("only one image shows"):
        return left != right
    (left_second,), (right_second,) = left_second, right_second
    if item.text.startswith("one image shows"):
        return (left and right_second) or (right and left_second)
    assert item.text.startswith("the left image shows")
    return left and right_second


def answer(question):
    """The answer to a question."""
    text, things = question.text, question.scene.things
    if asked := re.fullmatch(r"what (colour|shape|size) is (.+)", text):
        (thing,), _ = meant(asked[2], things)
        return getattr(thing, asked[1])
    if asked := re.fullmatch(r"how many (.+) are there", text):
        return str(len(things_called(asked[1].removesuffix("s"), things)))
    (noun,) = nouns(re.fullmatch(r"is there (.+)", text)[0])
    return "yes" if things_called(noun, things) else "no"


# Ground truth


@given(seeds, splits, st.integers(2, 4), layouts)
@settings(max_examples=60, deadline=None)
def test_hypotheses_have_the_label_they_are_given(seed, split, objects, layout):
    pool = allowed_compositions(split, HELDOUT)
    for scene in make_scenes(split, 5, seed, objects, HELDOUT, layout):
        item = entail(scene, pool)
        assert item == entail(scene, pool)
        assert item.label == entailment_label(item)


def test_a_neutral_hypothesis_is_true_in_one_world_and_false_in_another_of_the_same_picture():
    items = [entail(scene, COMPOSITIONS) for scene in make_scenes("test", 60, objects=3)]
    neutral = [item for item in items if item.label == "neutral"]
    assert len(neutral) > 10
    for item in neutral:
        hidden = hidden_by(item.curtain, item.scene.things)
        value = item.text.split()[-1]
        secret, values = ("colour", COLOURS) if value in COLOURS else ("shape", SHAPES)
        other = next(name for name in values if name != value)
        worlds = []
        for truth in (value, other):
            changed = [
                replace(thing, **{secret: truth}) if thing is hidden else thing
                for thing in item.scene.things
            ]
            worlds.append(replace(item, scene=replace(item.scene, things=tuple(changed))))
        pictures = SceneEntailmentDataset(np.asarray, str, worlds, 60)
        assert (pictures[0]["image"] == pictures[1]["image"]).all()


@given(seeds, splits, st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_statements_about_pairs_are_as_true_as_they_are_said_to_be(seed, split, objects):
    pool, heldout = allowed_compositions(split, HELDOUT), heldout_compositions(HELDOUT)
    scenes = make_scenes(split, 10, seed, objects, HELDOUT)
    for left, right in zip(scenes[::2], scenes[1::2], strict=True):
        item = pair_up(left, right, pool, heldout)
        assert item == pair_up(left, right, pool, heldout)
        assert item.label == pair_truth(item)
        for before, after in ((left, item.left), (right, item.right)):
            assert after.things[1:] == before.things[1:]
            assert after.things[0].box == before.things[0].box
            assert len(after.compositions) == objects
            assert after.novel == (not heldout.isdisjoint(after.compositions))


@given(seeds, splits, st.integers(1, 4), layouts)
@settings(max_examples=60, deadline=None)
def test_questions_have_the_answer_they_are_given(seed, split, objects, layout):
    pool = allowed_compositions(split, HELDOUT)
    for scene in make_scenes(split, 5, seed, objects, HELDOUT, layout):
        question = ask(scene, pool)
        assert question == ask(scene, pool)
        assert question.answer == answer(question)
        assert question.answer in ANSWERS and question.kind in KINDS


@given(seeds, st.integers(1, 4), layouts, st.sampled_from([None, "size", "colour", "shape"]))
@settings(max_examples=60, deadline=None)
def test_references_fit_one_thing_alone_and_keep_the_secret(seed, objects, layout, secret):
    (scene,) = make_scenes("test", 1, seed, objects, HELDOUT, layout)
    found = references(scene.things, secret)
    assert len({reference.text for reference in found}) == len(found)
    for reference in found:
        (thing,), anchor = meant(reference.text, scene.things)
        assert thing is reference.thing and anchor is reference.anchor
        if secret and anchor is None:
            assert getattr(thing, secret) not in reference.text.split()
    assert refer(scene) in references(scene.things)
    if secret is None:
        assert {reference.thing for reference in found} == set(scene.things)


def test_no_reference_is_left_out():
    """Of all nouns there are, those that fit one thing alone."""
    sizes, colours, shapes = ("", "small "), ("", *(f"{c} " for c in COLOURS)), ("thing", *SHAPES)
    every = [s + c + n for s in (*sizes, "large ") for c in colours for n in shapes]
    for scene in make_scenes("test", 30, objects=3):
        unambiguous = {f"the {n}" for n in every if len(things_called(n, scene.things)) == 1}
        found = [r.text for r in references(scene.things) if r.anchor is None]
        # A noun of fewer words may be followed by "thing" alone, which names nothing.
        assert set(found) == unambiguous - {"the thing"}


# Balance: what can be told without seeing, or without seeing all


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
    heldout = heldout_compositions(HELDOUT)
    return [pair_up(*two, pool, heldout) for two in zip(scenes, scenes[1:], strict=False)]


def test_entailment_needs_both_the_words_and_the_picture(hypotheses):
    labels = [item.label for item in hypotheses]
    assert all(abs(n / len(labels) - 1 / 3) < 0.03 for n in Counter(labels).values())
    assert naive_bayes([item.text.split() for item in hypotheses], labels) < 1 / 3 + 0.04

    def seen(item):
        hidden = hidden_by(item.curtain, item.scene.things)
        x0, y0, x1, y1 = item.curtain
        yield f"curtain {cell((x0 + x1) / 2, (y0 + y1) / 2)} {x1 - x0:.1f}"
        for thing in item.scene.things:
            if thing is not hidden:
                yield from (*thing.composition, thing.size, cell(thing.x, thing.y))

    assert naive_bayes([list(seen(item)) for item in hypotheses], labels) < 1 / 3 + 0.04
    templates = Counter(re.sub(NOUN, "X", item.text).split()[-2] for item in hypotheses)
    assert min(templates.values()) > 500  # "is red" and "a circle"


def test_contradictions_often_bind_what_is_shown_wrongly(hypotheses):
    wrong = [item for item in hypotheses if item.label == "contradiction"]
    shown = [
        item.text.split()[-1] in {word for t in item.scene.things for word in t.composition}
        for item in wrong
    ]
    assert np.mean(shown) > 0.4


def test_nlvr_needs_both_images(pairs):
    labels = [item.label for item in pairs]
    assert abs(np.mean(labels) - 0.5) < 0.03
    assert naive_bayes([item.text.split() for item in pairs], labels) < 0.54
    alone = {"both": 0.75, "only": 0.5, "one": 0.5, "the": 5 / 6}
    for word, expected in alone.items():
        for side in ("left", "right"):
            seen = {}
            for item in pairs:
                if item.text.split()[0] == word:
                    things = getattr(item, side).things
                    what = tuple(bool(things_called(noun, things)) for noun in nouns(item.text))
                    seen.setdefault(what, Counter())[item.label] += 1
            total = sum(sum(counts.values()) for counts in seen.values())
            assert total > 800
            guessed = sum(max(counts.values()) for counts in seen.values()) / total
            assert guessed == pytest.approx(expected, abs=0.04), (word, side)


def test_answers_cannot_be_guessed_from_the_question(questions):
    by_kind = {kind: [q for q in questions if q.kind == kind] for kind in KINDS}
    assert min(map(len, by_kind.values())) > 300
    values = {"colour": 7, "shape": 7, "size": 2, "exists": 2, "count": 4}
    for kind, asked in by_kind.items():
        answers = [question.answer for question in asked]
        # In training each shape lacks one colour, and each colour one shape or two.
        assert len(set(answers)) >= values[kind]
        chance = 1 / values[kind]
        deviation = math.sqrt(chance * (1 - chance) / len(asked))
        most = Counter(answers).most_common(1)[0][1] / len(answers)
        assert most < chance + 3.5 * deviation, kind
        guessed = naive_bayes([question.text.split() for question in asked], answers)
        assert guessed < chance + 3.5 * math.sqrt(2) * deviation, kind


def test_absent_things_often_have_a_colour_and_a_shape_that_are_shown(questions):
    absent = [q for q in questions if q.answer == "no"]
    bound = []
    for question in absent:
        colour, shape = question.text.split()[-2:]
        colours, shapes = zip(*question.scene.compositions, strict=True)
        bound.append(colour in colours and shape in shapes)
    assert 0.4 < np.mean(bound) < 0.6


def test_training_never_names_what_is_held_out(hypotheses, pairs, questions):
    heldout = {" ".join(pair) for pair in heldout_compositions(HELDOUT)}
    for item in (*hypotheses, *pairs, *questions):
        assert not any(name in item.text for name in heldout)
    for item in hypotheses:  # nor across the verb, as in "the circle is cyan"
        words = re.fullmatch(r"the (?:small |large )?(\w+) is (\w+)", item.text)
        if words and words[1] in SHAPES:
            assert f"{words[2]} {words[1]}" not in heldout


# The data sets, as LAVIS's tasks read them


def build(name, changes=None, num=6):
    builder = registry.get_builder_class(name)
    config = OmegaConf.load(builder.default_config_path())
    few = {"num": dict.fromkeys(config.datasets[name].num, num)}
    for update in (few, changes or {}):
        config = OmegaConf.merge(config, {"datasets": {name: update}})
    return builder(config.datasets[name]).build_datasets()


def scenes_of(item):
    if isinstance(item, Pair):
        return [item.left, item.right]
    return [item[0] if isinstance(item, tuple) else item.scene]


def task_of(name):
    return registry.get_task_class(name).setup_task(cfg=SimpleNamespace(run_cfg=OmegaConf.create()))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A run's folders, as LAVIS's runner registers them."""
    for name in ("output_dir", "result_dir"):
        monkeypatch.setitem(registry.mapping["paths"], name, str(tmp_path))
    return tmp_path


def evaluate(task, model, dataset, split="test"):
    """What LAVIS's runners do for a split."""
    task.before_evaluation(model=model, dataset=dataset)
    loader = DataLoader(dataset, 7, collate_fn=dataset.collater)
    found = task.evaluation(model, loader, cuda_enabled=False)
    return task.after_evaluation(val_result=found, split_name=split, epoch="best")


class Classifier:
    """Stands in for a model of the ``multimodal_classification`` task."""

    def __init__(self, guess, classes):
        self.guess, self.classes = guess, classes

    def before_evaluation(self, **_):
        pass

    def predict(self, samples):
        guesses = [self.guess(int(i)) for i in samples["instance_id"]]
        logits = torch.nn.functional.one_hot(torch.tensor(guesses), self.classes)
        return {"predictions": logits, "targets": samples["label"]}


@pytest.mark.parametrize(
    ("name", "read", "numbers"),
    [
        ("entailment", entailment_label, {"contradiction": 0, "neutral": 1, "entailment": 2}),
        ("nlvr", pair_truth, {False: 0, True: 1}),
    ],
)
def test_lavis_classifies(name, read, numbers, folders):
    dataset = build(f"scenes_{name}", num=300)["test"]
    task = task_of("multimodal_classification")
    oracle = Classifier(lambda i: numbers[read(dataset.items[i])], len(numbers))
    assert evaluate(task, oracle, dataset)["agg_metrics"] == 1.0
    for number in numbers.values():
        constant = Classifier(lambda _, number=number: number, len(numbers))
        accuracy = evaluate(task, constant, dataset)["agg_metrics"]
        assert accuracy == pytest.approx(1 / len(numbers), abs=0.09)


def test_lavis_answers_and_scores_questions(folders):
    task = task_of("vqa")
    builder = registry.get_builder_class("scenes_vqa")
    config = OmegaConf.load(builder.default_config_path()).datasets
    config.scenes_vqa.num = {"train": 2, "val": 30, "test": 60}
    datasets = task.build_datasets(SimpleNamespace(datasets_cfg=config))["scenes_vqa"]
    assert task.answer_list == list(ANSWERS)

    def model(guess):
        def predict_answers(samples, answer_list, **_):
            assert all(text for text in samples["text_input"])
            return [guess(int(i)) for i in samples["question_id"]]

        return SimpleNamespace(predict_answers=predict_answers, before_evaluation=lambda **_: None)

    for split in ("val", "test"):
        data = datasets[split]
        oracle = model(lambda i, data=data: answer(data.items[i]))
        metrics = evaluate(task, oracle, data, split)
        assert metrics == {"agg_metrics": 100.0, "yes/no": 100.0, "number": 100.0, "other": 100.0}
        share = np.mean([question.answer == "yes" for question in data.items])
        metrics = evaluate(task, model(lambda _: "yes"), data, split)
        assert metrics["agg_metrics"] == pytest.approx(100 * share, abs=0.01)


def test_questions_are_collated_by_lavis_to_train():
    train = build("scenes_vqa")["train"]
    batch = train.collater([train[i] for i in range(4)])
    assert batch["image"].shape == (4, 3, 60, 60)
    assert batch["answer"] == [answer(question) for question in train.items[:4]]
    assert batch["n_answers"].tolist() == [1] * 4 and batch["weight"].tolist() == [1.0] * 4


def test_official_files_live_as_long_as_the_data_set():
    data = build("scenes_vqa")["val"]
    files = [Path(data.coco_fmt_qust_file), Path(data.coco_fmt_anno_file)]
    for _ in DataLoader(data, batch_size=2, num_workers=1):
        pass
    annotations = json.loads(files[1].read_text())["annotations"]
    assert [{a["answer"] for a in entry["answers"]} for entry in annotations] == [
        {question.answer} for question in data.items
    ]
    assert all(len(entry["answers"]) == 10 for entry in annotations)
    del data
    gc.collect()
    assert not any(file.exists() for file in files)


def test_grounding_finds_the_thing_meant():
    datasets = build("scenes_grounding", {"objects": 3}, num=50)
    assert list(datasets) == ["val", "test"]
    for split, data in datasets.items():
        for index, entry in enumerate(data.annotation):
            things = data.items[index][0].things
            (thing,), _ = meant(entry["text"], things)
            assert entry["box"] == thing.box
            assert entry["boxes"] == [thing.box for thing in things]
            assert entry["group"] == split
            sample = data[index]
            assert sample["index"] == index and sample["instance_id"] == str(index)
            assert sample["text_input"] == entry["text"]
    related = [re.match("the thing .+ the", entry["text"]) for entry in data.annotation]
    assert 10 < sum(map(bool, related)) < 40


@torch.no_grad()
def test_the_grounding_task_reads_it(make_model, folders):
    model = make_model().eval()
    data = build("scenes_grounding", {"image_size": 32}, num=8)["test"]
    task = task_of("softmask_grounding")
    metrics = evaluate(task, model, data)
    assert metrics["acc_chance"] == metrics["acc_chance_test"] == 50.0
    assert 0 <= metrics["agg_metrics"] <= 100


@pytest.mark.parametrize("name", TASKS)
def test_words_are_tokens_and_processors_change_none(name):
    tokenizer = build_tokenizer("scenes")
    for split, data in build(f"scenes_{name}", num=200).items():
        texts = [data[i]["text_input"] for i in range(200)]
        key = {"vqa": "question", "grounding": "text"}.get(name, "sentence")
        assert texts == [entry[key] for entry in data.annotation], split
        for text in texts:
            assert tokenizer.tokenize(text) == text.split()
    assert all(tokenizer.tokenize(text) == [text] for text in ANSWERS)


@pytest.mark.parametrize("name", TASKS)
def test_items_depend_on_seed_split_and_index_alone(name):
    many, few = (build(f"scenes_{name}", num=num) for num in (9, 5))
    other = build(f"scenes_{name}", {"seed": 1}, num=5)
    for split in many:
        assert list(many[split].items[:5]) == list(few[split].items)
        assert list(few[split].items) != list(other[split].items)
    assert list(few["val"].items) != list(few["test"].items)


@pytest.mark.parametrize("name", TASKS)
def test_one_key_sets_the_image_size_and_objects_and_layout_are_used(name):
    changes = {"image_size": 48, "objects": 2, "layout": "free", "heldout": 0.5}
    for split, data in build(f"scenes_{name}", changes, num=20).items():
        images = [value for key, value in data[0].items() if key.startswith("image")]
        assert [tuple(image.shape) for image in images] == [(3, 48, 48)] * (1 + (name == "nlvr"))
        scenes = [scene for item in data.items for scene in scenes_of(item)]
        assert {len(scene.things) for scene in scenes} == {2}
        assert len({thing.x for scene in scenes for thing in scene.things}) == 2 * len(scenes)
        assert any(scene.novel for scene in scenes) == (split != "train")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("entailment", {"objects": 1}, "datasets.scenes_entailment.objects is 1: it must be a"),
        ("entailment", {"curtain": True}, "unknown key datasets.scenes_entailment.curtain"),
        ("entailment", {"heldout": -1}, "from 0 to 0.5"),
        ("nlvr", {"num": {"test": 1279}}, "only 2556 do: ask for fewer"),
        ("nlvr", {"objects": 5}, "from 1 to 4"),
        ("vqa", {"num": {"tset": 5}}, "num.tset: did you mean 'test'"),
        ("vqa", {"seed": 0.5}, "whole number"),
        ("vqa", {"layout": "bord"}, "did you mean 'board'"),
        ("grounding", {"num": {"train": 5}}, "unknown key datasets.scenes_grounding.num.train"),
        ("grounding", {"objects": 1}, "from 2 to 4"),
        ("grounding", {"image_size": 8}, "image_size is 8"),
    ],
)
def test_wrong_settings_are_told_in_one_line(name, changes, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        build(f"scenes_{name}", changes)
    assert "\n" not in str(error.value)
