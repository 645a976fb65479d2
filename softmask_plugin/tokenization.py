"""Captions to token ids, and what training needs to know about each token."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import BertTokenizerFast

from softmask_plugin.errors import UserError
from softmask_plugin.nn.tokens import Packing
from softmask_plugin.word_changes import change_words

# Words that name nothing in an image; `soft_mask.words: content` never picks them.
FUNCTION_WORDS = frozenset(
    """a about above across after against along am among an and another any are around as at away
    be because been before behind being below beneath beside besides between beyond both but by can
    could did do does doing down during each either every few for from further had has have having
    he her here hers him his how i if in inside into is it its itself just many may me might mine
    more most much must my near neither next no nor not of off on onto or other our ours out outside
    over own past same she should so some such than that the their theirs them then there these they
    this those through to together too toward towards under until up upon us very was we were what
    when where which while who whom whose why will with within without would you your
    yours""".split()
)


@dataclass(frozen=True)
class Captions:
    """A batch of tokenized captions, padded to the longest."""

    ids: Tensor  # (B, T), int64
    packing: Packing  # the cells of (B, T) that are not padding
    words: Tensor  # index of each token's word in its caption, (B, T); -1 for special tokens

    @property
    def mask(self) -> Tensor:
        """True where a token is not padding, (B, T)."""
        return self.packing.mask

    def to(self, device: torch.device) -> Captions:
        """Copy from the host to a device, without waiting for it."""
        ids, words = (t.to(device, non_blocking=True) for t in (self.ids, self.words))
        return Captions(ids, self.packing.to(device), words)


def as_list(captions: Sequence[str]) -> Sequence[str]:
    """A plain string is one caption, as in LAVIS's examples."""
    return [captions] if isinstance(captions, str) else captions


def is_content(word: str) -> bool:
    """Whether a word, in lower case, may name something: it is no function word, numeral,
    punctuation mark or letter of a contraction."""
    return word.isalpha() and len(word) > 1 and word not in FUNCTION_WORDS


class CaptionTokenizer:
    """Tokenizes captions, and tells kinds of tokens apart by table look-up."""

    def __init__(
        self, tokenizer: BertTokenizerFast, max_length: int, sep_token: bool = True
    ) -> None:
        self.tokenizer, self.max_length, self.sep_token = tokenizer, max_length, sep_token
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self.is_special = torch.zeros(len(tokens), dtype=torch.bool)
        self.is_special[torch.tensor(tokenizer.all_special_ids)] = True
        self.is_special[tokenizer.unk_token_id] = False  # an unknown word is a word
        self.is_piece = torch.tensor([token.startswith("##") for token in tokens])
        self.is_function_word = torch.tensor([token in FUNCTION_WORDS for token in tokens])
        self.is_content = torch.tensor([is_content(token) for token in tokens])
        self.special_text = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))

    def tokenize(self, captions: Sequence[str]) -> Captions:
        """Tokenize on the CPU, truncating to ``max_length`` tokens, [CLS] and [SEP] included.

        Without ``sep_token``, a caption is [CLS] and its own tokens. UserError if one is no text,
        or if there is none.
        """
        if not len(captions := as_list(captions)):
            raise UserError("there is no caption: give at least one")
        batch = self.tokenizer(
            [self._escape(caption) for caption in captions],
            padding="longest",
            truncation=True,
            max_length=self._length_with_sep,
            return_token_type_ids=False,
        )
        # Not by return_tensors, which makes a ValueError of Ctrl-C
        ids = torch.tensor(batch["input_ids"], dtype=torch.long)
        mask = torch.tensor(batch["attention_mask"], dtype=torch.bool)
        if not self.sep_token:
            mask = mask[:, 1:]
            ids = ids[:, :-1].masked_fill(~mask, self.tokenizer.pad_token_id)
        return Captions(ids, Packing.of(mask), self.word_ids(ids))

    def truncate(self, caption: str) -> str:
        """Cut a caption where ``tokenize`` does; what is left keeps its spelling."""
        batch = self.tokenizer(
            escaped := self._escape(caption),
            truncation=True,
            max_length=self._length_with_sep,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        first, *more = batch["offset_mapping"]
        return escaped[: first[-2][1]] if more else caption  # the last token is [SEP]

    @property
    def _length_with_sep(self) -> int:  # a checkpoint may switch sep_token
        return self.max_length + (not self.sep_token)

    def _escape(self, caption: str) -> str:
        """Break up special tokens in a caption's text: "[MASK]" becomes "[ MASK]".

        The tokenizer splits a bracket from a word anyway, so the space changes nothing else.
        """
        if not isinstance(caption, str):
            raise UserError(f"a caption must be text, not {caption!r:.80}")
        return self.special_text.sub(lambda found: f"{found[0][0]} {found[0][1:]}", caption)

    def word_ids(self, ids: Tensor) -> Tensor:
        """Index of the word that each token of (B, T) belongs to; -1 for special tokens."""
        special = self.is_special[ids]
        starts = ~special & ~self.is_piece[ids]
        return (starts.cumsum(dim=1) - 1).masked_fill(special, -1)

    def split_words(self, caption: str) -> list[range]:
        """Numbers that the words of ``word_ids`` have in each word between spaces; "a$" has two."""
        words = caption.split()
        counts = self.tokenize(words).words.amax(dim=1) + 1 if words else torch.zeros(0)
        ends = [0, *counts.cumsum(dim=0).tolist()]
        return [range(start, end) for start, end in itertools.pairwise(ends)]

    def maskable(self, captions: Captions) -> Tensor:
        """Where MLM may mask: everywhere but padding and [CLS], as in ALBEF."""
        return captions.mask & (captions.ids != self.tokenizer.cls_token_id)

    def change_words(
        self, captions: Captions, ids: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Change one content word of each caption into another of the batch, if one fits.

        ``ids`` (B, T) are those that the model sees, on the CPU. Words that MLM replaced in them
        stay as they are.
        """
        clean = captions.ids
        changed = change_words(clean, captions.words, self.is_content, ids != clean, generator)
        return torch.where(changed != clean, changed, ids)

    def pickable(self, captions: Captions, ids: Tensor, content_only: bool) -> Tensor:
        """Word index of each token, (B, T); -1 where the soft mask may not pick.

        ``ids`` are those that the model sees: a [MASK] of MLM names nothing, so it is never picked.
        ``content_only`` excludes function words.
        """
        barred = self.is_special[ids]
        if content_only:
            goes_on = self.is_piece[captions.ids].roll(-1, dims=1)  # "with", "##ered" is no "with"
            barred = barred | (self.is_function_word[ids] & ~goes_on)
        return captions.words.masked_fill(barred, -1)
