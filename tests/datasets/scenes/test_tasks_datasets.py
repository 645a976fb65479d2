"""Data sets of scenes for LAVIS's downstream tasks."""

import gc
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_items
from lavis.common.registry import registry
from omegaconf import OmegaConf
from scene_truth import answer, entailment_label, meant, pair_truth
from torch.utils.data import DataLoader
from toy_builders import build_scenes, section

from softmask_plugin.compare import compare
from softmask_plugin.datasets.scenes.grammar import heldout_compositions
from softmask_plugin.datasets.scenes.tasks import ANSWERS
from softmask_plugin.errors import UserError
from softmask_plugin.vocabulary import build_tokenizer

TASKS = ("entailment", "nlvr", "vqa", "grounding")


def task_of(name):
    return registry.get_task_class(name).setup_task(cfg=SimpleNamespace(run_cfg=OmegaConf.create()))


def evaluate(task, model, dataset, split="test"):
    """What LAVIS's runners do for a split."""
    found = toy_items.evaluate(task, model, dataset, 7)
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
    dataset = build_scenes(f"scenes_{name}", 300)["test"]
    task = task_of("multimodal_classification")
    oracle = Classifier(lambda i: numbers[read(dataset.annotation[i])], len(numbers))
    assert evaluate(task, oracle, dataset)["agg_metrics"] == 1.0
    assert [each.first for each in compare(folders, folders)] == [100]
    for number in numbers.values():
        constant = Classifier(lambda _, number=number: number, len(numbers))
        accuracy = evaluate(task, constant, dataset)["agg_metrics"]
        assert accuracy == pytest.approx(1 / len(numbers), abs=0.09)


def test_lavis_answers_and_scores_questions(folders):
    task = task_of("vqa")
    config = {"scenes_vqa": section("scenes_vqa", {"num": {"train": 2, "val": 30, "test": 60}})}
    datasets = task.build_datasets(SimpleNamespace(datasets_cfg=config))["scenes_vqa"]
    assert task.answer_list == list(ANSWERS)

    def model(guess):
        def predict_answers(samples, answer_list, **_):
            assert all(text for text in samples["text_input"])
            return [guess(int(i)) for i in samples["question_id"]]

        return SimpleNamespace(predict_answers=predict_answers, before_evaluation=lambda **_: None)

    for split in ("val", "test"):
        data = datasets[split]
        oracle = model(lambda i, data=data: answer(data.annotation[i]))
        metrics = evaluate(task, oracle, data, split)
        assert metrics == {"agg_metrics": 100.0, "yes/no": 100.0, "number": 100.0, "other": 100.0}
        share = np.mean([entry["answer"] == {"yes": 1.0} for entry in data.annotation])
        metrics = evaluate(task, model(lambda _: "yes"), data, split)
        assert metrics["agg_metrics"] == pytest.approx(100 * share, abs=0.01)


def test_lavis_collates_training_questions():
    train = build_scenes("scenes_vqa", 6)["train"]
    batch = train.collater([train[i] for i in range(4)])
    assert batch["image"].shape == (4, 3, 60, 60)
    assert batch["answer"] == [answer(entry) for entry in train.annotation[:4]]
    assert batch["n_answers"].tolist() == [1] * 4 and batch["weight"].tolist() == [1.0] * 4


def test_official_files_live_as_long_as_the_data_set():
    data = build_scenes("scenes_vqa", 6)["val"]
    files = [Path(data.coco_fmt_qust_file), Path(data.coco_fmt_anno_file)]
    for _ in DataLoader(data, batch_size=2, num_workers=1):
        pass
    annotations = json.loads(files[1].read_text())["annotations"]
    assert [{a["answer"] for a in entry["answers"]} for entry in annotations] == [
        set(entry["answer"]) for entry in data.annotation
    ]
    assert all(len(entry["answers"]) == 10 for entry in annotations)
    del data
    gc.collect()
    assert not any(file.exists() for file in files)


