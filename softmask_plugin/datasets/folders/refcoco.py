"""RefCOCO+ for the grounding task, from the files that ALBEF's evaluation reads.

Their layout, as ALBEF's ``Grounding.py``, ``grounding_eval`` and REFER's reader use them:

- ``refcoco+_val.json``, ``refcoco+_test.json``: a list of ``{"image", "text", "ref_id"}``;
- ``dets.json``: by image id (a string) a list of boxes ``[x, y, w, h, ...]``, in pixels;
- ``refs(unc).p``: a pickled list of ``{"ref_id", "ann_id", "image_id", "split"}``, the split being
  train, val, testA or testB;
- ``instances.json``: ``"images"``, a list of ``{"id", "width", "height"}``, and ``"annotations"``,
  a list of ``{"id", "bbox": [x, y, w, h]}``, in pixels.

Other keys are ignored. ALBEF opens a ``cocos.json`` as well, but reads nothing from it.
"""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from softmask_plugin.config.paths import shipped
from softmask_plugin.datasets.folders.base import Annotation, FolderBuilder, FolderDataset
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.datasets.tables.rows import image_name
from softmask_plugin.errors import UserError, reason_of
from softmask_plugin.registry import register

# What to download, for error messages.
ALBEF = "ALBEF's data.tar.gz (https://github.com/salesforce/ALBEF)"
REFER = "REFER's refcoco+.zip (https://github.com/lichengunc/refer)"


class GroundingDataset(FolderDataset):
    """Images with expressions that refer to a thing in them, for the task ``softmask_grounding``.

    The annotation is a list of ``{"image", "text", "box", "boxes", "group"}``: the name of the
    image, the expression, the true box, the candidates, all boxes ``[x0, y0, x1, y1]`` in [0, 1],
    and the group that results are given for. The image processor must keep all of an image.
    """

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``image``, ``text_input`` (both processed), ``instance_id`` and ``index``."""
        item, (image,) = self.open(index)
        return {
            "image": self.vis_processor(image),
            "text_input": self.text_processor(item["text"]),
            "instance_id": item["instance_id"],
            "index": index,
        }


@register("builder", "refcoco_plus_grounding")
class RefCocoPlusGroundingBuilder(FolderBuilder):
    """RefCOCO+ with the candidate boxes of a detector; the groups are val, testA and testB.

    The keys of ``datasets.refcoco_plus_grounding`` are described in the shipped YAML file.

    Raises:
        UserError: as in the base class; a file is missing, or laid out differently than this
            module says.
    """

    NAME = "refcoco_plus_grounding"
    FILES = "annotations"
    DATASET_CONFIG_DICT = {"default": shipped("datasets/refcoco/plus_grounding.yaml")}
    eval_dataset_cls = GroundingDataset

    @cached_property
    def known(self) -> KnownBoxes:
        """The boxes of both splits."""
        return KnownBoxes.read(
            *(Path(self.config[key]).expanduser() for key in ("refs", "instances", "detections"))
        )

    def read(self, file: Path, split: str, skipped: SkipLog) -> Annotation:
        """Read the expressions of a split with their boxes."""
        return annotate(file, self.known)


@dataclass(frozen=True)
class Table:
    """What a file says of each thing, by the thing's id; what it lacks is a UserError."""

    file: Path
    source: str
    entries: Any

    @classmethod
    def of(cls, file: Path, source: str, entries: Any, key: str) -> Table:
        """Index a list of entries by their ``key``."""
        try:
            return cls(file, source, {entry[key]: entry for entry in entries})
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{file} should hold a list of entries with '{key}': get that of {source}"
            ) from error

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.entries[key]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{self.file} has no entry {key!r}: get that of {self.source}"
            ) from error


@dataclass(frozen=True)
class KnownBoxes:
    """Where things are: REFER's entries by their ids, and what a detector found by image id."""

    refs: Table
    images: Table
    truths: Table
    detections: Table

    @classmethod
    def read(cls, refs: Path, instances: Path, detections: Path) -> KnownBoxes:
        """Read the three files; UserError where one is missing or laid out differently."""
        content = Table(instances, REFER, read_json(instances, REFER))
        return cls(
            refs=Table.of(refs, REFER, read_plain_pickle(refs, REFER), "ref_id"),
            images=Table.of(instances, REFER, content["images"], "id"),
            truths=Table.of(instances, REFER, content["annotations"], "id"),
            detections=Table(detections, ALBEF, read_json(detections, ALBEF)),
        )

    def of(self, ref_id: int) -> dict[str, Any]:
        """True box, candidate boxes and group of an expression, as the annotation has them."""
        ref = self.refs[ref_id]
        image = self.images[ref["image_id"]]
        size = image["width"], image["height"]
        (box,) = unit_boxes([self.truths[ref["ann_id"]]["bbox"]], *size)
        boxes = unit_boxes(self.detections[str(ref["image_id"])], *size)
        return {"box": box, "boxes": boxes, "group": ref["split"]}


def annotate(file: Path, known: KnownBoxes) -> Annotation:
    """Read a file of expressions and add their boxes.

    Raises:
        UserError: there is no such file, or an entry is laid out differently, has no boxes, or
            names an image outside of the images folder.
    """
    rows, annotation = read_json(file, ALBEF), []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        try:
            image = image_name(row["image"])
            item = {"image": image, "text": row["text"], **known.of(row["ref_id"])}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{file}, entry {number}, or what the other files say of it, is laid out "
                f"differently ({error!r}): get those of {ALBEF} and {REFER}"
            ) from error
        annotation.append(item)
    return annotation


def unit_boxes(boxes: Any, width: float, height: float) -> list[list[float]]:
    """``[x, y, w, h, ...]`` in pixels -> ``[x0, y0, x1, y1]`` in [0, 1], cut at the image's edge.

    Boxes of which nothing is left are dropped.
    """
    xywh = np.array([box[:4] for box in boxes], dtype=np.float64).reshape(-1, 4)
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    corners = (corners / [width, height, width, height]).clip(0, 1)
    return corners[(corners[:, :2] < corners[:, 2:]).all(axis=1)].tolist()


def read_json(file: Path, source: str) -> Any:
    """Read a JSON file; UserError where it is none, or missing: then get it from ``source``."""
    try:
        return json.loads(read_bytes(file, source))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error


def read_plain_pickle(file: Path, source: str) -> Any:
    """Read a pickle of lists, dicts, text and numbers, without ever running code that it holds.

    Raises:
        UserError: it is missing, no pickle, or holds other objects, which could run code.
    """
    content = io.BytesIO(read_bytes(file, source))
    try:  # it is of Python 2, whose text may hold any bytes
        return _PlainUnpickler(content, encoding="latin-1").load()
    except Exception as error:  # the unpickler raises nearly anything for a file of another kind
        reason = reason_of(error)
        raise UserError(f"{file} is no pickle of plain lists, dicts and text: {reason}") from error


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run code")


def read_bytes(file: Path, source: str) -> bytes:
    """Read a file; UserError that names its ``source`` where it is missing."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}): it comes with {source}") from error
