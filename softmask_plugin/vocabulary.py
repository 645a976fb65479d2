"""Tokenizers: from the shipped vocabulary, a vocab.txt, a BERT, or a file of texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from lavis.common.registry import registry
from omegaconf import DictConfig
from tokenizers import BertWordPieceTokenizer
from transformers import BertTokenizerFast

from softmask_plugin.config.paths import PACKAGE
from softmask_plugin.datasets.skip_log import SkipLog
from softmask_plugin.datasets.tables.captions import parse_captions
from softmask_plugin.datasets.tables.layouts import PLAIN, TableOptions
from softmask_plugin.datasets.tables.questions import parse_questions
from softmask_plugin.datasets.tables.rows import SUFFIXES, one_text, parse_table
from softmask_plugin.errors import UserError, reason_of
from softmask_plugin.files.download import from_hub
from softmask_plugin.files.packages import PACKAGED, packaged_file

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SCENES_VOCABULARY = PACKAGE / "assets" / "scenes_vocab.txt"


def build_tokenizer(source: str | list[str] | None, vocab_size: int = 8192) -> BertTokenizerFast:
    """Build a lower-casing WordPiece tokenizer.

    Args:
        source: The tokens by id; ``scenes`` (the shipped vocabulary of the rendered scenes); a
            ``vocab.txt``; ``package:NAME`` (that of an installed package); a file of captions,
            questions or statements, from which the same vocabulary is made at every call (from the
            train split of a file in Karpathy's layout); or a BERT on the Hugging Face hub or in a
            local folder.
        vocab_size: Largest size of a vocabulary made from texts.

    Raises:
        UserError: No source, no such file or BERT, or an unusable file.
    """
    if source is None:
        raise UserError(
            "model.tokenizer is null, and no checkpoint brings a vocabulary: name a checkpoint "
            "(model.pretrained), a vocab.txt, or the train split's file to make one from"
        )
    if isinstance(source, list):
        with TemporaryDirectory() as folder:
            file = Path(folder, "vocab.txt")
            file.write_text("\n".join(source) + "\n", encoding="utf-8")
            return build_tokenizer(str(file))
    if source.startswith(PACKAGED):
        source = str(packaged_file(source, "vocab.txt"))
    path = SCENES_VOCABULARY if source == "scenes" else Path(source).expanduser()
    table = _table_options(source) or (PLAIN if path.suffix.lower() in SUFFIXES else None)
    is_list = path.suffix == ".txt" and table is None
    if (is_list or table) and not path.is_file():
        raise UserError(f"no tokenizer '{source}' (model.tokenizer): there is no such file")
    if table:
        return _train(_texts_of(path, table), vocab_size)
    try:
        if is_list:
            tokenizer = BertTokenizerFast(vocab_file=str(path), do_lower_case=True)
        else:
            what = f"no tokenizer '{source}' (model.tokenizer)"
            tokenizer = from_hub(what, str(source), BertTokenizerFast.from_pretrained)
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        if not all(isinstance(token, str) for token in tokens):
            raise TypeError("a token is listed twice")
        tokenizer("\u2603")  # an unknown word needs [UNK]
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        if not is_list and isinstance(error, (OSError, ValueError)):
            raise UserError(
                f"no tokenizer '{source}' (model.tokenizer): it is no vocab.txt, caption file or "
                "local folder, and neither the Hugging Face hub nor its cache has it"
            ) from error
        raise UserError(
            f"{source} is no usable vocabulary (model.tokenizer): it must list every token once, "
            f"including {', '.join(SPECIAL_TOKENS)} ({reason_of(error)})"
        ) from error
    return tokenizer


def vocabulary_of(tokenizer: BertTokenizerFast) -> list[str]:
    """List the tokens by id."""
    return tokenizer.convert_ids_to_tokens(range(len(tokenizer)))


def _table_options(file: str) -> TableOptions | None:
    """How the data set of this run that trains on the file parses it; None if there is none."""
    run = registry.get("configuration", no_warning=True)
    for name, section in (run.datasets_cfg if run else {}).items():
        for files in section.values():
            if isinstance(files, DictConfig) and files.get("train") == file:
                return TableOptions.of(f"datasets.{name}", section, "train")
    return None


def _texts_of(file: Path, options: TableOptions) -> list[str]:
    options = replace(options, skipped=SkipLog(muted=True))  # the data set reports them
    texts: list[str] = []
    errors = []
    for texts_of in (_captions, _questions_and_answers, _statements):
        try:  # a file of questions may have captions as well
            texts += texts_of(file, options)
        except UserError as error:
            errors.append(error)
    if not texts:
        raise errors[0]
    return texts


def _captions(file: Path, options: TableOptions) -> list[str]:
    items = parse_captions(file, "train", options=options)
    return [caption for item in items for caption in item["caption"]]


def _questions_and_answers(file: Path, options: TableOptions) -> list[str]:
    items = parse_questions(file, options=options)
    return [text for item in items for text in (item["question"], *item["answer"])]


def _statements(file: Path, options: TableOptions) -> list[str]:
    return parse_table(
        file, ["sentence"], lambda row, _: one_text(row["sentence"], "sentence"), options=options
    )


def _train(texts: list[str], vocab_size: int) -> BertTokenizerFast:
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    # The trainer numbers "##x" in the order of a hash table and breaks ties by number. Given these
    # tokens in order, it makes the same vocabulary on every rank and in every later run.
    normalize, split = tokenizer.normalizer.normalize_str, tokenizer.pre_tokenizer.pre_tokenize_str
    words = {word for text in texts for word, _ in split(normalize(text))}
    inner = sorted({letter for word in words for letter in word[1:]})
    tokenizer.train_from_iterator(
        texts,
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS, *(f"##{letter}" for letter in inner)],
        show_progress=False,
    )
    vocabulary = tokenizer.get_vocab()
    return build_tokenizer(sorted(vocabulary, key=vocabulary.__getitem__))