def test_grounding_finds_the_thing_meant():
    datasets = build_scenes("scenes_grounding", 50, {"objects": 3})
    assert list(datasets) == ["val", "test"]
    for split, data in datasets.items():
        for index, entry in enumerate(data.annotation):
            things = entry["scenes"][0].things
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
    data = build_scenes("scenes_grounding", 8, {"image_size": 32})["test"]
    task = task_of("softmask_grounding")
    metrics = evaluate(task, model, data)
    assert metrics["acc_chance"] == metrics["acc_chance_test"] == 50.0
    assert 0 <= metrics["agg_metrics"] <= 100


def test_foils_are_balanced_and_name_their_scene(make_model, folders):
    data = build_scenes("scenes_foils", 5003)["test"]
    counts = Counter(entry["group"] for entry in data.annotation)
    assert len(data) == 5003 and sorted(counts.values()) == [1000, 1000, 1001, 1001, 1001]
    for entry, other in zip(data.annotation, data.annotation[5:], strict=False):
        assert entry["image"] != other["image"] and entry["group"] == other["group"]
    assert data.annotation[0]["image"] == data.annotation[4]["image"] == "scene 0"
    sample = data[7]
    assert {key: sample[key] for key in ("caption", "foil", "instance_id", "index")} == {
        **{key: data.annotation[7][key] for key in ("caption", "foil")},
        **{"instance_id": "7", "index": 7},
    }
    open_view, hidden = (
        build_scenes("scenes_foils", 9, {"curtain": curtain, "image_size": 32})["test"]
        for curtain in (False, True)
    )
    assert [entry["group"] for entry in hidden.annotation] == ["colour", "shape", "size"] * 3
    assert not torch.equal(open_view[0]["image"], hidden[0]["image"])
    metrics = evaluate(task_of("softmask_foils"), make_model().eval(), hidden)
    assert 0 <= metrics["acc_size"] <= 100 and "acc_swap" not in metrics


@pytest.mark.parametrize("name", TASKS)
def test_every_word_is_a_token_and_survives_the_processors(name):
    tokenizer = build_tokenizer("scenes")
    for split, data in build_scenes(f"scenes_{name}", 200).items():
        texts = [data[i]["text_input"] for i in range(200)]
        key = {"vqa": "question", "grounding": "text"}.get(name, "sentence")
        assert texts == [entry[key] for entry in data.annotation], split
        for text in texts:
            assert tokenizer.tokenize(text) == text.split()
    assert all(tokenizer.tokenize(text) == [text] for text in ANSWERS)


@pytest.mark.parametrize("name", [*TASKS, "foils"])
def test_items_depend_only_on_seed_split_and_index(name):
    many, few = (build_scenes(f"scenes_{name}", num) for num in (9, 5))
    other = build_scenes(f"scenes_{name}", 5, {"seed": 1})
    for split in many:
        assert many[split].annotation[:5] == few[split].annotation
        assert few[split].annotation != other[split].annotation
    assert few["val"].annotation != few["test"].annotation


@pytest.mark.parametrize("name", TASKS)
def test_image_size_objects_and_layout_are_used(name):
    changes = {"image_size": 48, "objects": 2, "layout": "free", "heldout": 0.5}
    heldout = heldout_compositions(0.5)
    for split, data in build_scenes(f"scenes_{name}", 20, changes).items():
        sample = data[0]
        images = [sample[key] for key in ("image", "image0", "image1") if key in sample]
        assert [tuple(image.shape) for image in images] == [(3, 48, 48)] * (1 + (name == "nlvr"))
        scenes = [scene for entry in data.annotation for scene in entry["scenes"]]
        assert {len(scene.things) for scene in scenes} == {2}
        assert len({thing.x for scene in scenes for thing in scene.things}) == 2 * len(scenes)
        novel = [not heldout.isdisjoint(scene.compositions) for scene in scenes]
        assert any(novel) == (split != "train")


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
        ("foils", {"objects": 1}, "datasets.scenes_foils.objects is 1: it must be a whole number"),
        ("foils", {"objects": "two"}, "objects is 'two'"),
        ("foils", {"curtain": "drawn"}, "curtain is 'drawn': it must be true or false"),
        ("foils", {"num": {"test": 12781}}, "only 2556 do: ask for fewer"),
    ],
)
def test_wrong_settings_give_a_one_line_error(name, changes, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        build_scenes(f"scenes_{name}", 6, changes)
    assert "\n" not in str(error.value)
