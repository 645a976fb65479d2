"""Data sets; importing this registers their builders with LAVIS."""

from softmask_plugin.datasets.captions_folder import CaptionsFolderBuilder
from softmask_plugin.datasets.scene_builders import ScenesPretrainBuilder, ScenesRetrievalBuilder

__all__ = ["CaptionsFolderBuilder", "ScenesPretrainBuilder", "ScenesRetrievalBuilder"]
