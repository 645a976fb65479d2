"""Data sets in the layouts of LAVIS's tasks; their images are read from files or rendered."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lavis.datasets.datasets import nlvr_datasets, vqa_datasets
from lavis.datasets.datasets.base_dataset import BaseDataset
from lavis.datasets.datasets.snli_ve_datasets import SNLIVisualEntialmentDataset
from PIL import Image
from torch.utils.data import IterableDataset

from softmask_plugin.datasets.coco_vqa import write_coco_vqa
from softmask_plugin.datasets.images import UnreadableImageError
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.errors import UserError

# If this many images in a row are unreadable, the disk must be at fault.
MAX_UNREADABLE_IN_A_ROW = 100

Annotation = list[dict[str, Any]]  # one dict per item, with the keys of LAVIS's annotation files

# Opens an item's images. The number is the shortest side, in pixels, to which a file may be reduced
# while it is decoded (None: full size).
OpenImages = Callable[[dict[str, Any], int | None], list[Image.Image]]


class ItemDataset(BaseDataset):
    """Items and their images. A subclass names it before the LAVIS class whose layout it shares.

    Args:
        vis_processor, text_processor: Applied to each PIL image and text.
        annotation: The items; each gets an ``instance_id``.
        open_images: Opens the images of an item.
        skipped: Where unreadable images are reported and replaced by the next item's; None: an
            unreadable image is an error.
    """

    def __init__(
        self,
        vis_processor: Any,
        text_processor: Any,
        annotation: Annotation,
        open_images: OpenImages,
        skipped: SkipLog | None = None,
    ) -> None:
        super().__init__(vis_processor, text_processor, None, [])
        self.annotation, self.open_images, self.skipped = annotation, open_images, skipped
        self._add_instance_ids()

    def open(self, index: int) -> tuple[dict[str, Any], list[Image.Image]]:
        """Return an item and its images; UserError if one, or too many in a row, cannot be read."""
        if index >= len(self):  # ends a loop over the data set
            raise IndexError(index)
        min_side = getattr(self.vis_processor, "min_side", None)
        for offset in range(MAX_UNREADABLE_IN_A_ROW):
            item = self.annotation[(index + offset) % len(self)]
            try:
                return item, self.open_images(item, min_side)
            except UnreadableImageError as error:
                if self.skipped is None:
                    raise
                last = str(error)
                self.skipped.add("unreadable images", [last])
        raise UserError(
            f"{MAX_UNREADABLE_IN_A_ROW} images in a row cannot be read, the last was {last}; is "
            "the disk still there?"
        )

    def _sample(self, index: int, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return an item, and its image and its text at a key (of several, any), processed."""
        item, (image,) = self.open(index)
        text = item[key]
        if isinstance(text, list):
            text = text[int(torch.randint(len(text), ()))]
        pixels = self.vis_processor(image)
        return item, {"image": pixels, "text_input": self.text_processor(text)}


