"""``python -m softmask_plugin SCRIPT ...``: run a LAVIS script with the plugin registered."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from softmask_plugin.errors import UserError

USAGE = """\
usage: python -m softmask_plugin SCRIPT [ARGUMENT ...]

Registers the plugin with LAVIS, then runs SCRIPT (such as LAVIS's own train.py) as python would.
For the plugin's own commands see 'softmask --help'."""


def main() -> int:
    """Run the script that the command line names; returns the exit code."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(USAGE)
        return 0 if len(sys.argv) > 1 else 2
    script = Path(sys.argv[1])
    if not script.is_file():
        print(f"python -m softmask_plugin: error: there is no file '{script}'", file=sys.stderr)
        return 2
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.resolve().parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except UserError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
