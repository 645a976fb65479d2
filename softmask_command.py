"""The ``softmask`` command: its help and its lists come before torch and LAVIS are imported."""

from __future__ import annotations

import os


def main() -> int:
    """Run the command; returns its exit code."""
    os.environ["SOFTMASK_COMMAND"] = "starts"  # softmask_plugin/__init__.py takes it back
    from softmask_plugin.cli import main

    return main()
