"""The models, each registered with LAVIS under a ``softmask_`` name."""

from softmask_plugin.models.pretrain import SoftMaskPretrain

__all__ = ["SoftMaskPretrain"]
