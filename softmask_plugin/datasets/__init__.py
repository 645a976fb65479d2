"""Data sets; importing this registers their builders with LAVIS."""

from softmask_plugin.datasets.caption_shards import CaptionShardsBuilder
from softmask_plugin.datasets.captions_folder import CaptionsFolderBuilder
from softmask_plugin.datasets.entailment_folder import EntailmentFolderBuilder
from softmask_plugin.datasets.nlvr_folder import NLVRFolderBuilder
from softmask_plugin.datasets.refcoco import RefCocoPlusGroundingBuilder
from softmask_plugin.datasets.scene_builders import ScenesPretrainBuilder, ScenesRetrievalBuilder
from softmask_plugin.datasets.scene_task_builders import (
    ScenesEntailmentBuilder,
    ScenesGroundingBuilder,
    ScenesNLVRBuilder,
    ScenesVQABuilder,
)
from softmask_plugin.datasets.vqa_folder import VQAFolderBuilder

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
