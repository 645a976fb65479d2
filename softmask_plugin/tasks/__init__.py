"""Tasks; importing this registers them with LAVIS."""

from softmask_plugin.tasks.foils import FoilsTask
from softmask_plugin.tasks.grounding import GroundingTask

__all__ = ["FoilsTask", "GroundingTask"]
