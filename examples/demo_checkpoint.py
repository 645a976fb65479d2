"""What the examples load where no checkpoint is given: the model that `make demo` trained."""

from __future__ import annotations

import sys
from pathlib import Path


def newest_checkpoint() -> str:
    """The last checkpoint of the last demo; ends the program where there is none."""
    files = Path("outputs/demo").rglob("checkpoint_*.pth")
    newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
    if newest is None:
        sys.exit("no checkpoint in outputs/demo: run `make demo` first, or give --checkpoint FILE")
    return str(newest)
