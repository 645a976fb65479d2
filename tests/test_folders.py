"""The user's own questions, statements and pairs of images, as LAVIS's tasks read them."""

from __future__ import annotations

import csv
import gc
import json
import multiprocessing
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from lavis.common.registry import registry
from lavis.datasets.datasets.coco_vqa_datasets import COCOVQADataset
from lavis.datasets.datasets.nlvr_datasets import NLVREvalDataset
from lavis.datasets.datasets.snli_ve_datasets import SNLIVisualEntialmentDataset
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader

from softmask_plugin.datasets.coco_vqa import write_coco_vqa
from softmask_plugin.datasets.question_files import most_frequent, read_answers, read_questions
from softmask_plugin.datasets.statement_files import read_statements
from softmask_plugin.errors import UserError

COLOURS = ["red", "green", "blue", "yellow"]
LABELS = ["contradiction", "neutral", "entailment"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four plain images and a run's output folder; the process stands above them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(registry.mapping["paths"], "output_dir", str(tmp_path / "run"))
    monkeypatch.setitem(registry.mapping["paths"], "result_dir", str(tmp_path / "run"))
    for name in ("photos", "run"):
        Path(name).mkdir()
    for colour in COLOURS:
        Image.new("RGB", (20, 16), colour).save(f"photos/{colour}.png")
    return tmp_path


def settings(name: str, *options: str):
    """The shipped YAML with options, as a run reads it."""
    default = OmegaConf.load(registry.get_builder_class(name).default_config_path())
    shrink = [f"vis_processor.{mode}.image_size=8" for mode in ("train", "eval")]
    given = [f"datasets.{name}.{o}" for o in ("images=photos", *shrink, *options)]
    return OmegaConf.merge(default, OmegaConf.from_dotlist(given)).datasets[name]


def build(name: str, *options: str) -> dict:
    return registry.get_builder_class(name)(settings(name, *options)).build_datasets()


def write(path: Path | str, rows: list[dict] | str) -> Path:
    """Write rows in the layout that the path's suffix names."""
    path = Path(path)
    if isinstance(rows, str):
        path.write_text(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        with path.open("w", newline="") as file:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            writer = csv.DictWriter(file, columns, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def task(name: str, dataset: str, *options: str):
    """LAVIS's own task and the data sets that it builds of ours."""
    run = OmegaConf.create({"inference_method": "rank"})
    config = OmegaConf.create({"datasets_cfg": {dataset: settings(dataset, *options)}})
    config.run_cfg = run
    task_class = registry.get_task_class(name)
    built = task_class.setup_task(cfg=config)
    return built, built.build_datasets(config)[dataset]


def evaluate(task, dataset, model, split: str) -> dict:
    """LAVIS's own evaluation loop and metrics."""
    loader = DataLoader(dataset, 3, collate_fn=dataset.collater)
    results = task.evaluation(model, loader, cuda_enabled=False)
    return task.after_evaluation(val_result=results, split_name=split, epoch=0)


# ---- questions

QUESTIONS = [
    {"image": "red.png", "question": "What colour?", "answer": "Red", "question_id": 70},
    {"image": "red.png", "question": "How many, in all?", "answer": "Two", "question_id": 8},
    {"image": "green.png", "question": "Is it green?", "answer": "yes", "question_id": 9},
    {"image": "blue.png", "question": "Who painted it?", "answer": "The painter, of course."},
]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv"])
def test_questions_in_every_layout(tmp_path, suffix):
    questions = read_questions(write(tmp_path / f"a.{suffix}", QUESTIONS))
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
    ],
    ids=str,
)
def test_answers_become_shares(tmp_path, given, expected):
    row = {"image": "a.jpg", "question": "what?", "answer": given}
    (question,) = read_questions(write(tmp_path / "a.json", [row]))
    assert question["answer"] == pytest.approx(expected)


def test_rows_of_one_question_id_are_one_question(tmp_path):
    """The way to give several answers in a CSV file."""
    rows = [
        {"image": "a.jpg", "question": "what?", "answer": text, "question_id": 3}
        for text in ("cat", "cat", "dog", "cat")
    ]
    (question,) = read_questions(write(tmp_path / "a.csv", rows))
    assert question["answer"] == {"cat": 0.75, "dog": 0.25} and question["question_id"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "/etc/a.jpg"}, "image '/etc/a.jpg' does not lie below the images folder"),
        ({"image": "../a.jpg"}, "does not lie below"),
        ({"image": None}, "an image's name expected, got None"),
        ({"question": "?"}, "no usable question, but '?'"),
        ({"question": ["a", "b"]}, "no usable question"),
        ({"answer": "..."}, "no usable answer"),
        ({"answer": None}, "no answer to 'what?'"),
        ({"answer": {"red": -1}}, "the weight of answer 'red' is -1: not above 0"),
        ({"answer": {"red": "much"}}, "the weight of answer 'red' is 'much'"),
        ({"answer": {"red": float("nan")}}, "the weight of answer 'red' is nan"),
        ({"question_id": "q7"}, "question_id 'q7' is no whole number >= 0: leave it out"),
        ({"question_id": 1.5}, "is no whole number"),
        ({"question_id": -1}, "is no whole number"),
        ({"question_id": True}, "is no whole number"),
        ({"question_id": 2**63}, "is no whole number"),
        ({"question_id": 7}, "question_id 7 belongs to another image or question too"),
    ],
    ids=str,
)
def test_a_bad_question_is_skipped_and_reported(tmp_path, caplog, change, message):
    good = {"image": "a.jpg", "question": "which?", "answer": "a", "question_id": 7}
    bad = {"image": "a.jpg", "question": "what?", "answer": "b", **change}
    path = write(tmp_path / "a.json", [good, bad])
    assert [item["question_id"] for item in read_questions(path)] == [7]
    assert f"Skipped 1 rows or answers of a.json: {path}, entry 2: " in caplog.text
    assert message in caplog.text


