"""Errors for people: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
from torch import Tensor


class UserError(Exception):
    """Something the user can mend. The command line prints its message without a traceback.

    Args:
        message: what is wrong, where, and what to do; kept as one line, see ``one_line``.
    """

    def __init__(self, message: str) -> None:
        # A data loader raises what its worker raised anew, with the worker's traceback for message.
        if message.startswith("Caught ") and "\nOriginal Traceback" in message:
            message = message.rstrip().rpartition("\n")[2].partition(": ")[2]
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    r"""A text that shows as one line: what a terminal would obey or not show is spelt out.

    >>> print(one_line("photos/\x1b[2J.jpg"))
    photos/\x1b[2J.jpg
    """
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def reason_of(error: BaseException) -> str:
    r"""What an exception says, in one line, or its type where it says nothing.

    >>> print(reason_of(ValueError("line 3:\n  no mapping")), reason_of(KeyError()))
    line 3: no mapping KeyError
    """
    return " ".join(str(error).split()) or type(error).__name__


def suggest(name: str, choices: Iterable[str], limit: int = 3) -> str:
    """Return the choices nearest to ``name``, worded to end an error message.

    >>> suggest("softmsk_pretrain", ["softmask_pretrain", "albef_vqa"])
    "did you mean 'softmask_pretrain'?"
    >>> suggest("xyz", ["tiny", "base"])
    "choose from 'base', 'tiny'"
    """
    names = sorted({str(choice) for choice in choices})
    close = difflib.get_close_matches(str(name), names, n=limit, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    return "choose from " + ", ".join(f"'{n}'" for n in names) if names else "none is available"


def require_finite_scores(what: str, *scores: Tensor) -> None:
    """Raise UserError where a score is NaN or infinite: it would still be ranked and counted.

    Args:
        what: how the message calls one of them, as in "a retrieval score".
        scores: of any shapes.
    """
    if not all(bool(torch.isfinite(values).all()) for values in scores):
        raise UserError(
            f"{what} is NaN or infinite, so no result can be told from it: the weights are broken "
            "or the images are; try another checkpoint"
        )
