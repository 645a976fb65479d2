"""Data sets of what scene_tasks asks, in the layouts of LAVIS's downstream tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lavis.datasets.datasets.base_dataset import BaseDataset
from lavis.datasets.datasets.nlvr_datasets import NLVRDataset
from lavis.datasets.datasets.snli_ve_datasets import SNLIVisualEntialmentDataset
from lavis.datasets.datasets.vqa_datasets import VQADataset, VQAEvalDataset
from PIL import Image
from torch import Tensor

from softmask_plugin.datasets.coco_vqa import write_coco_vqa
from softmask_plugin.datasets.scenes.grammar import Box, Scene
from softmask_plugin.datasets.scenes.render import render
from softmask_plugin.datasets.scenes.tasks import ANSWERS, Hypothesis, Pair, Question, Reference


class SceneItemsDataset(BaseDataset):
    """Items drawn when asked for. To be named before the class of LAVIS's whose samples it gives.

    Args:
        vis_processor: turns an RGB image into a tensor (3, H, W).
        text_processor: turns a sentence into the model's text.
        items: what is asked of which scenes.
        image_size: side of the drawn images in pixels.

    Attributes:
        annotation: of each item its text, truth and ``instance_id``, under LAVIS's names.
    """

    def __init__(
        self,
        vis_processor: Callable[[Image.Image], Tensor],
        text_processor: Callable[[str], str],
        items: Sequence[Any],
        image_size: int,
    ) -> None:
        super().__init__(vis_processor, text_processor, None, [])
        self.items, self.image_size = items, image_size
        self.annotation = [self.annotate(index) for index in range(len(items))]
        self._add_instance_ids()

    def annotate(self, index: int) -> dict[str, Any]:
        """The entry of ``annotation`` for an item."""
        raise NotImplementedError

    def draw(self, scene: Scene) -> Tensor:
        """The processed picture of a scene."""
        return self.vis_processor(render(scene, self.image_size))


class SceneEntailmentDataset(SceneItemsDataset, SNLIVisualEntialmentDataset):
    """Hypotheses about scenes with a curtain, labelled as LAVIS labels SNLI-VE."""

    items: Sequence[Hypothesis]

    def annotate(self, index: int) -> dict[str, Any]:
        """Return ``sentence`` and ``label``, the class's name."""
        return {"sentence": self.items[index].text, "label": self.items[index].label}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``image``, ``text_input``, ``label`` (0 to 2) and ``instance_id``."""
        item, annotation = self.items[index], self.annotation[index]
        image = render(item.scene, self.image_size)
        _draw_curtain(image, item.curtain)
        return {
            "image": self.vis_processor(image),
            "text_input": self.text_processor(item.text),
            "label": self.class_labels[item.label],
            "instance_id": annotation["instance_id"],
        }


class SceneNLVRDataset(SceneItemsDataset, NLVRDataset):
    """Statements about two scenes, labelled as LAVIS labels NLVR2."""

    items: Sequence[Pair]

    def annotate(self, index: int) -> dict[str, Any]:
        """Return ``sentence`` and ``label``, ``"True"`` or ``"False"``."""
        return {"sentence": self.items[index].text, "label": str(self.items[index].label)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``image0`` (left), ``image1``, ``text_input``, ``label`` and ``instance_id``."""
        item, annotation = self.items[index], self.annotation[index]
        return {
            "image0": self.draw(item.left),
            "image1": self.draw(item.right),
            "text_input": self.text_processor(item.text),
            "label": self.class_labels[annotation["label"]],
            "instance_id": annotation["instance_id"],
        }


class SceneQuestionsDataset(SceneItemsDataset):
    """Questions about scenes, in the layout of LAVIS's annotation files."""

    items: Sequence[Question]

    def annotate(self, index: int) -> dict[str, Any]:
        """Return ``image`` and ``question_id`` (numbers), ``question``, ``answer`` ({it: 1.0})."""
        item = self.items[index]
        keys = {"image": index, "question_id": index}
        return {**keys, "question": item.text, "answer": {item.answer: 1.0}}


class SceneVQADataset(SceneQuestionsDataset, VQADataset):
    """Questions with their answers, to train on."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``image``, ``text_input``, ``answers`` and ``weights`` (one of each)."""
        item = self.items[index]
        return {
            "image": self.draw(item.scene),
            "text_input": self.text_processor(item.text),
            "answers": [item.answer],
            "weights": [1.0],
        }


class SceneVQAEvalDataset(SceneQuestionsDataset, VQAEvalDataset):
    """Questions to answer, with what LAVIS's ``vqa`` task reads from a data set.

    Attributes:
        answer_list: all answers that scenes have.
        coco_fmt_qust_file, coco_fmt_anno_file: for VQA's official metric.
    """

    def __init__(self, *arguments: Any, split: str) -> None:
        super().__init__(*arguments)
        self.answer_list = list(ANSWERS)
        files = write_coco_vqa(self, self.annotation, split)
        self.coco_fmt_qust_file, self.coco_fmt_anno_file = files

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``image``, ``text_input``, ``question_id`` (a number) and ``instance_id``."""
        item, annotation = self.items[index], self.annotation[index]
        return {
            "image": self.draw(item.scene),
            "text_input": self.text_processor(item.text),
            "question_id": annotation["question_id"],
            "instance_id": annotation["instance_id"],
        }


class SceneGroundingDataset(SceneItemsDataset):
    """Referring expressions with boxes, as the task ``softmask_grounding`` reads them.

    Args:
        group: the name under which the split's metrics are reported.
    """

    items: Sequence[tuple[Scene, Reference]]

    def __init__(self, *arguments: Any, group: str) -> None:
        self.group = group
        super().__init__(*arguments)

    def annotate(self, index: int) -> dict[str, Any]:
        """Return ``text``, ``group``, ``box`` of the thing meant and ``boxes`` of all things.

        Boxes are (x0, y0, x1, y1) in [0, 1].
        """
        scene, expression = self.items[index]
        return {
            "text": expression.text,
            "box": expression.thing.box,
            "boxes": [thing.box for thing in scene.things],
            "group": self.group,
        }

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``image``, ``text_input``, ``index`` (into ``annotation``), ``instance_id``."""
        scene, expression = self.items[index]
        return {
            "image": self.draw(scene),
            "text_input": self.text_processor(expression.text),
            "index": index,
            "instance_id": self.annotation[index]["instance_id"],
        }


def _draw_curtain(image: Image.Image, box: Box) -> None:
    """Cover a part of the image with an opaque grey curtain, pleated lest it look like a square."""
    x0, y0, x1, y1 = (round(edge * image.width) for edge in box)
    pleats = np.arange(x1 - x0) * 30 // image.width % 2
    greys = np.where(pleats, 150, 95).astype(np.uint8)
    image.paste(Image.fromarray(np.tile(greys, (y1 - y0, 1))), (x0, y0))
