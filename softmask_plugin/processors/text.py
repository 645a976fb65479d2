"""Text processors, which clean captions and questions as ALBEF does."""

from __future__ import annotations

import math
from typing import Any

from softmask_plugin.errors import UserError
from softmask_plugin.processors.base import Processor
from softmask_plugin.registry import register

_CLEANING = str.maketrans({**dict.fromkeys(",.'!?\"()*#:;~", ""), "-": " ", "/": " "})


@register("processor", "softmask_caption")
class CaptionProcessor(Processor):
    """Lower-case a caption, drop its punctuation and keep its first ``max_words`` words.

    The characters ``, . ' ! ? " ( ) * # : ; ~`` vanish, ``-`` and ``/`` separate words, and
    ``<person>`` (Conceptual Captions' placeholder for a name) becomes ``person``. A missing caption
    (None, NaN) becomes the empty string; a number or truth value is spelt out.

    Raises:
        UserError: The caption is something else.
    """

    def __init__(self, max_words: int = 30) -> None:
        self.require(
            isinstance(max_words, int) and max_words >= 1,
            f"max_words must be a positive whole number, got {max_words!r}",
        )
        self.max_words = max_words

    def __call__(self, caption: Any) -> str:
        """Clean one caption and cut it."""
        return " ".join(self.words(caption)[: self.max_words])

    def words(self, caption: Any) -> list[str]:
        """Return all words of a cleaned caption, beyond ``max_words`` too."""
        if caption is None or (isinstance(caption, float) and math.isnan(caption)):
            return []
        if not isinstance(caption, (str, int, float)):
            raise UserError(f"{self.NAME}: expected text, got {type(caption).__name__}")
        text = str(caption).lower().translate(_CLEANING).replace("<person>", "person")
        return text.split()


@register("processor", "softmask_question")
class QuestionProcessor(CaptionProcessor):
    """``CaptionProcessor`` for questions, which are longer: by default up to 50 words."""

    def __init__(self, max_words: int = 50) -> None:
        super().__init__(max_words)
