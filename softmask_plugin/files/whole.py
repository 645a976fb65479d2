"""Files that are written whole or not at all, whatever happens to the process or the machine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEFTOVERS = ".*.tmp"  # what a killed process may leave in the folder


def write_whole(path: Path, make: Callable[[Path], object]) -> None:
    """Make a file under another name, on the disk, and only then give it its own.

    Args:
        path: of the file, an earlier one of which stays until the new one is whole.
        make: writes the content to the path that it is given.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        make(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)  # the new name
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a small JSON file, indented, as :func:`write_whole` does."""
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
