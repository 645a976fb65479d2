"""The user's own images with a file of captions, questions, statements or foils."""

from __future__ import annotations

from itertools import compress
from pathlib import Path
from typing import Any

from omegaconf import ListConfig

from softmask_plugin.config.paths import shipped
from softmask_plugin.config.run_options import flag
from softmask_plugin.datasets.folders.base import FolderBuilder
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.datasets.tables.captions import parse_captions
from softmask_plugin.datasets.tables.foils import parse_foils
from softmask_plugin.datasets.tables.layouts import TableOptions
from softmask_plugin.datasets.tables.questions import most_frequent, parse_answers, parse_questions
from softmask_plugin.datasets.tables.rows import short
from softmask_plugin.datasets.tables.statements import parse_statements
from softmask_plugin.datasets.task_datasets import (
    Annotation,
    EntailmentDataset,
    FoilDataset,
    NLVRDataset,
    PretrainDataset,
    RetrievalDataset,
    VQADataset,
    VQAEvalDataset,
)
from softmask_plugin.errors import UserError
from softmask_plugin.registry import register


@register("builder", "captions_folder")
class CaptionsFolderBuilder(FolderBuilder):
    """Images and captions: ``train`` for pretraining, ``val`` and ``test`` for retrieval."""

    FILES = "captions"
    DATASET_CONFIG_DICT = {"default": shipped("datasets/captions_folder/default.yaml")}
    train_dataset_cls = PretrainDataset
    eval_dataset_cls = RetrievalDataset

    def _parse(self, file: Path, split: str, options: TableOptions) -> Annotation:
        return parse_captions(file, split, options)


@register("builder", "vqa_folder")
class VQAFolderBuilder(FolderBuilder):
    """Images, questions and answers, for LAVIS's ``vqa``; in ``test`` answers may be missing."""

    FILES = "questions"
    DATASET_CONFIG_DICT = {"default": shipped("datasets/vqa_folder/default.yaml")}
    train_dataset_cls = VQADataset
    eval_dataset_cls = VQAEvalDataset

    def _parse(self, file: Path, split: str, options: TableOptions) -> Annotation:
        return parse_questions(file, split != "test", options)

    def _arguments(self, split: str) -> dict[str, Any]:
        return {} if split == "train" else {"answer_list": self._answer_list()}

    def _answer_list(self) -> list[str] | None:
        answers = self.config.get("answers")
        if isinstance(answers, str):
            options = TableOptions(skipped=SkipLog.of_run())
            return parse_answers(Path(answers).expanduser(), options)
        if answers is not None and (type(answers) is not int or answers < 1):
            raise UserError(
                f"{self.place}.answers is {answers!r}: it must be the path of a file, a number of "
                "answers, or null"
            )
        train = self.annotations.get("train")
        if train is None and answers is not None:
            raise UserError(
                f"{self.place}.answers={answers} counts those of the train split: set "
                f"{self.place}.questions.train, or name a file of answers"
            )
        return None if train is None else most_frequent(train, answers)


@register("builder", "entailment_folder")
class EntailmentFolderBuilder(FolderBuilder):
    """Images and labelled sentences, for LAVIS's ``multimodal_classification``."""

    FILES = "sentences"
    DATASET_CONFIG_DICT = {"default": shipped("datasets/entailment_folder/default.yaml")}
    train_dataset_cls = eval_dataset_cls = EntailmentDataset

    def _parse(self, file: Path, split: str, options: TableOptions) -> Annotation:
        return parse_statements(file, ("image",), self._labels(), options)

    def _arguments(self, split: str) -> dict[str, Any]:
        return {"labels": self._labels()}

    def _labels(self) -> list[str]:
        given = self.config.get("labels")
        labels = [str(name).strip() for name in given] if isinstance(given, ListConfig) else []
        different = {label.lower() for label in labels}
        if len(different) < max(2, len(labels)) or any(isinstance(name, bool) for name in given):
            raise UserError(
                f"{self.place}.labels is {given}: it must list two or more different names, yes "
                "and no in quotes"
            )
        return labels


@register("builder", "nlvr_folder")
class NLVRFolderBuilder(FolderBuilder):
    """Pairs of images with a true or false sentence, for ``multimodal_classification``."""

    FILES = "sentences"
    DATASET_CONFIG_DICT = {"default": shipped("datasets/nlvr_folder/default.yaml")}
    train_dataset_cls = eval_dataset_cls = NLVRDataset

    def _parse(self, file: Path, split: str, options: TableOptions) -> Annotation:
        # The labels are in the order of LAVIS's classes.
        return parse_statements(file, ("image0", "image1"), ("False", "True"), options)

    def _arguments(self, split: str) -> dict[str, Any]:
        swap = self.config.get("swap", True)
        flag(f"{self.place}.swap", swap)
        return {"swap": swap and split == "train"}


@register("builder", "foils_folder")
class FoilsFolderBuilder(FolderBuilder):
    """Images with captions and foils: ``val`` and ``test``, for ``softmask_foils``."""

    FILES = "foils"
    DATASET_CONFIG_DICT = {"default": shipped("datasets/foils_folder/default.yaml")}
    eval_dataset_cls = FoilDataset

    def _parse(self, file: Path, split: str, options: TableOptions) -> Annotation:
        clean, items = self.text_processors["eval"], parse_foils(file, options)
        same = [clean(item["caption"]) == clean(item["foil"]) for item in items]
        if all(same):
            raise UserError(
                f"{file}: each foil is cleaned or cut to its caption, so none is usable"
            )
        names = [f"{file}: {short(item['foil'])}" for item in compress(items, same)]
        options.skipped.add("foils that are cleaned or cut to their captions", names)
        return [item for item, left_out in zip(items, same, strict=True) if not left_out]
