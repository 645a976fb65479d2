"""``torchrun ... -m softmask_plugin.train ...``: ``softmask train`` on every rank."""

from __future__ import annotations

import sys

from softmask_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
