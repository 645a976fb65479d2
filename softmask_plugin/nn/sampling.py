"""Random draws of a training step, each kind from a stream of its own."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


class Draws:
    """Random streams of one step, one for each purpose.

    A stream depends only on (seed, step, purpose). So switching off one innovation leaves the draws
    of the others unchanged, and a resumed run draws the same without a saved generator state.
    """

    def __init__(self, seed: int, step: int) -> None:
        self.seed, self.step = seed, step

    def stream(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """Make the generator for ``purpose`` on ``device``."""
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
    """Mask tokens as BERT does: of the chosen, 80% become [MASK], 10% a random token, 10% stay.

    Args:
        ids, maskable: Token ids, (N, T), on the CPU, and True where one may be chosen.
        mask_id, vocab_size: [MASK], and the number of ids that random tokens are drawn from.
        probability: Chance of choosing a maskable token, in [0, 1].

    Returns:
        The masked ids, and the chosen tokens, which MLM predicts, as bool (N, T).
    """

    def coin(p: float) -> Tensor:
        return torch.bernoulli(torch.full(ids.shape, p), generator=generator).bool()

    chosen = coin(probability) & maskable
    replaced = coin(0.8) & chosen
    randomised = coin(0.5) & chosen & ~replaced
    words = torch.randint(vocab_size, ids.shape, generator=generator)
    return torch.where(randomised, words, ids.masked_fill(replaced, mask_id)), chosen


def draw_patches(images: int, patches: int, dropout: float, generator: torch.Generator) -> Tensor:
    """Draw the patches to keep of each image, any as likely as any other.

    Args:
        images, patches: Number of images, and of patches of each.
        dropout: Share of the patches to leave out, in [0, 1).
        generator: Random stream; its device is that of the result.

    Returns:
        Indices (images, K), int64, in random order; K is (1 - dropout) * patches, rounded, but at
        least 1.
    """
    kept = max(1, round((1 - dropout) * patches))
    noise = torch.rand(images, patches, generator=generator, device=generator.device)
    return noise.topk(kept, dim=1).indices


def draw_one(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw a column of each row, in proportion to the row's weights.

    As ``torch.multinomial`` draws it, but without that one's checks, for which a GPU must wait.

    Args:
        weights: (N, C), float, at least 0.
        generator: Random stream on their device.

    Returns:
        (N,), int64; an arbitrary column for a row of zeros or with NaN.
    """
    return (weights / torch.empty_like(weights).exponential_(generator=generator)).argmax(dim=1)


def sample_negatives(
    similarity: Tensor, positives: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Draw one hard negative per row, in proportion to the softmax of the row's similarities.

    ``similarity`` holds logits, and ``positives`` is True for matching pairs, (B, B). Returns the
    column of each row's negative, (B,); an arbitrary column if the row has none.
    """
    barred = positives & ~positives.all(dim=1, keepdim=True)
    return draw_one(similarity.float().masked_fill(barred, float("-inf")).softmax(dim=1), generator)
