"""SoftMask++ (arXiv 2304.00719) for Salesforce LAVIS.

Importing this package registers its models, losses, processors, data sets, tasks, schedule and
runner with LAVIS. Without LAVIS the torch-only parts (``losses``, ``soft_mask``, ``nn``) can still
be imported; if LAVIS is installed but cannot work with the other packages, a warning says what to
do.
"""

import gc
import os
import warnings
from importlib.util import find_spec

# Before the import of torch, which reads it once. By default OpenMP's waiting threads spin for
# milliseconds, which made a training step ten times slower (9.0 s against 0.93 s) on two cores that
# data-loader workers shared. Spinning for microseconds is as fast on idle cores.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from softmask_plugin.host import stack

# The console script (softmask_command.py) parses its arguments first. To run a command that needs
# more, softmask_plugin/cli.py reloads this package.
only_command = os.environ.pop("SOFTMASK_COMMAND", None) is not None
_problems = stack.problems(stack.installed())
if only_command:
    pass
elif not _problems:
    _collects = gc.isenabled()
    gc.disable()  # a search for garbage among a million new objects finds none, and takes a second
    try:
        from softmask_plugin.host import compat

        compat.patch()

        from softmask_plugin import datasets, models, processors, runners, tasks  # noqa: F401
        from softmask_plugin.explain.cam import WordCam
        from softmask_plugin.explain.image import ImageExplanation, explain_image
        from softmask_plugin.explain.trained import load_trained
        from softmask_plugin.losses import FocalITCLoss
        from softmask_plugin.registry import get_loss_class, list_losses, register_loss
    finally:
        if _collects:
            gc.enable()

    __all__ = [
        "FocalITCLoss",
        "ImageExplanation",
        "WordCam",
        "explain_image",
        "get_loss_class",
        "list_losses",
        "load_trained",
        "register_loss",
    ]
elif find_spec("lavis") is not None:
    warnings.warn(f"nothing is registered with LAVIS: {_problems[0]}", stacklevel=2)
