"""The runner that trains on CPU, one GPU or several processes alike, and its schedule."""

from softmask_plugin.runners.runner import SoftmaskRunner
from softmask_plugin.runners.schedule import CosineLRScheduler

__all__ = ["CosineLRScheduler", "SoftmaskRunner"]
