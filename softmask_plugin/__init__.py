"""SoftMask++ (arXiv 2304.00719) for Salesforce LAVIS.

Importing this package registers its models, losses, processors, data sets and runner with LAVIS.
Without LAVIS the torch-only parts (``losses``, ``soft_mask``, ``nn``) can still be imported.
"""

from importlib.util import find_spec

if find_spec("lavis") is not None:
    from softmask_plugin import compat

    compat.patch()

    from softmask_plugin import datasets, models, processors, runners  # noqa: F401
    from softmask_plugin.losses import FocalITCLoss
    from softmask_plugin.registry import get_loss_class, list_losses, register_loss

    __all__ = ["FocalITCLoss", "get_loss_class", "list_losses", "register_loss"]
