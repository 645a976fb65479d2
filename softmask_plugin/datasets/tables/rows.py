"""Rows of JSON, JSONL, CSV and TSV files, known by suffix and content; bad rows are skipped."""

from __future__ import annotations

import ast
import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

from softmask_plugin.datasets.tables.layouts import PLAIN, TableOptions, find_columns
from softmask_plugin.errors import UserError

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")

# In Flickr8k's and Flickr30k's token files: an image, a number and, after a tab, a caption.
_TOKEN = re.compile(r"^([^\t\n]+)#\d+\t", re.M)

Item = TypeVar("Item")

# Where a row is in its file, and its value: a mapping of columns to values unless the row is bad.
Row = tuple[str, Any]


def parse_table(
    path: str | Path,
    columns: Sequence[str],
    parse: Callable[[dict[str, Any], list[str]], Item],
    kind: str = "table",
    parts: str = "rows",
    unpack: Callable[[dict[str, Any]], Iterable[Row] | None] = lambda content: None,
    options: TableOptions = PLAIN,
) -> list[Item]:
    """Parse a file of rows; unusable rows are skipped and reported.

    Args:
        path: A JSON list of objects; one object per line (JSONL); a CSV or TSV with a line of
            column names; or a token file of Flickr8k. UTF-8.
        columns: Columns that each row must have, under these names, those of ``options.keys``, or
            those of a published layout.
        parse: Turns a row into an item. It raises ValueError if the row is unusable, and appends to
            its second argument a complaint about each unusable part of the row.
        kind: What errors call the file, as in "caption file".
        parts: What reports count, a plural noun.
        unpack: Returns the rows of a JSON object that has a layout of its own; None if it has not.
        options: Names of columns, the separator, the images folder.

    Raises:
        UserError: The file is missing, malformed, or holds no usable row.
    """
    path = Path(path)
    items, problems = [], []
    for where, row in _rows(path, read_text(path, kind), columns, unpack, options):
        complaints: list[str] = []
        try:
            items.append(parse(_checked(row, columns, options), complaints))
        except ValueError as error:
            complaints.append(str(error))
        problems += [f"{path}, {where}: {complaint}" for complaint in complaints]
    if not items:
        raise UserError(f"no usable row: {problems[0]}" if problems else f"{path} holds no rows")
    options.skipped.add(f"{parts} of {path.name}", problems)
    return items


def read_text(path: Path, kind: str) -> str:
    """Read a UTF-8 file, which errors call "the <kind> file"; UserError if that fails."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8 ({error.reason})") from error
    except (OSError, ValueError) as error:  # ValueError: an impossible path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the {kind} file {path}: {reason}") from error


def parse_json(path: Path, text: str | bytes) -> Any:
    """Parse the content of a JSON file; UserError if it is malformed."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def image_name(value: Any, options: TableOptions = PLAIN) -> str:
    """Return a path below the images folder, with "/" between its parts; ValueError if it is no
    text, has ``..``, or is absolute and not in that folder."""
    name = PurePosixPath(value.strip().replace("\\", "/") if isinstance(value, str) else "")
    for root in options.roots:
        if name.is_relative_to(root):
            name = name.relative_to(root)
    if name.is_absolute() or ".." in name.parts or PureWindowsPath(name).drive:
        raise ValueError(f"image {short(value)} is outside the images folder")
    if not name.name:
        raise ValueError(f"expected an image name, got {short(value)}")
    return str(name)


def one_text(value: Any, what: str) -> str:
    """Return a text with a letter or digit, or a number as text; ValueError for anything else."""
    if type(value) is int or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if isinstance(value, str) and any(map(str.isalnum, value)):
        # JSON can spell half a surrogate pair, which no tokenizer takes
        return value.strip().encode("utf-8", "replace").decode("utf-8")
    raise ValueError(f"no usable {what}: {short(value)}")


