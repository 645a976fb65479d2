"""The user's own images with a file of questions and answers, for LAVIS's ``vqa`` task."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lavis.datasets.datasets.vqa_datasets import VQADataset, VQAEvalDataset

from softmask_plugin.config.paths import shipped
from softmask_plugin.datasets.coco_vqa import write_coco_vqa
from softmask_plugin.datasets.folders.base import Annotation, FolderBuilder, FolderDataset
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.datasets.tables.questions import most_frequent, read_answers, read_questions
from softmask_plugin.errors import UserError
from softmask_plugin.registry import register


class VQAFolderDataset(FolderDataset, VQADataset):
    """Questions with all their answers, weighted by the share of the annotators who gave them."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``image``, ``text_input`` (both processed), ``answers`` and ``weights``."""
        item, (image,) = self.open(index)
        return {
            "image": self.vis_processor(image),
            "text_input": self.text_processor(item["question"]),
            "answers": list(item["answer"]),
            "weights": list(item["answer"].values()),
        }


class VQAFolderEvalDataset(FolderDataset, VQAEvalDataset):
    """Questions to answer, with what LAVIS's ``vqa`` task reads from a data set.

    Attributes:
        answer_list: candidate answers; None: none are known, so that answers must be generated.
        coco_fmt_qust_file, coco_fmt_anno_file: for VQA's official metric; None where a question
            has no answer.
    """

    def __init__(self, answer_list: list[str] | None, split: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.answer_list = answer_list
        self.coco_fmt_qust_file: str | None = None
        self.coco_fmt_anno_file: str | None = None
        unanswered = sum(not item["answer"] for item in self.annotation)
        if unanswered:
            logging.warning(
                "%d of %d %s questions have no answer: predictions are saved, without an accuracy",
                unanswered,
                len(self),
                split,
            )
        else:
            files = write_coco_vqa(self, self.annotation, split)
            self.coco_fmt_qust_file, self.coco_fmt_anno_file = files

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``image``, ``text_input`` (both processed), ``question_id``, ``instance_id``."""
        item, (image,) = self.open(index)
        return {
            "image": self.vis_processor(image),
            "text_input": self.text_processor(item["question"]),
            "question_id": item["question_id"],
            "instance_id": item["instance_id"],
        }


@register("builder", "vqa_folder")
class VQAFolderBuilder(FolderBuilder):
    """Images, questions and answers; the questions of ``test`` may lack answers."""

    NAME = "vqa_folder"
    FILES = "questions"
    DATASET_CONFIG_DICT = {"default": shipped("datasets/vqa_folder/default.yaml")}
    train_dataset_cls = VQAFolderDataset
    eval_dataset_cls = VQAFolderEvalDataset

    def read(self, file: Path, split: str, skipped: SkipLog) -> Annotation:
        """Read a question file; ``read_questions`` says what it holds."""
        return read_questions(file, answered=split != "test", skipped=skipped)

    def arguments(self, split: str) -> dict[str, Any]:
        """The candidate answers, of a file or of the training questions."""
        if split == "train":
            return {}
        return {"split": split, "answer_list": self._answer_list()}

    def _answer_list(self) -> list[str] | None:
        answers = self.config.get("answers")
        if isinstance(answers, str):
            return read_answers(Path(answers).expanduser())
        if answers is not None and (type(answers) is not int or answers < 1):
            raise UserError(
                f"datasets.{self.NAME}.answers is {answers!r}: it must be the path of a file, a "
                "number of answers, or null"
            )
        train = self.annotations.get("train")
        return None if train is None else most_frequent(train, answers)
