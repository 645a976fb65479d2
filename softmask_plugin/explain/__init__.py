"""What the words of a caption refer to in an image, and what masking them does to the match."""

from softmask_plugin.explain.cam import WordCam
from softmask_plugin.explain.figure import Shown, word_panels
from softmask_plugin.explain.image import ImageExplanation, explain_file, explain_image
from softmask_plugin.explain.maps import WordMaps, phrase_maps, word_maps
from softmask_plugin.explain.occlusion import Curves, deletion_insertion
from softmask_plugin.explain.pairs import Explanation, explain
from softmask_plugin.explain.trained import Trained, load_trained

__all__ = [
    "Curves",
    "Explanation",
    "ImageExplanation",
    "Shown",
    "Trained",
    "WordCam",
    "WordMaps",
    "deletion_insertion",
    "explain",
    "explain_file",
    "explain_image",
    "load_trained",
    "phrase_maps",
    "word_maps",
    "word_panels",
]