def unfold(value: Any) -> Any:
    """Return the list or mapping that a text spells in JSON or Python, as programs write them into
    a cell of a CSV; other values as they are."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                if isinstance(found := read(value.strip()), (list, dict)):
                    return found
    return value


def texts(value: Any, what: str, complaints: list[str]) -> list[str]:
    """Return those of a text or a list of texts that ``one_text`` would; ``complaints`` counts the
    others. ValueError if none is usable."""
    value = unfold(value)
    given = value if isinstance(value, list) else [value]
    usable = []
    for each in given:
        with suppress(ValueError):
            usable.append(one_text(each, what))
    if not usable:
        raise ValueError(f"no usable {what}: {short(value)}")
    if len(usable) < len(given):
        complaints.append(f"{len(given) - len(usable)} unusable {what}s in {short(given)}")
    return usable


def short(value: Any) -> str:
    """``repr``, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _checked(row: Any, columns: Sequence[str], options: TableOptions) -> dict[str, Any]:
    if isinstance(row, Exception):
        raise row
    if not isinstance(row, dict):
        expected = " and ".join(f"'{column}'" for column in columns)
        raise ValueError(f"expected {expected}, got {short(row)}")
    row = _with_our_columns(row, columns, options)
    if None in row:  # the csv module's key for surplus fields
        raise ValueError("more fields than columns: quote texts that contain the delimiter")
    return row


def _with_our_columns(
    row: dict[str, Any], columns: Sequence[str], options: TableOptions, among: str = ""
) -> dict[str, Any]:
    found = find_columns(row, columns, options)
    if missing := [column for column in columns if column not in found]:
        names = " and no ".join(f"'{options.keys.get(column, column)}'" for column in missing)
        keys = " ".join(f"{options.place}{column}_key=COLUMN" for column in missing)
        remedy = f"set {keys}" if options.place else "rename its columns"  # a command has no keys
        raise ValueError(f"no {names} among {among}{short(list(row))}: {remedy}")
    return row | found


def _rows(
    path: Path,
    text: str,
    columns: Sequence[str],
    unpack: Callable[[dict[str, Any]], Iterable[Row] | None],
    options: TableOptions,
) -> Iterable[Row]:
    suffix, start = path.suffix.lower(), text.lstrip()[:1]
    if suffix in (".csv", ".tsv") or (start not in ("[", "{") and suffix not in SUFFIXES):
        return _csv_rows(path, text, columns, options)
    first_line, _, rest = text.strip().partition("\n")
    if start == "{" and rest and isinstance(_json(first_line), dict):
        lines = enumerate(text.split("\n"), 1)
        return ((f"line {number}", _json(line)) for number, line in lines if line.strip())
    content = parse_json(path, text)
    if isinstance(content, dict) and (unpacked := unpack(content)) is not None:
        return unpacked
    rows = content if isinstance(content, list) else [content]
    return ((f"entry {number}", row) for number, row in enumerate(rows, 1))


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(str(error))


def _csv_rows(
    path: Path, text: str, columns: Sequence[str], options: TableOptions
) -> Iterator[Row]:
    delimiter = options.separator or max("\t,;|", key=text.partition("\n")[0].count)
    names: list[str] | None = None
    if _TOKEN.match(text):
        text, delimiter, names = _TOKEN.sub(r"\1\t", text), "\t", ["image", "caption"]
    reader = csv.DictReader(
        io.StringIO(text),
        names,
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if names else csv.QUOTE_MINIMAL,
        strict=True,
    )
    try:
        if not reader.fieldnames:
            raise UserError(f"{path} holds no rows, or begins with an empty line")
        reader.fieldnames = [name.strip() for name in reader.fieldnames]
        header: dict[str, Any] = dict.fromkeys(reader.fieldnames, "")
        _with_our_columns(header, columns, options, "its columns ")
        for row in reader:
            yield f"line {reader.line_num}", row
    except ValueError as error:
        raise UserError(f"{path} has {error}") from error
    except csv.Error as error:
        where = f"{path}, after line {reader.line_num}"
        raise UserError(f"{where}: {error}; look for a stray quotation mark") from error
