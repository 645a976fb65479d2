"""Image and text processors; importing this registers them with LAVIS."""

from softmask_plugin.processors.image import ImageEvalProcessor, ImageTrainProcessor
from softmask_plugin.processors.text import CaptionProcessor, QuestionProcessor

__all__ = ["CaptionProcessor", "ImageEvalProcessor", "ImageTrainProcessor", "QuestionProcessor"]
