"""Focal image-text contrastive loss (innovation 2 of SoftMask++, arXiv 2304.00719, section 3.3),
the contrast of words with patches, and the cross-entropy of models that a momentum model teaches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A mean of cosines over words varies less than one cosine does, so its logits are larger
WORDS_SCALE = 2.0


class FocalITCLoss(nn.Module):
    r"""Contrastive loss that gives easy pairs less weight.

    For one direction, with p the softmax of a row of logits and y its target distribution,

    .. math:: L = -\sum_j y_j (1 - p_j)^\gamma \log p_j

    averaged over the rows, then over image-to-text and text-to-image. ``y`` may be one-hot or
    ALBEF's target, mixed with the momentum model's; ``gamma = 0`` is exactly ALBEF's ITC.

    Args:
        gamma: Focusing parameter, >= 0.

    Raises:
        ValueError: ``gamma`` is negative or not finite.
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        if not 0 <= gamma < float("inf"):
            raise ValueError(f"gamma must be a finite number >= 0, got {gamma}")
        self.gamma = float(gamma)

    def forward(
        self, sim_i2t: Tensor, sim_t2i: Tensor, targets_i2t: Tensor, targets_t2i: Tensor
    ) -> Tensor:
        """Compute the loss, a float32 scalar (float64 for float64 logits).

        Args:
            sim_i2t, sim_t2i: Logits of each image against all texts, and of each text against all
                images, over the temperature, (B, B + queue).
            targets_i2t, targets_t2i: Target distributions of their rows, which sum to 1.

        Raises:
            ValueError: Logits and targets differ in shape.
        """
        i2t = focal_cross_entropy(sim_i2t, targets_i2t, self.gamma)
        t2i = focal_cross_entropy(sim_t2i, targets_t2i, self.gamma)
        return (i2t + t2i) / 2

    def extra_repr(self) -> str:
        """Show gamma when the module is printed."""
        return f"gamma={self.gamma}"


