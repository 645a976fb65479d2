"""Foils for a file of captions: each caption with one word changed (``softmask foils``).

A word changes as in ``word_changes``, between neighbours of the whole file, and by two more rules.
For words u, v, let x_u count what stands before u, after u and around it in the file. v may replace

    only its like           cos(PPMI(x_u), PPMI(x_v)) >= ALIKE
    no other name for it    n(u, v) <= RIVALS * E[n(u, v)]

where n counts the pairs of captions of one image in which one says u alone, the other v alone, and
E would be n if captions were paired at random. What one calls a man, another calls a person, so
these pairs abound; what is red to one is blue to few.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, diags

from softmask_plugin.datasets.tables.captions import parse_captions
from softmask_plugin.errors import UserError
from softmask_plugin.files.whole import require_other, write_json
from softmask_plugin.tokenization import is_content
from softmask_plugin.word_changes import Words, draw_changes

LEAST = 5  # occurrences of a word; of rarer ones, too little is known
ALIKE = 0.13  # chosen, as is RIVALS, on photo captions by reading foils
RIVALS = 0.5
IMAGES = 50  # done at once, to bound memory

WORD = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]")


def write_foils(captions: str | Path, output: str | Path, seed: int = 42) -> tuple[int, int]:
    """Write a JSON list of ``{"image", "caption", "foil", "group": "word"}``.

    Args:
        captions: A caption file for ``parse_captions``. With several captions of an image, fewer
            foils are still true.
        output: The file to write.
        seed: Random seed of the changes.

    Returns:
        The number of foils, and of captions in which nothing could be changed.

    Raises:
        UserError: The caption file is unusable, or nothing in it can be changed.
    """
    require_other(Path(output).expanduser(), captions)
    items = parse_captions(captions)
    foils = make_foils(items, seed)
    if not foils:
        raise UserError(
            f"no caption of {captions} can be changed: foils need many captions, in which words "
            f"occur {LEAST} times and more"
        )
    write_json(Path(output).expanduser(), foils)
    return len(foils), sum(len(item["caption"]) for item in items) - len(foils)


def make_foils(items: list[dict[str, Any]], seed: int = 42) -> list[dict[str, str]]:
    """Make the rows of ``write_foils`` from what ``parse_captions`` returns."""
    images = [item["image"] for item in items for _ in item["caption"]]
    captions = [caption for item in items for caption in item["caption"]]
    found = [list(WORD.finditer(caption)) for caption in captions]
    spans = [(row, match.span()) for row, matches in enumerate(found) for match in matches]
    spelled = [match[0].lower() for matches in found for match in matches]
    counts = Counter(spelled)
    content = [word for word, times in counts.items() if times >= LEAST and is_content(word)]
    types = {word: number for number, word in enumerate(dict.fromkeys([*content, *counts]))}
    caption = torch.tensor([row for row, _ in spans])
    image = torch.tensor([row for row, item in enumerate(items) for _ in item["caption"]])[caption]
    sizes = [len(item["caption"]) for item in items]
    length = torch.ones(len(content), dtype=torch.long)
    words = Words(caption, image, torch.tensor([types[word] for word in spelled]), length)

    alike = torch.from_numpy(_alike(words) & ~_rivals(words, sizes))
    generator, foils = torch.Generator().manual_seed(seed), []
    for first in range(0, len(items), IMAGES):
        start, end = torch.searchsorted(image, torch.tensor([first, first + IMAGES])).tolist()
        some = Words(caption[start:end], image[start:end] - first, words.type[start:end], length)
        free = torch.ones(end - start, dtype=torch.bool)
        for place, new in zip(*draw_changes(some, free, generator, words, alike), strict=True):
            row, (left, right) = spans[start + int(place)]
            text, word = captions[row], content[int(new)]
            word = word.capitalize() if text[left].isupper() else word
            foil = text[:left] + word + text[right:]
            foils.append({"image": images[row], "caption": text, "foil": foil, "group": "word"})
    return foils


def _alike(words: Words) -> np.ndarray:
    """Which content words have like neighbours, bool (K, K)."""
    before, after = (frame.numpy() + 1 for frame in words.frames())
    word, count = words.type.numpy(), len(words.length)
    width = int(word.max()) + 2
    pairs = np.unique(before * width + after, return_inverse=True)[1]
    seen = np.concatenate([before, width + after, 2 * width + pairs])
    one = np.tile(word, 3)
    shape = count, int(seen.max()) + 1
    table = csr_matrix((np.ones((one < count).sum()), (one[one < count], seen[one < count])), shape)
    of_word, of_place = (np.asarray(table.sum(axis)).ravel() for axis in (1, 0))
    cells = table.tocoo()
    chance = of_word[cells.row] * of_place[cells.col] / table.sum()
    ppmi = csr_matrix((np.log(cells.data / chance).clip(0), (cells.row, cells.col)), table.shape)
    norm = np.sqrt(np.asarray(ppmi.multiply(ppmi).sum(axis=1)).ravel())
    unit = diags(1 / norm.clip(1e-9)) @ ppmi
    return (unit @ unit.T).toarray() >= ALIKE


def _rivals(words: Words, sizes: Sequence[int]) -> np.ndarray:
    """Which content words name one thing in captions of an image, bool (K, K); ``sizes`` are the
    numbers of captions of the images."""
    count, named = len(words.length), (words.type < len(words.length)).numpy()
    where = words.caption.numpy()[named], words.type.numpy()[named]
    says = csr_matrix((np.ones(len(where[0])), where), (sum(sizes), count)).astype(bool)
    found, start = np.zeros((count, count), dtype=np.float32), 0
    for size in sizes:
        some = says[start : start + size]
        start += size
        said = np.unique(some.indices)
        each = some[:, said].toarray().astype(np.float32)
        both = each.T @ each
        alone = both.diagonal()[:, None] - both
        found[np.ix_(said, said)] += alone * alone.T
    share = np.asarray(says.mean(axis=0)).ravel()
    pairs = sum(size * (size - 1) for size in sizes)
    return found > RIVALS * pairs * np.outer(share, share)
