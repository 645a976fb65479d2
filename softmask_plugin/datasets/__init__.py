"""Data sets; importing this registers their builders with LAVIS."""

from softmask_plugin.datasets.folders.builders import (
    CaptionsFolderBuilder,
    EntailmentFolderBuilder,
    NLVRFolderBuilder,
    VQAFolderBuilder,
)
from softmask_plugin.datasets.folders.refcoco import RefCocoPlusGroundingBuilder
from softmask_plugin.datasets.scenes.builders import (
    ScenesEntailmentBuilder,
    ScenesGroundingBuilder,
    ScenesNLVRBuilder,
    ScenesPretrainBuilder,
    ScenesRetrievalBuilder,
    ScenesVQABuilder,
)
from softmask_plugin.datasets.shards.builder import CaptionShardsBuilder

__all__ = [
    "CaptionShardsBuilder",
    "CaptionsFolderBuilder",
    "EntailmentFolderBuilder",
    "NLVRFolderBuilder",
    "RefCocoPlusGroundingBuilder",
    "ScenesEntailmentBuilder",
    "ScenesGroundingBuilder",
    "ScenesNLVRBuilder",
    "ScenesPretrainBuilder",
    "ScenesRetrievalBuilder",
    "ScenesVQABuilder",
    "VQAFolderBuilder",
]
