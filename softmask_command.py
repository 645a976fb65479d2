"""The ``softmask`` command: its help and its lists come before torch and LAVIS are imported."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Run the command; returns its exit code."""
    os.environ["SOFTMASK_COMMAND"] = "starts"  # softmask_plugin/__init__.py takes it back
    try:
        from softmask_plugin.cli import main
    except KeyboardInterrupt:  # until then, nothing handles Ctrl-C
        sys.stderr.write("softmask: interrupted: the same command starts anew\n")
        return 130
    return main()
