"""Captions to tokens: where vocabularies come from, and what training needs to know of a token."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from transformers import BertTokenizerFast

from softmask_plugin.config.paths import PACKAGE
from softmask_plugin.datasets.tables.captions import read_captions
from softmask_plugin.datasets.tables.questions import read_questions
from softmask_plugin.datasets.tables.rows import SUFFIXES, one_text, read_table
from softmask_plugin.errors import UserError, reason_of

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SCENES_VOCABULARY = PACKAGE / "assets" / "scenes_vocab.txt"

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


def build_tokenizer(source: str | None, vocab_size: int = 8192) -> BertTokenizerFast:
    """Build a lower-casing WordPiece tokenizer.

    Args:
        source: ``scenes`` (the vocabulary of the rendered scenes, shipped); a ``vocab.txt``; a
            file of captions, questions or statements, from whose texts (in Karpathy's layout: those
            of the train split) a vocabulary is made, the same at every call; or the name of a BERT
            on the Hugging Face hub, or its local folder.
        vocab_size: largest size of a vocabulary made from captions.

    Raises:
        UserError: no source; no such file, and no such name in the hub's cache or on the hub; or
            a file that cannot be used.
    """
    if source is None:
        raise UserError(
            "model.tokenizer is null: name the vocabulary of the weights (vocab.txt in the folder "
            "of their run), or the train split's file to make one from"
        )
    path = SCENES_VOCABULARY if source == "scenes" else Path(source)
    is_list = path.suffix == ".txt"
    if (is_list or path.suffix in SUFFIXES) and not path.is_file():
        raise UserError(f"no tokenizer '{source}' (model.tokenizer): there is no such file")
    if path.suffix in SUFFIXES:
        return _vocabulary_of(path, vocab_size)
    try:
        if is_list:
            tokenizer = BertTokenizerFast(vocab_file=str(path), do_lower_case=True)
        else:
            tokenizer = BertTokenizerFast.from_pretrained(source)
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        if not all(isinstance(token, str) for token in tokens):
            raise TypeError("a token is listed twice")
        tokenizer("\u2603")  # an unknown word needs [UNK]
    except Exception as error:  # of a damaged file it may be of any kind
        if not is_list and isinstance(error, (OSError, ValueError)):
            raise UserError(
                f"no tokenizer '{source}' (model.tokenizer): it is no vocab.txt, caption file or "
                "local folder, and the Hugging Face hub or its cache does not have it"
            ) from error
        raise UserError(
            f"{source} is no usable vocabulary (model.tokenizer): it must list every token once, "
            f"{', '.join(SPECIAL_TOKENS)} among them ({reason_of(error)})"
        ) from error
    return tokenizer


def _vocabulary_of(file: Path, vocab_size: int) -> BertTokenizerFast:
    captions = _texts_of(file)
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    # The trainer numbers "##x" in the order of a hash table, and breaks ties by number: given these
    # in order beforehand, it makes the same vocabulary on every rank and in every later run.
    normalize, cut = tokenizer.normalizer.normalize_str, tokenizer.pre_tokenizer.pre_tokenize_str
    words = {word for caption in captions for word, _ in cut(normalize(caption))}
    inner = sorted({letter for word in words for letter in word[1:]})
    tokenizer.train_from_iterator(
        captions,
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS, *(f"##{letter}" for letter in inner)],
        show_progress=False,
    )
    with TemporaryDirectory() as folder:
        (vocabulary,) = tokenizer.save_model(folder)
        return BertTokenizerFast(vocab_file=vocabulary, do_lower_case=True)


def _texts_of(file: Path) -> list[str]:
    """The captions of a file, or its questions and answers, or its statements."""
    errors = []
    for read in (_captions, _questions, _sentences):
        try:
            return read(file)
        except UserError as error:
            errors.append(error)
    raise errors[0]


def _captions(file: Path) -> list[str]:
    return [caption for item in read_captions(file, "train") for caption in item.captions]


def _questions(file: Path) -> list[str]:
    return [text for item in read_questions(file) for text in (item["question"], *item["answer"])]


def _sentences(file: Path) -> list[str]:
    return read_table(file, ["sentence"], lambda row, _: one_text(row["sentence"], "sentence"))


@dataclass(frozen=True)
class Captions:
    """A batch of captions, padded to the longest.

    Attributes:
        ids: token ids, (B, T), int64.
        mask: True where a token is no padding, (B, T).
        words: index of the word that a token belongs to, (B, T), counted over the caption; -1 for
            padding and special tokens.
    """

    ids: Tensor
    mask: Tensor
    words: Tensor


class CaptionReader:
    """Tokenizes captions and tells words from pieces of words, by table look-up."""

    def __init__(self, tokenizer: BertTokenizerFast, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self.is_special = torch.zeros(len(tokens), dtype=torch.bool)
        self.is_special[torch.tensor(tokenizer.all_special_ids)] = True
        self.is_special[tokenizer.unk_token_id] = False  # an unknown word is a word
        self.is_piece = torch.tensor([token.startswith("##") for token in tokens])
        self.is_function_word = torch.tensor([token in FUNCTION_WORDS for token in tokens])
        self.special_text = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))

    def read(self, captions: list[str]) -> Captions:
        """Tokenize on the CPU, truncating to ``max_length`` tokens, [CLS] and [SEP] included.

        Raises:
            UserError: a caption is no text.
        """
        batch = self.tokenizer(
            [self._plain(caption) for caption in captions],
            padding="longest",
            truncation=True,
            max_length=self.max_length,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        ids = batch["input_ids"]
        return Captions(ids, batch["attention_mask"].bool(), self.word_ids(ids))

    def beginning(self, caption: str) -> str:
        """As much of a caption as ``read`` does not cut off, in the caption's own spelling."""
        batch = self.tokenizer(
            plain := self._plain(caption),
            truncation=True,
            max_length=self.max_length,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        first, *more = batch["offset_mapping"]
        return plain[: first[-2][1]] if more else caption  # the last token is [SEP]

    def _plain(self, caption: str) -> str:
        """A caption that no special token is found in: "[MASK]" in a text is but its characters.

        Between a bracket and a word a blank changes nothing else, the tokenizer parts them anyway.
        """
        if not isinstance(caption, str):
            raise UserError(f"a caption must be text, not {caption!r:.80}")
        return self.special_text.sub(lambda found: f"{found[0][0]} {found[0][1:]}", caption)

    def word_ids(self, ids: Tensor) -> Tensor:
        """Index of the word that each token of (B, T) belongs to; -1 for special tokens."""
        special = self.is_special[ids]
        starts = ~special & ~self.is_piece[ids]
        return (starts.cumsum(dim=1) - 1).masked_fill(special, -1)

    def maskable(self, captions: Captions) -> Tensor:
        """Where MLM may mask: everything but padding and [CLS], as in ALBEF."""
        return captions.mask & (captions.ids != self.tokenizer.cls_token_id)

    def pickable(self, captions: Captions, ids: Tensor, content_only: bool) -> Tensor:
        """Word index per token, -1 where the soft mask may not pick, (B, T).

        Args:
            captions: what was read.
            ids: the ids that the model saw, with [MASK] where MLM put it: such a token names
                nothing, so it is never picked.
            content_only: leave function words out.
        """
        barred = self.is_special[ids]
        if content_only:
            barred = barred | self.is_function_word[ids]
        return captions.words.masked_fill(barred, -1)