class PretrainDataset(ItemDataset):
    """Images with captions (``image_id``, ``caption``: a list), for pretraining.

    A sample has ``image``, ``text_input`` (one of the captions, drawn at each access as in ALBEF),
    ``image_id`` (int; equal for images of the same ``image_id``, which count as positives of each
    other) and ``instance_id``.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        numbers: dict[Any, int] = {}
        for item in self.annotation:
            item["image_id"] = numbers.setdefault(item["image_id"], len(numbers))

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, sample = self._sample(index, "caption")
        return {**sample, "image_id": item["image_id"], "instance_id": item["instance_id"]}


def number_images(datasets: Iterable[Any]) -> None:
    """Make images of data sets that are trained on together differ in ``image_id``, in place."""
    first = 0
    for dataset in datasets:
        if isinstance(dataset, PretrainDataset):
            for item in dataset.annotation:
                item["image_id"] += first
            first += len({item["image_id"] for item in dataset.annotation})


class RetrievalDataset(ItemDataset):
    """Images with all their captions (``image``: a name, ``caption``: a list), for retrieval.

    A sample has ``image`` and ``index``.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.image = [item["image"] for item in self.annotation]  # names of the N images
        self.text: list[str] = []  # the M captions, processed
        self.txt2img: dict[int, int] = {}  # index of a caption -> index of its image
        self.img2txt: dict[int, list[int]] = {}  # index of an image -> indices of its captions
        for index, item in enumerate(self.annotation):
            first = len(self.text)
            self.text += map(self.text_processor, item["caption"])
            self.img2txt[index] = list(range(first, len(self.text)))
            self.txt2img |= dict.fromkeys(self.img2txt[index], index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        _, (image,) = self.open(index)
        return {"image": self.vis_processor(image), "index": index}


class EntailmentDataset(ItemDataset, SNLIVisualEntialmentDataset):
    """Images with a ``sentence`` and its ``label``, laid out as LAVIS's SNLI-VE.

    A sample has ``image``, ``text_input``, ``label`` (the class's number), ``image_id`` (the
    image's name) and ``instance_id``. ``labels`` names the classes in the order of their numbers;
    None: LAVIS's three.
    """

    def __init__(
        self, *arguments: Any, labels: Sequence[str] | None = None, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        if labels is not None:
            self.class_labels = {label: number for number, label in enumerate(labels)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, sample = self._sample(index, "sentence")
        ids = {"image_id": item["image"], "instance_id": item["instance_id"]}
        return {**sample, "label": self.class_labels[item["label"]], **ids}


class NLVRDataset(ItemDataset, nlvr_datasets.NLVRDataset):
    """Pairs of images with a ``sentence`` that is true or false, laid out as LAVIS's NLVR2.

    A sample has ``image0``, ``image1``, ``text_input``, ``label`` (0 or 1) and ``instance_id``.
    ``swap``: half of the time, the images and the words "left" and "right" are swapped.
    """

    def __init__(self, *arguments: Any, swap: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.swap = swap

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, images = self.open(index)
        sentence = self.text_processor(item["sentence"])
        if self.swap and torch.rand(()) < 0.5:
            images.reverse()
            # Only at the start of a word: LAVIS would also turn the "right" in "bright".
            sides = {"left": "right", "right": "left"}
            sentence = re.sub(r"\b(left|right)", lambda word: sides[word[0]], sentence)
        image0, image1 = map(self.vis_processor, images)
        label = self.class_labels[item["label"]]
        sample = {"image0": image0, "image1": image1, "text_input": sentence, "label": label}
        return {**sample, "instance_id": item["instance_id"]}


class VQADataset(ItemDataset, vqa_datasets.VQADataset):
    """Images with a ``question`` and its ``answer`` ({text: weight}), to train on.

    A sample has ``image``, ``text_input``, ``answers`` and their ``weights``.
    """

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, sample = self._sample(index, "question")
        return {**sample, "answers": list(item["answer"]), "weights": list(item["answer"].values())}


class VQAEvalDataset(ItemDataset, vqa_datasets.VQAEvalDataset):
    """Images with a ``question``, as LAVIS's ``vqa`` task evaluates them.

    A sample has ``image``, ``text_input``, ``question_id`` (int) and ``instance_id``. The data set
    has the candidates as ``answer_list`` (None: a model must generate answers), and files for VQA's
    official metric as ``coco_fmt_qust_file`` and ``coco_fmt_anno_file`` (None if a question has no
    answer).
    """

    def __init__(self, *arguments: Any, answer_list: list[str] | None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.answer_list = answer_list
        files: tuple[str | None, str | None] = None, None
        if unanswered := sum(not item["answer"] for item in self.annotation):
            text = "%d of %d test questions have no answer: predictions are saved, but no accuracy"
            logging.warning(text, unanswered, len(self))
        else:
            files = write_coco_vqa(self, self.annotation)
        known = set(answer_list or ())
        asked = [item["answer"] for item in self.annotation if item["answer"]]
        if known and (lost := sum(map(known.isdisjoint, asked))):
            text = "%d of %d questions have none of their answers among the %d candidates"
            logging.warning(text, lost, len(asked), len(known))
        self.coco_fmt_qust_file, self.coco_fmt_anno_file = files

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, sample = self._sample(index, "question")
        return {**sample, "question_id": item["question_id"], "instance_id": item["instance_id"]}


class GroundingDataset(ItemDataset):
    """Images with a ``text`` and boxes of what its words name, laid out as ``GroundingTask`` says.

    Boxes are shares of the whole image, which the image processor must therefore keep.
    """

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, sample = self._sample(index, "text")
        return {**sample, "instance_id": item["instance_id"], "index": index}


class FoilDataset(ItemDataset):
    """Images with a true ``caption`` and a false one, its ``foil``, as ``FoilsTask`` takes them."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, (image,) = self.open(index)
        texts = {key: self.text_processor(item[key]) for key in ("caption", "foil")}
        ids = {"instance_id": item["instance_id"], "index": index}
        return {"image": self.vis_processor(image), **texts, **ids}


def require_evaluable(dataset: Any, split: str) -> None:
    """Raise UserError if a data set, or one of several joined, serves training alone."""
    for each in getattr(dataset, "datasets", [dataset]):
        if isinstance(each, (PretrainDataset, VQADataset, IterableDataset)):
            raise UserError(
                f"the '{split}' split lacks what evaluation needs: name its file as that of "
                "'val' or 'test'"
            )
