"""RefCOCO+ for the grounding task, from the files that ALBEF's evaluation reads.

Their layout, as ALBEF's ``Grounding.py``, ``grounding_eval`` and REFER's reader use them:

- ``refcoco+_val.json``, ``refcoco+_test.json``: a list of ``{"image", "text", "ref_id"}``;
- ``dets.json``: for each image id (a string) a list of boxes ``[x, y, w, h, ...]``, in pixels;
- ``refs(unc).p``: a pickled list of ``{"ref_id", "ann_id", "image_id", "split"}``, the split being
  train, val, testA or testB;
- ``instances.json``: ``"images"``, a list of ``{"id", "width", "height"}``, and ``"annotations"``,
  a list of ``{"id", "bbox": [x, y, w, h]}``, in pixels.

Other keys are ignored. ALBEF also opens a ``cocos.json``, but uses nothing of it.
"""

from __future__ import annotations

import io
import pickle
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from softmask_plugin.config.paths import shipped
from softmask_plugin.datasets.folders.base import FolderBuilder
from softmask_plugin.datasets.tables.layouts import TableOptions
from softmask_plugin.datasets.tables.rows import image_name, parse_json
from softmask_plugin.datasets.task_datasets import Annotation, GroundingDataset
from softmask_plugin.errors import UserError, reason_of
from softmask_plugin.registry import register

# Where the files come from, for error messages.
ALBEF = "ALBEF's data.tar.gz (https://github.com/salesforce/ALBEF)"
REFER = "REFER's refcoco+.zip (https://github.com/lichengunc/refer)"


@register("builder", "refcoco_plus_grounding")
class RefCocoPlusGroundingBuilder(FolderBuilder):
    """RefCOCO+ with a detector's boxes as candidates; the groups are val, testA and testB."""

    FILES = "annotations"
    DATASET_CONFIG_DICT = {"default": shipped("datasets/refcoco/plus_grounding.yaml")}
    eval_dataset_cls = GroundingDataset

    @cached_property
    def _tables(self) -> tuple[Table, Table, Table, Table]:
        """References, images and true boxes by their ids, and a detector's boxes by image."""
        refs, instances, detections = (
            Path(self.config[key]).expanduser() for key in ("refs", "instances", "detections")
        )
        content = Table(instances, REFER, parse_json(instances, read_bytes(instances, REFER)))
        return (
            Table(refs, REFER, load_plain_pickle(refs, REFER), "ref_id"),
            Table(instances, REFER, content["images"], "id"),
            Table(instances, REFER, content["annotations"], "id"),
            Table(detections, ALBEF, parse_json(detections, read_bytes(detections, ALBEF))),
        )

    def _boxes(self, ref_id: int) -> dict[str, Any]:
        """The true ``box``, the candidate ``boxes`` and the ``group`` of a reference."""
        refs, images, truths, detections = self._tables
        ref = refs[ref_id]
        image = images[ref["image_id"]]
        size = image["width"], image["height"]
        (box,) = unit_boxes([truths[ref["ann_id"]]["bbox"]], *size)
        boxes = unit_boxes(detections[str(ref["image_id"])], *size)
        return {"box": box, "boxes": boxes, "group": ref["split"]}

    def _parse(self, file: Path, split: str, options: TableOptions) -> Annotation:
        rows, annotation = parse_json(file, read_bytes(file, ALBEF)), []
        for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
            try:
                image = image_name(row["image"], options)
                item = {"image": image, "text": row["text"], **self._boxes(row["ref_id"])}
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise UserError(
                    f"{file}, entry {number}, or its entries in the other files are laid out "
                    f"differently ({error!r}): get those of {ALBEF} and {REFER}"
                ) from error
            annotation.append(item)
        if not annotation:
            raise UserError(f"{file} holds no entries: get that of {ALBEF}")
        return annotation


class Table(dict[Any, Any]):
    """Entries of a file by their ids; a missing one is a UserError that names the source.

    ``content`` is a mapping or, with ``key``, a list of entries that have their id under this key.
    """

    def __init__(self, file: Path, source: str, content: Any, key: str | None = None) -> None:
        self.file, self.source = file, source
        try:
            super().__init__({entry[key]: entry for entry in content} if key else content)
        except (KeyError, TypeError, ValueError) as error:
            what = f"a list of entries with '{key}'" if key else "an object"
            raise UserError(f"{file} should hold {what}: get that of {source}") from error

    def __missing__(self, key: Any) -> Any:
        raise UserError(f"{self.file} has no entry {key!r}: get that of {self.source}")


def unit_boxes(boxes: Any, width: float, height: float) -> list[list[float]]:
    """``[x, y, w, h, ...]`` in pixels -> ``[x0, y0, x1, y1]`` in [0, 1], cut at the image's edge.

    Boxes outside the image are dropped.
    """
    xywh = np.array([box[:4] for box in boxes], dtype=np.float64).reshape(-1, 4)
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    corners = (corners / [width, height, width, height]).clip(0, 1)
    return corners[(corners[:, :2] < corners[:, 2:]).all(axis=1)].tolist()


def load_plain_pickle(file: Path, source: str) -> Any:
    """Load a pickle of lists, dicts, text and numbers, without ever running code that it holds.

    UserError if it is missing, no pickle, or holds other objects.
    """
    content = io.BytesIO(read_bytes(file, source))
    try:  # Python 2 wrote it, whose text may hold any bytes
        return _PlainUnpickler(content, encoding="latin-1").load()
    except Exception as error:  # the unpickler raises nearly anything for a file of another kind
        what = f"{file} is not a pickle of plain lists, dicts and text"
        raise UserError(f"{what}: {reason_of(error)}") from error


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run code")


def read_bytes(file: Path, source: str) -> bytes:
    """Read a file; UserError that names its ``source`` if it is missing."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}): it comes with {source}") from error
