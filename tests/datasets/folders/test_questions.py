"""The user's own questions about images, as LAVIS's VQA task reads them."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from lavis.datasets.datasets.coco_vqa_datasets import COCOVQADataset
from torch.utils.data import DataLoader
from toy_folders import COLOURS, QUESTIONS, build, evaluate, task, write

from softmask_plugin.datasets.coco_vqa import write_coco_vqa
from softmask_plugin.datasets.tables.questions import most_frequent, parse_answers, parse_questions
from softmask_plugin.errors import UserError


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv"])
def test_questions_in_every_layout(tmp_path, suffix):
    questions = parse_questions(write(tmp_path / f"a.{suffix}", QUESTIONS))
    assert questions[0] == {
        "image": "red.png",
        "question": "What colour?",
        "answer": {"red": 1},
        "question_id": 70,
    }
    assert [item["question_id"] for item in questions] == [70, 8, 9, 71]
    assert list(questions[3]["answer"]) == ["the painter, of course."]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("A dog", {"a dog": 1}),
        (2, {"2": 1}),
        (["red", "Red ", "dark  red", "red"], {"red": 0.75, "dark red": 0.25}),
        ({"red": 3, "Red": 3, "pink": 2}, {"red": 0.75, "pink": 0.25}),
        ({"red": 0.3, "pink": 0.1}, {"red": 0.75, "pink": 0.25}),
        ('{"red": 3, "pink": 1}', {"red": 0.75, "pink": 0.25}),  # as programs fill a CSV's cells
        ("['red', 'red', 'red', 'pink']", {"red": 0.75, "pink": 0.25}),
        ("[no list", {"[no list": 1}),
    ],
    ids=str,
)
def test_answers_become_shares(tmp_path, given, expected):
    row = {"image": "a.jpg", "question": "what?", "answer": given}
    (question,) = parse_questions(write(tmp_path / "a.json", [row]))
    assert question["answer"] == pytest.approx(expected)


def test_rows_of_one_question_id_are_one_question(tmp_path):
    """How a CSV file gives several answers."""
    rows = [
        {"image": "a.jpg", "question": "what?", "answer": text, "question_id": 3}
        for text in ("cat", "cat", "dog", "cat")
    ]
    (question,) = parse_questions(write(tmp_path / "a.csv", rows))
    assert question["answer"] == {"cat": 0.75, "dog": 0.25} and question["question_id"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "/etc/a.jpg"}, "image '/etc/a.jpg' is outside the images folder"),
        ({"image": "../a.jpg"}, "is outside"),
        ({"image": None}, "expected an image name, got None"),
        ({"question": "?"}, "no usable question: '?'"),
        ({"question": ["a", "b"]}, "no usable question"),
        ({"answer": "..."}, "no usable answer"),
        ({"answer": None}, "no answer to 'what?'"),
        ({"answer": {"red": -1}}, "the weight of answer 'red' is -1, not above 0"),
        ({"answer": {"red": "much"}}, "the weight of answer 'red' is 'much'"),
        ({"answer": {"red": float("nan")}}, "the weight of answer 'red' is nan"),
        ({"question_id": "q7"}, "question_id 'q7' is not a whole number >= 0: leave it out"),
        ({"question_id": 1.5}, "is not a whole number"),
        ({"question_id": -1}, "is not a whole number"),
        ({"question_id": True}, "is not a whole number"),
        ({"question_id": 2**63}, "is not a whole number"),
        ({"question_id": 7}, "question_id 7 belongs to another image or question too"),
    ],
    ids=str,
)
def test_a_bad_question_is_skipped_and_reported(tmp_path, caplog, change, message):
    good = {"image": "a.jpg", "question": "which?", "answer": "a", "question_id": 7}
    bad = {"image": "a.jpg", "question": "what?", "answer": "b", **change}
    path = write(tmp_path / "a.json", [good, bad])
    assert [item["question_id"] for item in parse_questions(path)] == [7]
    assert f"Skipped 1 rows or answers of a.json: {path}, entry 2: " in caplog.text
    assert message in caplog.text


def test_a_single_bad_answer_is_reported(tmp_path, caplog):
    row = {"image": "a.jpg", "question": "what?", "answer": ["yes", None, "no", "yes", "yes"]}
    (question,) = parse_questions(write(tmp_path / "a.json", [row]))
    assert question["answer"] == {"yes": 0.75, "no": 0.25}
    assert "entry 1: 1 unusable answers in ['yes', None" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "image,question\na.jpg,what?\n", "a.csv has no 'answer' among its columns"),
        ("a.json", '[{"image": "a.jpg", "answer": "b"}]', "no 'question' among .'image', 'answer'"),
        ("a.json", "[3]", "expected 'image' and 'question' and 'answer', got 3"),
        ("a.json", "[]", "holds no rows"),
        ("a.json", "{", "not valid JSON"),
        ("none.json", None, "cannot read the question file .*No such file"),
    ],
)
def test_a_malformed_question_file_is_refused(tmp_path, name, content, message):
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as caught:
        parse_questions(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_training_samples_equal_those_of_lavis(colour_photos):
    """COCOVQADataset on the same annotation, with the answers listed one by one."""
    given = [["red"] * 7 + ["pink"] * 3, ["yes"], ["a", "b", "a"]]
    rows = [
        {"image": f"{colour}.png", "question": f"Is it {colour}?", "answer": answers}
        for colour, answers in zip(COLOURS, given, strict=False)
    ]
    ours = build("vqa_folder", f"questions.train={write('a.json', rows)}")["train"]
    theirs = COCOVQADataset(ours.vis_processor, ours.text_processor, "photos", ["a.json"])
    batches = []
    for dataset in (ours, theirs):
        torch.manual_seed(0)
        batches.append(dataset.collater([dataset[i] for i in range(3)]))
    assert batches[0].keys() == batches[1].keys()
    for key, value in batches[1].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(batches[0][key], value)
        else:
            assert batches[0][key] == value
    assert batches[0]["n_answers"].tolist() == [2, 1, 2]
    assert batches[0]["text_input"][0] == "is it red"


class Answers:
    """A model whose answers come from a table by question."""

    def __init__(self, table: dict[str, str]) -> None:
        self.table = table

    def predict_answers(self, samples, answer_list, **options):
        assert set(self.table.values()) <= set(answer_list)
        return [self.table[question] for question in samples["text_input"]]


def test_lavis_computes_the_official_metric(colour_photos):
    options = [f"questions.{split}={write('a.json', QUESTIONS)}" for split in ("train", "test")]
    vqa, datasets = task("vqa", "vqa_folder", *options)
    test = datasets["test"]
    assert vqa.answer_list == ["red", "two", "yes", "the painter, of course."]
    truth = {
        test.text_processor(item["question"]): next(iter(item["answer"]))
        for item in test.annotation
    }
    metrics = evaluate(vqa, test, Answers(truth), "test")
    assert metrics == {"agg_metrics": 100, "other": 100, "number": 100, "yes/no": 100}
    metrics = evaluate(vqa, test, Answers(dict.fromkeys(truth, "two")), "test")
    assert metrics == {"agg_metrics": 25, "other": 0, "number": 100, "yes/no": 0}
    saved = json.loads(Path("run/test_vqa_result.json").read_text())
    assert {row["question_id"] for row in saved} == {70, 8, 9, 71}


def test_the_official_metric_of_a_minority_answer(colour_photos):
    """Two of ten annotators: 2/3 for the eight others, 1/3 for the two themselves."""
    row = {"image": "red.png", "question": "what", "answer": {"red": 0.8, "pink": 0.2}}
    vqa, datasets = task("vqa", "vqa_folder", f"questions.val={write('a.json', [row])}")
    vqa.answer_list = ["red", "pink"]
    assert evaluate(vqa, datasets["val"], Answers({"what": "pink"}), "val")["agg_metrics"] == 60


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"cat": 1}, {"cat": 10}),
        ({"cat": 2, "dog": 1}, {"cat": 7, "dog": 3}),
        ({"cat": 1, "dog": 1, "hen": 1}, {"cat": 4, "dog": 3, "hen": 3}),
        ({"cat": 0.7, "dog": 0.2, "hen": 0.1}, {"cat": 7, "dog": 2, "hen": 1}),
        ({str(n): 1 for n in range(12)}, {str(n): 1 for n in range(10)}),
        ({"The cat!": 1, "two cats": 1}, {"cat": 5, "2 cats": 5}),  # as the metric spells them
    ],
    ids=str,
)
def test_ten_annotators_share_the_weights(weights, expected):
    class Owner:
        pass

    owner = Owner()
    item = {"image": "a.jpg", "question": "what?", "question_id": 1}
    _, file = write_coco_vqa(owner, [{**item, "answer": weights}])
    (annotation,) = json.loads(Path(file).read_text())["annotations"]
    assert Counter(answer["answer"] for answer in annotation["answers"]) == expected
    assert len({answer["answer_id"] for answer in annotation["answers"]}) == 10


def forget(dataset) -> None:
    del dataset
    gc.collect()


def test_the_metrics_files_live_as_long_as_the_data_set(colour_photos):
    val = build("vqa_folder", f"questions.val={write('a.json', QUESTIONS)}")["val"]
    files = [val.coco_fmt_qust_file, val.coco_fmt_anno_file]
    assert len(list(DataLoader(val, 2, num_workers=1))) == 2
    forget(pickle.loads(pickle.dumps(val)))  # a spawned worker's copy is not the data set
    assert all(map(os.path.exists, files))
    worker = multiprocessing.get_context("fork").Process(target=forget, args=(val,))
    worker.start()
    worker.join()
    assert all(map(os.path.exists, files))
    del val, worker
    gc.collect()
    assert not any(map(os.path.exists, files)) and not os.path.exists(os.path.dirname(files[0]))


def test_a_test_split_without_answers_is_a_submission(colour_photos, caplog):
    rows = [{"image": "red.png", "question": "What?", "question_id": 5}]
    options = [
        f"questions.test={write('test.csv', rows)}",
        f"answers={write('answers.txt', 'red')}",
    ]
    vqa, datasets = task("vqa", "vqa_folder", *options)
    assert "1 of 1 test questions have no answer" in caplog.text
    assert evaluate(vqa, datasets["test"], Answers({"what": "red"}), "test") == {}
    saved = json.loads(Path("run/test_vqa_result.json").read_text())
    assert saved == [{"question_id": 5, "answer": "red"}]
    with pytest.raises(UserError, match="no 'answer' among its columns"):
        build("vqa_folder", "questions.val=test.csv")


def test_candidate_answers(colour_photos, caplog):
    rows = [
        {"image": "red.png", "question": "q", "answer": answer}
        for answer in ("no", ["yes", "yes", "no"], "maybe", "maybe")
    ]
    files = [f"questions.{split}={write('a.json', rows)}" for split in ("train", "val")]
    assert build("vqa_folder", *files)["val"].answer_list == ["maybe", "no", "yes"]
    assert build("vqa_folder", *files, "answers=2")["val"].answer_list == ["maybe", "no"]
    assert build("vqa_folder", files[1])["val"].answer_list is None
    assert not hasattr(build("vqa_folder", files[0])["train"], "answer_list")
    write("list.json", '["Yes", "no", "yes", null]')
    write("list.txt", "\ufeffYes\n\n no \nyes\n")
    write("ans2label.json", '{"Yes": 0, "no": 1}')
    for name in ("list.json", "list.txt", "ans2label.json"):
        assert build("vqa_folder", files[1], f"answers={name}")["val"].answer_list == ["yes", "no"]
    assert "1 unusable answers in ['Yes', 'no', 'yes', None]" in caplog.text
    with pytest.raises(UserError, match="answers=2 counts those of the train split: set .*train"):
        build("vqa_folder", files[1], "answers=2")


def test_questions_that_no_candidate_answers_are_counted(colour_photos, caplog):
    answers = ("Yes", ["no", "maybe"], "perhaps")
    rows = [{"image": "red.png", "question": "q", "answer": answer} for answer in answers]
    file = f"questions.val={write('a.json', rows)}"
    write("all.txt", "yes\nno\nperhaps")
    write("some.csv", "yes,9\nno,5")
    build("vqa_folder", file, "answers=all.txt")
    assert "candidates" not in caplog.text
    build("vqa_folder", file, "answers=some.csv")
    assert "3 of 3 questions have none of their answers among the 2 candidates" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no answer"),
        ("[1", "not valid JSON"),
        ("[]", "holds no answer"),
        ('{"0": "yes", "1": "no"}', "does not number answers, as ans2label.json does: write a li"),
        ('{"answers": ["yes", "no"]}', "does not number answers"),
    ],
)
def test_a_bad_list_of_answers_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        parse_answers(write(tmp_path / "a.txt", content))
    with pytest.raises(UserError, match="cannot read the answer file"):
        parse_answers(tmp_path / "none.txt")


def test_most_frequent_counts_questions():
    shares = [{"a": 0.6, "b": 0.4}, {"b": 0.5, "c": 0.5}, {"c": 0.2, "d": 0.8}]
    questions = [{"answer": answer} for answer in shares]
    assert most_frequent(questions, 2) == ["b", "d"]
