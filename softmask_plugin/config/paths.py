"""Where the shipped YAML files lie: inside the wheel, or beside the package in a checkout."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next(
    folder
    for folder in (PACKAGE / "lavis_configs", PACKAGE.parent / "lavis_configs")
    if folder.is_dir()
)


def shipped(relative: str) -> str:
    """Absolute path of a shipped YAML file.

    LAVIS joins its own root to every path it is given; an absolute path passes through.
    """
    return str(CONFIGS / relative)
