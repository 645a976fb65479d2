"""The lines that end a run, and the chance beside its metrics."""

from __future__ import annotations

# isort: split
import shlex

import pytest
import torch
from toy_folders import LABELS, QUESTIONS, STATEMENTS, evaluate, task, write
from toys import ScriptedTask, ToyData, build

from softmask_plugin import cli
from softmask_plugin.report.records import chance_of, retrieval_chance
from softmask_plugin.report.summary import _table, run_summary


class Constant:
    """Always gives the same class and the same answer."""

    def __init__(self, label, answer):
        self.label, self.answer = label, answer

    def eval(self):
        return self

    def predict(self, samples):
        targets = torch.as_tensor(samples["label"])
        scores = torch.nn.functional.one_hot(torch.full_like(targets, self.label), 3)
        return {"predictions": scores, "targets": targets}

    def predict_answers(self, samples, **kwargs):
        return [self.answer] * len(samples["text_input"])


def test_chance_is_the_hosts_metric_of_the_best_constant(colour_photos):
    rows = [*STATEMENTS, {"image": "red.png", "sentence": "It is", "label": "neutral"}]
    options = f"sentences.val={write('a.json', rows)}"
    classes, datasets = task("multimodal_classification", "entailment_folder", options)
    accuracies = [
        evaluate(classes, datasets["val"], Constant(label, ""), "val")["acc"]
        for label in range(len(LABELS))
    ]
    assert chance_of(datasets["val"]) == {"acc": max(accuracies)} == {"acc": 0.4}

    rows = [*QUESTIONS, {"image": "blue.png", "question": "How many?", "answer": "two"}]
    options = [f"questions.{split}={write('b.json', rows)}" for split in ("train", "val")]
    vqa, datasets = task("vqa", "vqa_folder", *options)
    accuracies = [
        evaluate(vqa, datasets["val"], Constant(0, answer), "val")["agg_metrics"]
        for answer in vqa.answer_list
    ]
    assert chance_of(datasets["val"]) == {"agg_metrics": max(accuracies)} == {"agg_metrics": 40}


def test_chance_that_is_not_known(colour_photos):
    rows = [{**QUESTIONS[0], "answer": {"red": 0.8, "pink": 0.2}}]
    _, datasets = task("vqa", "vqa_folder", *[f"questions.val={write('a.json', rows)}"])
    assert chance_of(datasets["val"]) == chance_of(ToyData(3)) == chance_of(None) == {}


def labelled(*labels):
    data = ToyData(len(labels))
    data.annotation = [{"label": label} for label in labels]
    data.class_labels = {label: i for i, label in enumerate(sorted({*labels}))}
    return data


def test_numbers_stand_below_long_names():
    names = ("acc_itc_attribute", "acc")
    lines = _table("test", dict.fromkeys(names, 44.0), dict.fromkeys(names, 50.0))
    assert [line[:27].split()[-1] for line in lines] == ["acc_itc_attribute", "44", "50"]
    assert [len(line) for line in lines] == [37] * 3


def test_a_run_with_validation_and_test(tmp_path):
    class Task(ScriptedTask):
        def after_evaluation(self, val_result, split_name, **kwargs):
            score = self.scores.pop(0)
            return {"agg_metrics": score, "acc": score}

    splits = {"train": ToyData(8), "val": labelled(*"abc"), "test": labelled(*"aabc")}
    folder = tmp_path / "my runs"
    given = {"splits": splits, "max_epoch": 3, "valid_splits": ["val"]}
    runner = build(folder, Task([0.25, 0.75, 0.5, 0.625]), **given, test_splits=["test"])
    run = shlex.quote(str(folder / "job"))
    assert run_summary(runner, runner.train()).splitlines() == [
        "Best epoch: 1 (0 to 2), by agg_metrics on 'val'",
        "",
        "    test       acc",
        "             0.625",
        "  chance       0.5",
        "",
        f"Everything about this run is in {folder}/job. Next:",
        f"  softmask report {run}",
        f"  softmask evaluate --cfg-path {run}",
    ]
    runner = build(folder / "valid", Task([0.25, 0.75, 0.5]), **given)
    lines = run_summary(runner, runner.train()).splitlines()
    assert lines[2:5] == ["     val       acc", "              0.75", "  chance    0.3333"]
    assert lines[-1].endswith("--options 'run.test_splits=[test]'")


def test_a_run_without_metrics(tmp_path):
    runner = build(tmp_path, splits={"train": ToyData(8)})
    assert run_summary(runner, runner.train()).splitlines() == [
        f"Everything about this run is in {tmp_path}/job. Next:",
        f"  softmask report {tmp_path}/job",
    ]


def test_the_command_ends_with_it_and_its_next_command_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["run.output_dir=runs", "datasets.scenes_retrieval.num={train: 8, val: 6, test: 4}"]
    options += ["run.batch_size_train=4", "run.max_epoch=1", "run.test_splits=[]"]
    options += ["model.load_pretrained=false", "model.queue_size=8"]
    train = ["train", "--cfg-path", "scenes/train/retrieval_tiny", "--options", *options]
    assert cli.main(train) == 0
    best, _, names, scores, chance, _, place, *commands = capsys.readouterr().out.splitlines()
    assert best == "Best epoch: 0 (0 to 0), by agg_metrics on 'val'"
    known = dict(zip(names.split()[1:], map(float, chance.split()[1:]), strict=True))
    assert known == pytest.approx(retrieval_chance({i: [0, 0] for i in range(6)}), rel=1e-3)
    assert len(scores.split()) == len(known)
    assert place.startswith(f"Everything about this run is in {tmp_path}/runs/")
    assert [command.split()[1] for command in commands] == ["report", "evaluate", "explain"]
    assert cli.main(shlex.split(commands[1])[1:]) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[0].split() == ["test", *known] and len(again[1].split()) == len(known)
    assert [line.split()[1] for line in again[5:]] == ["report"]
