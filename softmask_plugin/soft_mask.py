"""Text-driven soft mask (innovation 1 of SoftMask++, arXiv 2304.00719, 3.2), as pure functions.

    G[k,i] = mean_h relu(ds+ / dA[h,k,i]) * A[h,k,i]        word_cam      (k: token, i: patch)
    G^     = (G[w] - min) / (max - min)                      normalize     (w: the picked word)
    v'_i   = (1 - G^_i) * v_i                                keep_factors  (1 - G^)

A are the probabilities of one cross-attention layer, and s+ is the positive matching logit. That is
the paper's map. The word's own map (``soft_mask.score: word``, ours) asks where the model sees a
word that the caption hides:

    G[w,i] = relu(d log p(w | caption without w, m * v) / dm_i) at m = 1        mask_effect

so to first order it is what the mask takes from the word's log-probability, in all layers together.
Where training contrasts words with patches, their similarity is a map too (``similarity``, ours),
without a pass through the fusion layers; t and v are unit vectors from ITC's projections:

    G[k,i] = softmax_i(t_k v_i / temp)                       similarity_map

Shapes: B pairs, H heads, T tokens, P patches; S = 1 + P image tokens, the first of which is [CLS].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from softmask_plugin.nn.sampling import draw_one

Kind = Literal["soft", "hard", "random", "uniform"]
WordChoice = Literal["uniform", "content", "energy"]


def grad_cam(score: Tensor, attention: Tensor, first_patch: int = 1) -> Tensor:
    """Word-conditional Grad-CAM of a matching score.

    Args:
        score: s+, (B,); each entry depends only on its own row of ``attention``.
        attention: A, probabilities after softmax and before dropout, (B, H, T, keys), in the graph.
        first_patch: Key of the first patch: 1 behind [CLS], 0 without it.

    Returns:
        G, (B, T, P), >= 0, float32, detached.
    """
    return word_cam(attention.detach(), gradient_of(score, attention), first_patch)


def gradient_of(score: Tensor, inner: Tensor) -> Tensor:
    """Gradient of scores for a tensor in their graph, in its shape, float32.

    The backward pass runs from the score only to that tensor: no parameter gets a gradient, and the
    graph remains for the loss's own backward pass.
    """
    scale = 2.0**10  # in half precision, the gradient for one attention probability underflows
    (scaled,) = torch.autograd.grad(score.float().sum() * scale, inner, retain_graph=True)
    return scaled.float() / scale


def word_cam(attention: Tensor, gradient: Tensor, first_patch: int = 1) -> Tensor:
    """``mean_h relu(gradient) * attention`` over patch keys: (B, H, T, keys) twice -> (B, T, P)."""
    patches = slice(first_patch, None)  # the image's [CLS] is no place
    return (gradient[..., patches].relu() * attention[..., patches].float()).mean(dim=1)


def mask_effect(score: Tensor, keep: Tensor) -> Tensor:
    """How much each patch's mask would lower a score, to first order.

    Args:
        score: Scores of any number; each depends only on its own row of ``keep``.
        keep: The factors m that the score was computed with, (B, S), in the graph.

    Returns:
        G, (B, P), >= 0, float32, detached.
    """
    return gradient_of(score, keep)[:, 1:].relu()


def word_score(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of each masked word: logits (M, vocabulary), ids (M,) -> (M,), float32."""
    return -torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def similarity_map(words: Tensor, patches: Tensor, temp: Tensor | float) -> Tensor:
    """How much more like a token each patch is than the others of its image.

    Args:
        words, patches: Unit vectors, (B, T, d) and (B, P, d).
        temp: Temperature.

    Returns:
        G, (B, T, P), in [0, 1], float32.
    """
    return (words.float() @ patches.float().transpose(1, 2) / temp).softmax(dim=-1)


def pick_words(
    cam: Tensor | None,
    word_ids: Tensor,
    choice: WordChoice,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Pick one word of each caption at random.

    Args:
        cam: G, (B, T, P); only ``energy`` needs it.
        word_ids: Word that each token belongs to, (B, T), int64 in [0, T), in order; -1 for tokens
            that may not be picked (padding, special tokens and, with ``content``, function words).
        choice: With ``uniform`` and ``content`` all words are equally likely; with ``energy`` their
            probability is proportional to the sum of their map.
        generator: Random stream on the device of ``word_ids``.

    Returns:
        Id of the picked word, (B,); -1 for a caption without a word to pick.
    """
    eligible = word_ids >= 0
    # Only the first token of a word counts, so that long words are not favoured.
    seen = word_ids.cummax(dim=1).values  # a masked piece may split a word's tokens
    previous = torch.nn.functional.pad(seen, (1, 0), value=-1)[:, :-1]
    weights = (word_ids > previous).float()
    if choice == "energy" and cam is not None:
        energy = torch.zeros_like(weights)
        energy = energy.scatter_add(1, word_ids.clamp_min(0), cam.sum(-1) * eligible)
        # The floor is far below any real map: it matters only if every map is zero.
        weights = weights * energy.gather(1, word_ids.clamp_min(0)).clamp_min(1e-20)
    found = eligible.any(dim=1)
    token = draw_one(weights, generator)[:, None]
    return torch.where(found, word_ids.gather(1, token).squeeze(1), -1)


def word_map(cam: Tensor, word_ids: Tensor, word: Tensor) -> Tensor:
    """Mean map of one word's tokens: (B, T, P), (B, T), (B,) -> (B, P); zeros for word -1."""
    tokens = (word_ids == word[:, None]) & (word[:, None] >= 0)
    count = tokens.sum(1, keepdim=True).clamp_min(1)
    # Not einsum, which autocast runs in half precision, where small maps underflow
    return (cam * tokens[:, :, None]).sum(dim=1) / count


def normalize(maps: Tensor) -> Tensor:
    """Scale each map (..., P) to span [0, 1]; a constant map (0/0) becomes zeros."""
    low, high = maps.aminmax(dim=-1, keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (maps - low) / spread.clamp_min(1e-38), torch.zeros_like(maps))


def keep_factors(
    maps: Tensor,
    kind: Kind = "soft",
    strength: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Compute the factor for each image token from normalised maps.

    Args:
        maps: G^, (B, P), in [0, 1].
        kind: ``soft`` is the paper's mask. For ablations, ``hard`` removes the patches with
            G^ > 0.5, ``random`` moves the mask's values to random patches, and ``uniform`` spreads
            their sum evenly over all patches.
        strength: Factor for G^, in [0, 1].
        generator: Random stream on the device of ``maps``, for ``random``.

    Returns:
        Factors (B, S) in [0, 1]; [CLS] keeps 1.
    """
    if kind == "hard":
        maps = (maps > 0.5).to(maps.dtype)
    elif kind == "random":
        order = torch.rand(maps.shape, generator=generator, device=maps.device).argsort(dim=-1)
        maps = maps.gather(-1, order)
    elif kind == "uniform":
        maps = maps.mean(dim=-1, keepdim=True).expand_as(maps)
    elif kind != "soft":
        raise ValueError(f"unknown kind of mask '{kind}': choose soft, hard, random or uniform")
    return torch.nn.functional.pad(1 - strength * maps, (1, 0), value=1.0)
