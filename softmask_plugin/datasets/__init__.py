"""Data sets; importing this registers their builders with LAVIS."""

from softmask_plugin.datasets.folders.captions import CaptionsFolderBuilder
from softmask_plugin.datasets.folders.entailment import EntailmentFolderBuilder
from softmask_plugin.datasets.folders.nlvr import NLVRFolderBuilder
from softmask_plugin.datasets.folders.refcoco import RefCocoPlusGroundingBuilder
from softmask_plugin.datasets.folders.vqa import VQAFolderBuilder
from softmask_plugin.datasets.scenes.builders import ScenesPretrainBuilder, ScenesRetrievalBuilder
from softmask_plugin.datasets.scenes.task_builders import (
    ScenesEntailmentBuilder,
    ScenesGroundingBuilder,
    ScenesNLVRBuilder,
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