def test_a_single_bad_answer_is_reported(tmp_path, caplog):
    row = {"image": "a.jpg", "question": "what?", "answer": ["yes", None, "no", "yes", "yes"]}
    (question,) = read_questions(write(tmp_path / "a.json", [row]))
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
        read_questions(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_train_samples_are_those_of_lavis(folder):
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


def test_the_official_metric_of_lavis(folder):
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


def test_the_official_metric_of_a_minority(folder):
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
    _, file = write_coco_vqa(owner, [{**item, "answer": weights}], "val")
    (annotation,) = json.loads(Path(file).read_text())["annotations"]
    assert Counter(answer["answer"] for answer in annotation["answers"]) == expected
    assert len({answer["answer_id"] for answer in annotation["answers"]}) == 10


def forget(dataset) -> None:
    del dataset
    gc.collect()


def test_the_metrics_files_live_as_long_as_the_data_set(folder):
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


def test_a_test_split_without_answers_is_a_submission(folder, caplog):
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


def test_candidate_answers(folder, caplog):
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
    for name in ("list.json", "list.txt"):
        assert build("vqa_folder", files[1], f"answers={name}")["val"].answer_list == ["yes", "no"]
    assert "1 unusable answers in ['Yes', 'no', 'yes', None]" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no answer"), ("[1", "not valid JSON"), ("[]", "holds no answer")],
)
def test_a_bad_list_of_answers_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_answers(write(tmp_path / "a.txt", content))
    with pytest.raises(UserError, match="cannot read the answer file"):
        read_answers(tmp_path / "none.txt")


def test_most_frequent_counts_questions():
    shares = [{"a": 0.6, "b": 0.4}, {"b": 0.5, "c": 0.5}, {"c": 0.2, "d": 0.8}]
    questions = [{"answer": answer} for answer in shares]
    assert most_frequent(questions, 2) == ["b", "d"]


# ---- statements

STATEMENTS = [
    {"image": "red.png", "sentence": "It is red.", "label": "entailment"},
    {"image": "red.png", "sentence": "It is old", "label": "Neutral"},
    {"image": "green.png", "sentence": "It is blue", "label": 0},
    {"image": "blue.png", "sentence": "It is blue", "label": "2"},
]
PAIRS = [
    {"image0": "red.png", "image1": "blue.png", "sentence": "the left is red", "label": True},
    {"image0": "blue.png", "image1": "red.png", "sentence": "the left is red", "label": "false"},
    {"image0": "red.png", "image1": "red.png", "sentence": "both are red", "label": 1},
    {"image0": "red.png", "image1": "blue.png", "sentence": "both are red", "label": "0"},
]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv"])
def test_statements_in_every_layout(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", STATEMENTS)
    statements = read_statements(path, ["image"], LABELS)
    assert statements[0] == {"image": "red.png", "sentence": "It is red.", "label": "entailment"}
    assert [LABELS.index(item["label"]) for item in statements] == [2, 1, 0, 2]
    path = write(tmp_path / f"b.{suffix}", PAIRS)
    pairs = read_statements(path, ["image0", "image1"], ["False", "True"])
    assert [item["label"] for item in pairs] == ["True", "False", "True", "False"]
    assert pairs[0]["images"] == ["red.png", "blue.png"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "entailed"}, "unknown label 'entailed': did you mean 'entailment'?"),
        ({"label": "xyz"}, "unknown label 'xyz': choose from 'contradiction', 'entailment', 'neu"),
        ({"label": 3}, "unknown label 3"),
        ({"label": -1}, "unknown label -1"),
        ({"label": True}, "unknown label True"),
        ({"label": None}, "unknown label None"),
        ({"sentence": ""}, "no usable sentence, but ''"),
        ({"image": "a/../../b.jpg"}, "image 'a/../../b.jpg' does not lie below the images folder"),
    ],
    ids=str,
)
def test_a_bad_statement_is_skipped_and_reported(tmp_path, caplog, change, message):
    path = write(tmp_path / "a.json", [STATEMENTS[0], {**STATEMENTS[1], **change}])
    assert len(read_statements(path, ["image"], LABELS)) == 1
    assert f"Skipped 1 rows of a.json: {path}, entry 2: {message}" in caplog.text


