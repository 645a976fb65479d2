"""Random choices of a training step, each from a stream of its own."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


class Draws:
    """Random streams of one step, one per purpose.

    A stream depends on (seed, step, purpose) alone. So switching one innovation off does not change
    the draws of another, and a resumed run repeats the draws of an uninterrupted one with no
    generator state to save.
    """

    def __init__(self, seed: int, step: int) -> None:
        self.seed, self.step = seed, step

    def stream(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator on ``device`` for ``purpose``."""
        text = f"{self.seed}/{self.step}/{purpose}".encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def mask_tokens(
    ids: Tensor,
    maskable: Tensor,
    mask_id: int,
    vocab_size: int,
    probability: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """BERT's masking: of the chosen tokens 80% become [MASK], 10% a random token, 10% stay.

    Args:
        ids: token ids, (N, T), on the CPU.
        maskable: True where a token may be chosen, (N, T).
        mask_id: id of [MASK].
        vocab_size: random tokens are drawn from [0, vocab_size).
        probability: chance of a maskable token to be chosen, in [0, 1].
        generator: random stream.

    Returns:
        The masked ids and, as bool (N, T), the chosen positions: those to be predicted.
    """

    def coin(p: float) -> Tensor:
        return torch.bernoulli(torch.full(ids.shape, p), generator=generator).bool()

    chosen = coin(probability) & maskable
    replaced = coin(0.8) & chosen
    randomised = coin(0.5) & chosen & ~replaced
    words = torch.randint(vocab_size, ids.shape, generator=generator)
    return torch.where(randomised, words, ids.masked_fill(replaced, mask_id)), chosen


def sample_negatives(
    similarity: Tensor, positives: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Draw one hard negative for each row, in proportion to the softmax of its similarities.

    Args:
        similarity: logits, (B, B).
        positives: True for the pairs that are no negatives, (B, B).
        generator: random stream on the device of ``similarity``.

    Returns:
        Column of the negative for each row, (B,); any column where a row has none.
    """
    barred = positives & ~positives.all(dim=1, keepdim=True)
    weights = similarity.float().masked_fill(barred, float("-inf")).softmax(dim=1)
    # multinomial ends the program at a NaN, on CUDA for good; with one, the loss is NaN anyway.
    weights = weights.nan_to_num(nan=1.0)
    return torch.multinomial(weights, 1, generator=generator).squeeze(1)
