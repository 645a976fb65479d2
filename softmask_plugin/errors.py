"""Errors for people: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import errno
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


MOST = 40  # names that a message lists

# Warnings that any process of a job prints; of all others, the main process alone does
OF_ANY_PROCESS = logging.getLogger("softmask_plugin.any_process")


class UserError(Exception):
    """A mistake that the user can fix. The command line prints its message without a traceback.

    Args:
        message: What is wrong, where, and what to do; made one line by :func:`one_line`.
    """

    def __init__(self, message: str) -> None:
        # A data loader re-raises its worker's error with the worker's traceback as the message.
        if message.startswith("Caught ") and "\nOriginal Traceback" in message:
            message = message.rstrip().rpartition("\n")[2].partition(": ")[2]
        super().__init__(one_line(message))


class StartAgain(SystemExit):
    """A signal ended the run, and the same command with run.resume_ckpt_path=auto goes on with it:
    exit code 75, which sysexits.h calls EX_TEMPFAIL."""

    CODE = 75

    def __init__(self) -> None:
        super().__init__(self.CODE)


def one_line(text: str) -> str:
    r"""Escape what a terminal would obey or not show, so that the text is one line.

    >>> print(one_line("photos/\x1b[2J.jpg"))
    photos/\x1b[2J.jpg
    """
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def reason_of(error: BaseException) -> str:
    r"""An exception's message in one line, or its type if the message is empty.

    >>> print(reason_of(ValueError("line 3:\n  no mapping")), reason_of(KeyError()))
    line 3: no mapping KeyError
    """
    return " ".join(str(error).split()) or type(error).__name__


def advice_on(error: OSError) -> str:
    """What failed about a file, a disk or a network, and what to do, in one line."""
    if error.strerror is None:  # of a library that downloads
        return f"{reason_of(error)} (offline: HF_HUB_OFFLINE=1 uses what is there)"
    what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return f"{what}: {'make room' if full else 'check the path, or name another one'}"


def suggest(name: str, choices: Iterable[str]) -> str:
    """The choices nearest to ``name``, all about as near, worded to end an error message.

    >>> suggest("softmsk_pretrain", ["softmask_pretrain", "albef_vqa"])
    "did you mean 'softmask_pretrain'?"
    >>> suggest("xyz", ["tiny", "base"])
    "choose from 'base', 'tiny'"
    """
    names = sorted({str(choice) for choice in choices})
    for cutoff in (0.9, 0.8, 0.7, 0.6, 0.5):
        if close := difflib.get_close_matches(str(name), names, cutoff=cutoff):
            return did_you_mean(close)
    if not names:
        return "none is available"
    rest = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return "choose from " + ", ".join(f"'{name}'" for name in names[:MOST]) + rest


def require_known(place: str, keys: Iterable[object], known: Iterable[object]) -> None:
    """Raise UserError, with the nearest known keys, at an unknown key of a YAML section."""
    names = [str(key) for key in known]
    for key in map(str, keys):
        if key not in names:
            raise UserError(f"unknown key {place}.{key}: {suggest(key, names)}")


def did_you_mean(names: Iterable[str]) -> str:
    """A question that names the choices, to end an error message."""
    return "did you mean " + " or ".join(f"'{name}'" for name in names) + "?"


def require_finite_scores(what: str, *scores: Tensor) -> None:
    """Raise UserError if a score is NaN or infinite, as it would still be ranked and counted.

    Args:
        what: Name of one score in the message, such as "a retrieval score".
        scores: Tensors of any shape.
    """
    if not all(values.isfinite().all() for values in scores):
        raise UserError(
            f"{what} is NaN or infinite: the weights or the images are broken; try another "
            "checkpoint"
        )