def test_a_missing_column_is_named(tmp_path):
    path = write(tmp_path / "a.csv", PAIRS)
    with pytest.raises(UserError, match="a.csv has no 'image' among its columns .'image0', 'im"):
        read_statements(path, ["image"], LABELS)
    with pytest.raises(UserError, match="cannot read the statement file"):
        read_statements(tmp_path / "none.csv", ["image"], LABELS)


class Classes:
    """A model that is told the logits."""

    def __init__(self, logits) -> None:
        self.logits = logits

    def predict(self, samples):
        return {"predictions": self.logits(samples["label"]), "targets": samples["label"]}


@pytest.mark.parametrize(
    ("name", "rows", "share_of_class_0"),
    [("entailment_folder", STATEMENTS, 0.25), ("nlvr_folder", PAIRS, 0.5)],
)
def test_the_accuracy_of_lavis(folder, name, rows, share_of_class_0):
    options = [f"sentences.{split}={write('a.csv', rows)}" for split in ("train", "val")]
    classification, datasets = task("multimodal_classification", name, *options)

    def oracle(labels):
        return torch.nn.functional.one_hot(labels, 3)

    for split in ("train", "val"):
        assert evaluate(classification, datasets[split], Classes(oracle), split)["acc"] == 1
    constant = Classes(lambda labels: oracle(torch.zeros_like(labels)))
    metrics = evaluate(classification, datasets["val"], constant, "val")
    assert metrics == {"agg_metrics": share_of_class_0, "acc": share_of_class_0}


def test_entailment_samples_are_those_of_lavis(folder):
    """SNLIVisualEntialmentDataset reads images with the suffix .jpg, and labels by name."""
    for colour in COLOURS:
        Image.open(f"photos/{colour}.png").save(f"photos/{colour}.jpg")
    rows = read_statements(write("a.json", STATEMENTS), ["image"], LABELS)
    rows = [{**row, "image": row["image"].replace("png", "jpg")} for row in rows]
    ours = build("entailment_folder", f"sentences.val={write('b.json', rows)}")["val"]
    stems = [{**row, "image": Path(row["image"]).stem} for row in rows]
    theirs = SNLIVisualEntialmentDataset(
        ours.vis_processor, ours.text_processor, "photos", [write("c.json", stems)]
    )
    assert len(ours) == len(theirs) == 4 and ours.class_labels == theirs.class_labels
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our.pop("image"), their.pop("image"))
        assert our == {**their, "image_id": f"{their['image_id']}.jpg"}


def test_pairs_are_those_of_lavis(folder):
    ours = build("nlvr_folder", f"sentences.val={write('a.json', PAIRS)}")["val"]
    pairs = read_statements("a.json", ["image0", "image1"], ["False", "True"])
    theirs = NLVREvalDataset(
        ours.vis_processor, ours.text_processor, "photos", [write("b.json", pairs)]
    )
    assert len(ours) == len(theirs) == 4
    for our, their in zip(ours, theirs, strict=True):
        for image in ("image0", "image1"):
            assert torch.equal(our.pop(image), their.pop(image))
        assert our == their
    assert ours.displ_item(0)["file_R"] == "blue.png"


def test_swapped_pairs_stay_true(folder):
    """The left image is red, whichever it is; other words keep their letters."""
    rows = [
        {**PAIRS[0], "sentence": "The left one is bright red, the rightmost blue", "label": True},
    ]
    plain = [f"vis_processor.train.{key}" for key in ("min_scale=null", "randaugment_ops=0")]
    train = build("nlvr_folder", f"sentences.train={write('a.json', rows)}", *plain)["train"]
    texts = {
        0: "the left one is bright red the rightmost blue",
        2: "the right one is bright red the leftmost blue",
    }
    torch.manual_seed(0)
    first = []
    for _ in range(200):
        sample = train[0]
        channel = int(sample["image0"].mean(dim=(1, 2)).argmax())  # of the first: red or blue
        assert sample["text_input"] == texts[channel] and sample["label"] == 1
        first.append(channel)
    assert 60 < np.count_nonzero(first) < 140
    still = build("nlvr_folder", "sentences.train=a.json", "swap=false", *plain)["train"]
    assert {still[0]["text_input"] for _ in range(20)} == {texts[0]}


