"""Captions with one word changed: negatives for ITM that differ from the truth in one thing alone.

After info-ground (Gupta et al., arXiv 2006.09920, 3.3), where a language model proposes the word.
Here it comes from the captions themselves: v may replace w between the neighbours l and r

    if v occurs between l and r                   the same frame, or, if no word of the caption has
    if v occurs after l, and v before r           such a v, both halves of the frame

and is drawn in proportion to how often it does, so that words alone do not give a change away.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from softmask_plugin.nn.sampling import draw_one


class Words(NamedTuple):
    """The N words of some captions in order. Equal words are of one type, a number from 0.

    The types of content words, the only ones that come and go, are those below K.
    """

    caption: Tensor  # caption of each word, (N,), int64, ascending
    image: Tensor  # image of each word, (N,): no word that its captions have comes into them
    type: Tensor  # type of each word, (N,), int64
    length: Tensor  # length of each content word, (K,): a word gives way to one of the same length

    def frames(self) -> tuple[Tensor, Tensor]:
        """Types of the words before and after each word, (N,) each; -1 at a caption's ends."""
        follows = self.caption[1:] == self.caption[:-1]
        before = torch.where(follows, self.type[:-1], -1)
        after = torch.where(follows, self.type[1:], -1)
        return pad(before, (1, 0), value=-1), pad(after, (0, 1), value=-1)


def change_words(
    ids: Tensor,
    word_ids: Tensor,
    content: Tensor,
    fixed: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Change one word of each caption into another of the batch, if one fits.

    A word of several tokens changes as a whole, into one of as many tokens, so lengths stay.

    Args:
        ids: Token ids of B captions, (B, T), int64, on the CPU.
        word_ids: Word that each token belongs to, (B, T), int64, in order; -1 for special tokens.
        content: True for the ids that begin a content word, (vocabulary,).
        fixed: True for tokens whose word must stay, (B, T).
        generator: Random stream on the CPU.

    Returns:
        The ids with the changes, (B, T).
    """
    is_word = word_ids >= 0
    starts = is_word & (word_ids != pad(word_ids, (1, -1), value=-1))
    caption, column = starts.nonzero(as_tuple=True)
    if len(caption) == 0:
        return ids
    word = (starts.flatten().cumsum(0) - 1)[is_word.flatten()]  # of each token, in the batch
    piece = is_word.nonzero(as_tuple=True)[1] - column[word]
    pieces = ids.new_full((len(caption), int(piece.max()) + 1), -1)
    pieces[word, piece] = ids[is_word]
    kind = (~content[pieces[:, 0]]).long()  # content words first
    for nth in pieces.T:  # unique(dim=0) takes ten times as long
        kind = (kind * (len(content) + 1) + nth + 1).unique(return_inverse=True)[1]
    kinds = pieces.new_empty(int(kind.max()) + 1, pieces.shape[1])
    kinds[kind] = pieces
    length = (kinds[content[kinds[:, 0]]] >= 0).sum(dim=1)
    free = torch.ones(len(caption), dtype=torch.bool)
    free[word[fixed[is_word]]] = False
    place, new = draw_changes(Words(caption, caption, kind, length), free, generator)
    kind[place] = new
    changed = ids.clone()
    changed[is_word] = kinds[kind][word, piece]
    return changed


def draw_changes(
    words: Words,
    free: Tensor,
    generator: torch.Generator | None = None,
    known: Words | None = None,
    alike: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one word of each caption, and the type to change it into.

    Args:
        words: The words of some captions, on the CPU.
        free: True for words that may change, (N,).
        generator: Random stream on the CPU.
        known: Words in whose captions frames are sought, with the same types; None: ``words``.
        alike: Which types may give way to which, bool (K, K); None: each to each.

    Returns:
        Indices of words, at most one of a caption, and their new types.
    """
    known, count = known or words, len(words.length)
    place = (free & (words.type < count)).nonzero().squeeze(1)
    caption, old = words.caption[place], words.type[place]
    if len(place) == 0:
        return place, place
    own, (before, after) = words.frames(), known.frames()
    content, width = known.type < count, int(known.type.max()) + 2

    def occurrences(frames: Tensor, known_frames: Tensor) -> Tensor:
        """How often each type occurs in the frame of each place, (places, K)."""
        sought, index = frames[place].unique(return_inverse=True)
        row = torch.searchsorted(sought, known_frames).clamp_max(len(sought) - 1)
        cells = (row * count + known.type)[content & (sought[row] == known_frames)]
        return cells.bincount(minlength=len(sought) * count).float().view(-1, count)[index]

    exact = occurrences(own[0] * width + own[1], before * width + after)
    halves = occurrences(own[0], before) * occurrences(own[1], after)
    present = torch.zeros(int(words.image.max()) + 1, count, dtype=torch.bool)
    named = words.type < count
    present[words.image[named], words.type[named]] = True
    fits = (words.length == words.length[old][:, None]) & ~present[words.image[place]]
    if alike is not None:
        fits = fits & alike[old]
    exact, halves = exact.mul_(fits), halves.mul_(fits)

    # A caption's place: any of those with the same frame elsewhere; else of those with both halves
    rank = exact.any(dim=1).double() + halves.any(dim=1)
    score = torch.rand(len(place), dtype=torch.float64, generator=generator) + rank
    best = score.new_zeros(int(caption.max()) + 1).scatter_reduce(0, caption, score, "amax")
    chosen = ((rank > 0) & (score == best[caption])).nonzero().squeeze(1)
    weights = torch.where((rank == 2)[chosen, None], exact[chosen], halves[chosen])
    return place[chosen], draw_one(weights, generator)
