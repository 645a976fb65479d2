"""Questions and answers as the files that VQA's official metric, and so LAVIS's task, reads."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from lavis.common.vqa_tools.vqa_eval import VQAEval

ANNOTATORS = 10


def write_coco_vqa(owner: object, items: Iterable[Mapping[str, Any]]) -> tuple[str, str]:
    """Write questions and answers in COCO's VQA format, in files that live as long as ``owner``.

    The metric (Antol et al., ICCV 2015) counts how many of ten annotators gave an answer, so the
    ten are shared out in proportion to the weights of a question's answers.

    Args:
        owner: The data set that the files belong to.
        items: ``{"image", "question", "question_id", "answer": {text: weight}}`` each.

    Returns:
        The paths: LAVIS's ``coco_fmt_qust_file`` and ``coco_fmt_anno_file``.
    """
    folder = mkdtemp(prefix="coco_vqa_")
    weakref.finalize(owner, _remove, folder, os.getpid())
    questions, annotations = [], []
    evaluator = VQAEval()
    for item in items:
        keys = {"image_id": item["image"], "question_id": item["question_id"]}
        # Spelt as the metric spells predictions: it expects annotations to be spelt so already
        answers = [
            evaluator.processDigitArticle(evaluator.processPunctuation(text))
            for text in _votes(item["answer"])
        ]
        questions.append({**keys, "question": item["question"]})
        annotations.append(
            {
                **keys,
                "question_type": "all",
                "answer_type": _kind(max(answers, key=answers.count)),
                "answers": [{"answer_id": i, "answer": a} for i, a in enumerate(answers, 1)],
            }
        )
    # The metric copies these keys, and only these
    about = {"info": {}, "license": {}, "data_type": "", "data_subtype": "", "task_type": ""}
    return (
        _write(folder, "questions", {**about, "questions": questions}),
        _write(folder, "annotations", {"annotations": annotations}),
    )


def _votes(weights: Mapping[str, float]) -> list[str]:
    """Answers of ten annotators in proportion to the weights (largest remainder method)."""
    shares = np.array(list(weights.values())) * ANNOTATORS / sum(weights.values())
    votes = np.floor(shares + 1e-9)  # a share may miss its whole number by a rounding error
    left = ANNOTATORS - int(votes.sum())
    votes[np.argsort(votes - shares, kind="stable")[:left]] += 1
    return np.repeat(list(weights), votes.astype(int)).tolist()


def _kind(answer: str) -> str:
    """VQA's three kinds of answers, for each of which the metric is reported."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if answer.isnumeric() else "other"


def _write(folder: str, name: str, content: dict[str, Any]) -> str:
    path = Path(folder, f"{name}.json")
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not a worker that inherited the data set
        shutil.rmtree(folder, ignore_errors=True)
