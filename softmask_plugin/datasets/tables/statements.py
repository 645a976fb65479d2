"""Files of statements about one or two images: JSON, JSONL, CSV or TSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softmask_plugin.datasets.tables.layouts import PLAIN, TableOptions
from softmask_plugin.datasets.tables.rows import image_name, one_text, parse_table, short
from softmask_plugin.errors import suggest


def parse_statements(
    path: str | Path,
    images: Sequence[str],
    labels: Sequence[str],
    options: TableOptions = PLAIN,
) -> list[dict[str, Any]]:
    """Parse a file of statements into one entry per usable row; other rows are reported.

    Args:
        path: Rows with the columns ``images``, which name one each, ``sentence`` and ``label``, or
            a file as published: SNLI-VE's, e-SNLI-VE's, NLVR2's (docs/data.md).
        labels: Names of the classes. A row's label is a name, in any case, or a number from 0
            unless all names are numbers.
        options: Names of columns, the separator, the images folder.

    Returns:
        ``{"images", "sentence", "label"}`` each, as in LAVIS's annotations, the label being one of
        ``labels``; ``image`` in place of ``images`` if there is one image column.

    Raises:
        UserError: The file is missing, malformed, or holds no usable row.
    """

    def parse(row: dict[str, Any], complaints: list[str]) -> dict[str, Any]:
        names = [image_name(row[column], options) for column in images]
        return {
            **({"images": names} if len(names) > 1 else {"image": names[0]}),
            "sentence": one_text(row["sentence"], "sentence"),
            "label": _label(row["label"], labels),
        }

    columns = (*images, "sentence", "label")
    return parse_table(path, columns, parse, "statement", options=options)


def _label(value: Any, labels: Sequence[str]) -> str:
    given = str(value).strip().lower()  # JSON's true is "true"
    for label in labels:
        if given == label.lower():
            return label
    by_number = given.isdecimal() and not all(map(str.isdecimal, labels))  # 0 is none of 1 to 5
    if by_number and int(given) < len(labels):
        return labels[int(given)]
    raise ValueError(f"unknown label {short(value)}: {suggest(given, labels)}")
