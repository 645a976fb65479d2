"""The models, each registered with LAVIS under a ``softmask_`` name."""

from softmask_plugin.models.blip import SoftMaskBlipPretrain, SoftMaskBlipRetrieval
from softmask_plugin.models.classification import SoftMaskClassification
from softmask_plugin.models.features import SoftMaskFeatureExtractor
from softmask_plugin.models.matching import SoftMaskImageTextMatching
from softmask_plugin.models.nlvr import SoftMaskNlvr, SoftMaskNlvrPretrain
from softmask_plugin.models.pretrain import SoftMaskPretrain
from softmask_plugin.models.retrieval import SoftMaskRetrieval
from softmask_plugin.models.vqa import SoftMaskVqa

__all__ = [
    "SoftMaskBlipPretrain",
    "SoftMaskBlipRetrieval",
    "SoftMaskClassification",
    "SoftMaskFeatureExtractor",
    "SoftMaskImageTextMatching",
    "SoftMaskNlvr",
    "SoftMaskNlvrPretrain",
    "SoftMaskPretrain",
    "SoftMaskRetrieval",
    "SoftMaskVqa",
]