def test_classes_of_ones_own(folder):
    rows = [{**STATEMENTS[0], "label": label} for label in ("No", 5, "1", "yes")]
    options = f"sentences.val={write('a.json', rows)}", "labels=['yes', 'no', 5]"
    val = build("entailment_folder", *options)["val"]
    assert [item["label"] for item in val] == [1, 2, 1, 0]


# ---- all folders


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vqa_folder", [], "datasets.vqa_folder.questions names no file"),
        ("vqa_folder", ["questions.test=q.json", "images=null"], "vqa_folder.images is not set"),
        ("vqa_folder", ["questions.test=q.json", "images=x"], "there is no folder .*x"),
        ("vqa_folder", ["answer=a"], "unknown key datasets.vqa_folder.answer: did you mean 'answe"),
        ("vqa_folder", ["questions.val=q.json", "answers=0"], "vqa_folder.answers is 0: it must"),
        ("vqa_folder", ["questions.val=q.json", "answers=true"], "vqa_folder.answers is True"),
        ("entailment_folder", ["sentences.tst=a"], "sentences.tst: did you mean 'test'"),
        ("entailment_folder", ["sentences.val=e.json", "labels=[a]"], r"labels is \['a'\]: it m"),
        ("entailment_folder", ["sentences.val=e.json", "labels=[a,A]"], "two or more different"),
        ("entailment_folder", ["sentences.val=e.json", "labels=x"], "labels is x: it must"),
        ("entailment_folder", ["sentences.val=e.json", "labels=[yes,no]"], "yes and no in quotes"),
        ("nlvr_folder", ["sentences.train=n.json", "swap=1"], "nlvr_folder.swap is 1: it must be"),
        ("nlvr_folder", ["sentences.train=[a,b]"], "must be the path of one file"),
    ],
    ids=str,
)
def test_wrong_options_get_one_clear_line(folder, name, options, message):
    write("q.json", QUESTIONS)
    write("e.json", STATEMENTS)
    write("n.json", PAIRS)
    with pytest.raises(UserError, match=message) as caught:
        build(name, *options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "files", "rows", "left"),
    [
        ("vqa_folder", "questions", QUESTIONS, ["green.png"]),
        ("entailment_folder", "sentences", STATEMENTS, ["green.png"]),
        ("nlvr_folder", "sentences", [*PAIRS, {**PAIRS[0], "image1": "red.png"}], ["red.png"]),
    ],
)
def test_missing_and_unreadable_images_leave_the_evaluation(
    folder, caplog, name, files, rows, left
):
    """An item leaves with any of its images; each image is reported once."""
    gone = "blue.png" if name == "nlvr_folder" else "red.png"
    broken = None if name == "nlvr_folder" else "blue.png"
    Path("photos", gone).unlink()
    if broken:
        Path("photos", broken).write_bytes(b"no image")
    val = build(name, f"{files}.val={write('a.json', rows)}")["val"]
    shown = {image for item in val.annotation for image in item.get("images", [item.get("image")])}
    assert shown == set(left)
    assert "Skipped 1 missing images" in caplog.text
    assert ("Skipped 1 unreadable images" in caplog.text) == bool(broken)
    log = Path("run/skipped_images.log").read_text()
    assert f"photos/{gone}: no such file" in log
    assert len(log.splitlines()) == (2 if broken else 1)
    for path in Path("photos").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=f"none of the . images exists.*datasets.{name}.images"):
        build(name, f"{files}.val=a.json")


def test_an_unreadable_training_pair_passes_to_the_next(folder):
    Path("photos/blue.png").write_bytes(b"no image")
    train = build("nlvr_folder", f"sentences.train={write('a.json', PAIRS)}")["train"]
    assert [train[i]["instance_id"] for i in range(4)] == ["2", "2", "2", "2"]
    assert Path("run/skipped_images.log").read_text().count("\n") == 1
    Path("photos/red.png").unlink()
    with pytest.raises(UserError, match="100 images in a row cannot be read"):
        train[0]


def test_a_gallery_image_that_breaks_later_is_an_error(folder):
    val = build("entailment_folder", f"sentences.val={write('a.json', STATEMENTS)}")["val"]
    Path("photos/red.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="red.png"):
        val[0]
    assert val[2]["label"] == 0
