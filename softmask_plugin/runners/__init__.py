"""The runner for a CPU, one GPU or several processes, and its schedule."""

from softmask_plugin.runners.runner import SoftmaskRunner
from softmask_plugin.runners.schedule import CosineLRScheduler

__all__ = ["CosineLRScheduler", "SoftmaskRunner"]