def focal_cross_entropy(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Focal cross-entropy of (N, C) logits to (N, C) target distributions, averaged over rows."""
    if logits.ndim != 2 or logits.shape != targets.shape:
        raise ValueError(
            "logits and targets must be matrices of one shape, "
            f"got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    if logits.dtype in (torch.float16, torch.bfloat16):  # a sum over a queue of 65,536 needs more
        logits = logits.float()
    log_p = F.log_softmax(logits, dim=1)
    if gamma == 0:
        return -(targets * log_p).sum(dim=1).mean()
    # expm1 keeps the digits of 1 - p as p -> 1. For gamma < 1, the gradient of x^gamma is infinite
    # at x = 0, where log p = 0: the floor avoids inf * 0.
    one_minus_p = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).eps)
    return -(targets * one_minus_p.pow(gamma) * log_p).sum(dim=1).mean()


def local_contrast(words: Tensor, patches: Tensor, mask: Tensor, temp: Tensor | float) -> Tensor:
    r"""Contrast the words of each caption with the patches that they single out in its image.

    After SPARC (arXiv 2401.09865, section 3.2). For the unit vectors t of a caption's tokens and v
    of its image's P patches,

    .. math::
        a_{ij} \propto \hat s_{ij} [\hat s_{ij} \ge 1/P], \qquad
        \hat s_{ij} = \frac{t_i v_j - \min_k t_i v_k}{\max_k t_i v_k - \min_k t_i v_k}, \qquad
        c_i = \sum_j a_{ij} v_j

    and ``t_i`` must find its own ``c_i``, as a unit vector, among those of the caption, and the
    reverse. The negatives are the other words of the same caption: those of one image tell where a
    word's thing is, where those of other images only tell whether it is there.

    Args:
        words, patches: Unit vectors, (B, T, d) and (B, P, d).
        mask: True for the tokens that count, (B, T).
        temp: Temperature.

    Returns:
        Cross-entropy, averaged over tokens and both directions; 0 if no token counts.
    """
    similarity = words @ patches.transpose(1, 2)
    low, high = similarity.aminmax(dim=-1, keepdim=True)
    weight = (similarity - low) / (high - low).clamp_min(1e-6)
    weight = torch.where(weight < 1 / patches.shape[1], 0.0, weight)
    # A norm later makes the division by the sum of the weights unnecessary.
    grouped = F.normalize(weight @ patches, dim=-1)
    logits = (words @ grouped.transpose(1, 2) / temp).masked_fill(~mask[:, None, :], -1e4)
    reverse = (grouped @ words.transpose(1, 2) / temp).masked_fill(~mask[:, None, :], -1e4)
    own = torch.stack([each.log_softmax(-1).diagonal(dim1=1, dim2=2) for each in (logits, reverse)])
    return -(own.mean(dim=0) * mask).sum() / mask.sum().clamp_min(1)


def local_contrast_across(
    words: Tensor, patches: Tensor, caption: Tensor, counts: Tensor, temp: Tensor | float
) -> Tensor:
    r"""Contrast captions with the images of a batch, by what each word finds in each image.

    Each caption must find its own image by ``WORDS_SCALE s / temp``, and the reverse, with ``s``
    from ``words_similarity``. It takes words for what tells images apart, so it needs a batch of
    different images. Memory grows with M B P.

    Args:
        words, patches: Unit vectors: the captions' tokens, packed, (M, d), and (B, P, d).
        caption: Index of each token's caption, (M,), int64.
        counts: True for the tokens that count, (M,).
        temp: Temperature.

    Returns:
        Cross-entropy, averaged over captions with a token and both directions; 0 if there is none.
    """
    found = what_words_find(words, patches, temp)
    score, tokens = words_similarity(found, caption, counts, len(patches))
    logits = WORDS_SCALE * score / temp  # (images, captions)
    own = torch.stack([logits.log_softmax(dim).diagonal() for dim in (0, 1)]).mean(dim=0)
    return -(own * (tokens > 0)).sum() / (tokens > 0).sum().clamp_min(1)


def what_words_find(words: Tensor, patches: Tensor, temp: Tensor | float) -> Tensor:
    r"""Cosine of each word with what it finds in each image, (B, M).

    After Gupta et al. 2020 (arXiv 2006.09920, section 3.1), without learned keys and values. For
    the unit vectors t of words and v of the patches of image b,

    .. math::
        a_{ij} = \operatorname{softmax}_j(t_i v_j / \tau), \qquad
        f_{bi} = \cos(t_i, \sum_j a_{ij} v_j)

    Args:
        words, patches, temp: As for ``local_contrast_across``.
    """
    similarity = words @ patches.transpose(1, 2)  # (B, M, P)
    weight = (similarity / temp).softmax(dim=-1)
    # The norm of the weighted patches from their products: they never exist for every word
    norm = ((weight @ (patches @ patches.transpose(1, 2))) * weight).sum(dim=-1).sqrt()
    return (weight * similarity).sum(dim=-1) / norm.clamp_min(1e-6)


def words_similarity(
    found: Tensor, caption: Tensor, counts: Tensor, captions: int
) -> tuple[Tensor, Tensor]:
    """Mean of ``what_words_find``, (B, M), over the tokens of each of N captions that count.

    Returns:
        (B, N), 0 for a caption without a token, and the captions' numbers of tokens, (N,).
    """
    zeros = found.new_zeros(len(found), captions)
    tokens = zeros[0].index_add(0, caption, counts.to(found.dtype))
    return zeros.index_add(1, caption, found * counts) / tokens.clamp_min(1), tokens


def distilled_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | None,
    alpha: float,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy mixed with that of the momentum model (ALBEF, arXiv 2107.07651, equation 7).

    Args:
        logits: (N, C).
        labels: Class of each row, (N,), int64.
        teacher: The momentum model's logits (N, C); None: no distillation.
        alpha: Weight of the distillation, in [0, 1].
        label_smoothing: Of the labels' term, as in torch.
        reduction: "mean" or "none", as in torch.

    Returns:
        ``(1 - alpha) CE(logits, labels) + alpha CE(logits, softmax(teacher))``: a scalar, 0 if
        there are no rows, or (N,).
    """
    logits = logits.float()
    if len(logits) == 0 and reduction == "mean":
        return logits.sum()
    loss = F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=label_smoothing)
    if teacher is None:
        return loss
    soft = F.cross_entropy(logits, teacher.float().softmax(dim=1), reduction=reduction)
    return (1 - alpha) * loss + alpha * soft
