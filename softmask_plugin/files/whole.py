"""Write files whole or not at all, even if the process is killed or the machine fails."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from softmask_plugin.errors import UserError

LEFTOVERS = ".*.tmp"  # files that a killed process may leave in the folder


def write_whole(path: Path, make: Callable[[Path], object]) -> None:
    """Write a file under another name, flush it to disk, and only then rename it.

    Args:
        path: The file. An earlier version stays until the new one is whole.
        make: Writes the content to a path.

    Raises:
        OSError: The file, which it names, cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        make(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)  # the new name
    except OSError as error:
        if error.filename in (None, str(temporary)):  # None: the disk is full
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def require_other(output: str | Path, given: str | Path) -> None:
    """Raise UserError if a file to write is the one to read."""
    if Path(output).resolve() == Path(given).resolve():
        raise UserError(f"{output} would be overwritten: name another file with -o")


def write_json(path: Path, content: Any) -> None:
    """Write a small, indented JSON file whole."""
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
