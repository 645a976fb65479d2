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


class Words(NamedTuple):
    """The N words of some captions in order. Equal words are of one type, a number below V."""

    caption: Tensor  # caption of each word, (N,), int64, ascending
    type: Tensor  # type of each word, (N,), int64
    content: Tensor  # True for types that name something: only these come and go, (V,)
    length: Tensor  # a word is replaced by one of the same length, (V,)

    def frames(self) -> tuple[Tensor, Tensor]:
        """Types of the words before and after each word, (N,) each; V at a caption's ends."""
        end = len(self.content)
        follows = self.caption[1:] == self.caption[:-1]
        before = torch.where(follows, self.type[:-1], end)
        after = torch.where(follows, self.type[1:], end)
        return pad(before, (1, 0), value=end), pad(after, (0, 1), value=end)


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
        content: True for the ids that may begin a word that comes or goes, (vocabulary,).
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
    kind = torch.zeros_like(caption)
    for nth in pieces.T:  # unique(dim=0) takes ten times as long
        kind = (kind * (len(content) + 1) + nth + 1).unique(return_inverse=True)[1]
    kinds = pieces.new_empty(int(kind.max()) + 1, pieces.shape[1])
    kinds[kind] = pieces
    words = Words(caption, kind, content[kinds[:, 0]], (kinds >= 0).sum(1))
    stays = torch.zeros(len(caption), dtype=torch.bool)
    stays[word[fixed[is_word]]] = True
    place, new = draw_changes(words, ~stays, generator)
    kind[place] = new
    changed = ids.clone()
    changed[is_word] = kinds[kind][word, piece]
    return changed


def draw_changes(
    words: Words, free: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one word of each caption, and the type to change it into.

    Args:
        words: The words of B captions, on the CPU.
        free: True for words that may change, (N,).
        generator: Random stream on the CPU.

    Returns:
        Indices of words, at most one of a caption, and their new types.
    """
    before, after = words.frames()
    place = (free & words.content[words.type]).nonzero().squeeze(1)
    caption, old = words.caption[place], words.type[place]
    count = len(words.content)

    def occurrences(frame: Tensor) -> Tensor:
        """How often each type occurs in the frame of each place, (places, V)."""
        frames, index = frame.unique(return_inverse=True)
        counts = torch.zeros(len(frames), count)
        counts.index_put_((index, words.type), torch.ones(len(index)), accumulate=True)
        return counts[index[place]]

    exact = occurrences(before * (count + 1) + after)
    halves = occurrences(before) * occurrences(after)
    present = torch.zeros(int(words.caption.max()) + 1, count, dtype=torch.bool)
    present[words.caption, words.type] = True
    fits = words.content & (words.length == words.length[old][:, None]) & ~present[caption]
    exact, halves = exact * fits, halves * fits

    # A caption's place: any of those with the same frame elsewhere; else of those with both halves
    rank = (exact > 0).any(1).double() + (halves > 0).any(1)
    score = torch.rand(len(place), dtype=torch.float64, generator=generator) + rank
    best = torch.zeros(len(present), dtype=torch.float64).scatter_reduce(0, caption, score, "amax")
    chosen = ((rank > 0) & (score == best[caption])).nonzero().squeeze(1)
    exact, halves = exact[chosen], halves[chosen]
    weights = torch.where((exact > 0).any(1, keepdim=True), exact, halves)
    if len(chosen) == 0:  # multinomial refuses an empty matrix
        return chosen, chosen
    return place[chosen], torch.multinomial(weights, 1, generator=generator).squeeze(1)
