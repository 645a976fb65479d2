"""Question files (JSON, JSONL, CSV or TSV) and lists of answers."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from softmask_plugin.datasets.tables.layouts import PLAIN, TableOptions
from softmask_plugin.datasets.tables.rows import (
    Row,
    image_name,
    one_text,
    parse_json,
    parse_table,
    read_text,
    short,
    texts,
    unfold,
)
from softmask_plugin.errors import UserError


def parse_questions(
    path: str | Path,
    answered: bool = True,
    options: TableOptions = PLAIN,
) -> list[dict[str, Any]]:
    """Parse a question file into one entry per question, in the order of the file.

    Rows of the same ``question_id`` are one question, and their answers are added up; rows without
    one get the next free numbers. Unusable rows, and any single unusable answer, are skipped and
    reported. Answers become lower-case, as VQA's metric compares them.

    Args:
        path: Rows ``{"image", "question", "answer", "question_id" (optional)}``. An answer is a
            text, a list of texts (of several annotators), or a mapping of texts to weights. Also
            files as published: VQA's (with ``options.annotations``) and DAQUAR's (docs/data.md).
        answered: Whether each row needs an answer.
        options: Names of columns, the separator, the images folder, VQA's annotations.

    Returns:
        ``{"image", "question", "answer", "question_id"}`` each, as in LAVIS's annotations:
        ``answer`` maps texts to shares that sum to 1 (empty: no answer), ``question_id`` is an int.

    Raises:
        UserError: The file is missing, malformed, or holds no usable row.
    """
    asked: dict[int, tuple[str, str]] = {}
    given = _vqa_answers(options.annotations) if options.annotations else None

    def parse(row: dict[str, Any], complaints: list[str]) -> dict[str, Any]:
        image = image_name(row["image"], options)
        question = one_text(row["question"], "question")
        number = _question_id(row.get("question_id"))
        answer = row.get("answer") if given is None else given.get(number)
        answers = _answers(answer, complaints)
        if answered and not answers:
            raise ValueError(f"no answer to {short(question)}")
        if number is not None and asked.setdefault(number, (image, question)) != (image, question):
            raise ValueError(f"question_id {number} belongs to another image or question too")
        return {"image": image, "question": question, "answer": answers, "question_id": number}

    columns = ["image", "question"] + ["answer"] * (answered and given is None)
    unpack, parts = partial(_vqa_rows, path, "answer" in columns, options), "rows or answers"
    rows = parse_table(path, columns, parse, "question", parts, unpack, options)
    free = count(max(asked, default=-1) + 1)
    questions: dict[int, dict[str, Any]] = {}
    for row in rows:
        number = next(free) if row["question_id"] is None else row["question_id"]
        first = questions.setdefault(number, {**row, "answer": Counter(), "question_id": number})
        first["answer"].update(row["answer"])
    for item in questions.values():
        total = sum(item["answer"].values())
        item["answer"] = {text: weight / total for text, weight in item["answer"].items()}
    return list(questions.values())


def parse_answers(path: str | Path, options: TableOptions = PLAIN) -> list[str]:
    """Parse a list of candidate answers, each once: a JSON list of texts, a JSON object that has
    them as keys (VQA's ``ans2label``), or one text per line.

    UserError if the file is missing, malformed, or holds no answer.
    """
    path = Path(path)
    text = read_text(path, "answer")
    is_json = text.lstrip()[:1] in ("[", "{")
    entries: Any = parse_json(path, text) if is_json else re.findall(r"\S.*", text)
    if isinstance(entries, dict) and not all(type(number) is int for number in entries.values()):
        raise UserError(f"{path} does not number answers, as ans2label.json does: write a list")
    complaints: list[str] = []
    try:
        answers = dict.fromkeys(map(_normalize, texts([*entries], "answer", complaints)))
    except ValueError as error:
        raise UserError(f"{path} holds no answer: {error}") from error
    options.skipped.add(f"parts of {path.name}", [f"{path}: {c}" for c in complaints])
    return list(answers)


def most_frequent(questions: Iterable[dict[str, Any]], limit: int | None = None) -> list[str]:
    """List the answers of parsed questions, or the ``limit`` most frequent ones, in that order.

    Each question counts as one, shared between its answers.
    """
    counts: Counter[str] = Counter()
    for item in questions:
        counts.update(item["answer"])
    return [answer for answer, _ in counts.most_common(limit)]


def _vqa_rows(
    path: str | Path, need_answers: bool, options: TableOptions, content: dict[str, Any]
) -> list[Row] | None:
    entries = content.get("questions")
    if not isinstance(entries, list):
        return None
    if need_answers and not any("answer" in entry for entry in entries if isinstance(entry, dict)):
        raise UserError(
            f"{path} holds no answers: name VQA's file of annotations in "
            f"{options.place}annotations.<split>"
        )
    images = str(content.get("data_subtype")).replace("test-dev", "test")  # as in train2014
    rows = []
    for number, entry in enumerate(entries, 1):
        if isinstance(entry, dict) and str(entry.get("image_id")).isdecimal():
            name = f"COCO_{images}_{str(entry['image_id']).zfill(12)}.jpg"
            entry = {"image": options.below(name, images), **entry}
        rows.append((f"question {number}", entry))
    return rows


def _vqa_answers(path: Path) -> dict[Any, list[Any]]:
    """VQA's ten answers to each question, by its id."""
    try:
        return {
            entry["question_id"]: [answer["answer"] for answer in entry["answers"]]
            for entry in parse_json(path, read_text(path, "annotation"))["annotations"]
        }
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of VQA's annotations: {error!r}") from error


def _answers(value: Any, complaints: list[str]) -> dict[str, float]:
    value = unfold(value)
    if value is None or value == "" or value == [] or value == {}:
        return {}
    if not isinstance(value, dict):
        value = Counter(texts(value, "answer", complaints))
    weights: dict[str, float] = defaultdict(float)
    for text, weight in value.items():
        if not isinstance(weight, (int, float)) or not 0 < weight <= 1e9:
            raise ValueError(f"the weight of answer {short(text)} is {short(weight)}, not above 0")
        weights[_normalize(one_text(text, "answer"))] += weight
    return weights


def _normalize(answer: str) -> str:
    return " ".join(answer.lower().split())


def _question_id(value: Any) -> int | None:
    if value in (None, ""):
        return None
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"question_id {short(value)} is not a whole number >= 0: leave it out")
    return value
