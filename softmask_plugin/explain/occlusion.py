"""What a match loses when patches of pixels are painted over: maps, deletion and insertion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from softmask_plugin.errors import require_finite_scores
from softmask_plugin.explain.lavis_models import matcher_of
from softmask_plugin.explain.matcher import Matcher, Pairs, Target, match_probability
from softmask_plugin.tokenization import as_list

PASSES = 256  # pairs matched at once


@dataclass(frozen=True)
class Curves:
    """Scores of B pairs as their images lose patches, and as they get them back.

    Attributes:
        deletion: With no patch painted over, then more and more, to all, (B, steps + 1).
        insertion: From a blurred image to the whole, (B, steps + 1).
    """

    deletion: Tensor
    insertion: Tensor

    @property
    def areas(self) -> tuple[Tensor, Tensor]:
        """Areas under both over the share of patches, (B,): small and large for a faithful map."""
        return tuple(torch.trapezoid(c, dim=1) / (c.shape[1] - 1) for c in vars(self).values())


@torch.no_grad()
def deletion_insertion(
    model: Any,
    images: Tensor,
    captions: Sequence[str],
    maps: Tensor,
    steps: int | None = None,
    target: Target = match_probability,
    batch_size: int = PASSES,
) -> Curves:
    """Test maps by what they say matters: paint over the patches that they rank highest, or show
    these first.

    The metrics of RISE (Petsiuk et al. 2018, arXiv 1806.07421, 4.2), with patches of the map's grid
    in place of pixels. A deleted patch has the mean colour of its image. Inserted ones replace
    those of an image blurred by half a patch. Patches of equal rank go in reading order, so a
    constant map is no random one.

    Args:
        model: A model with a matching head, in evaluation mode.
        images, captions: B processed images, (B, 3, H, W), and their captions.
        maps: A map for each, (B, h, w): of any word, or the mean over words.
        steps: Steps of about as many patches each; None: one patch at a time.
        target: Score of the matching logits; by default the probability of a match.
        batch_size: Pairs matched at once.

    Raises:
        ValueError: Images, captions and maps do not pair, or a map is not square.
        UserError: A map or a score is NaN or infinite.
    """
    captions, matcher = as_list(captions), matcher_of(model)
    if not len(images) == len(captions) == len(maps):
        raise ValueError(f"{len(images)} images, {len(captions)} captions, {len(maps)} maps")
    if maps.ndim != 3 or maps.shape[1] != maps.shape[2]:
        raise ValueError(
            f"maps are {tuple(maps.shape)}: give one for each caption, (B, h, w) with h = w, of a "
            "word or the mean over words"
        )
    require_finite_scores("a map", maps)
    images, heat = images.to(matcher.model.device), maps.flatten(1).to(matcher.model.device)
    patches = heat.shape[1]
    shown = torch.linspace(0, patches, (steps or patches) + 1, device=heat.device).round()
    rank = heat.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    chosen = rank[:, None] < shown[None, :, None]  # (B, steps + 1, patches)
    sigma = images.shape[-1] / maps.shape[-1] / 2
    blurred = gaussian_blur(images, 2 * int(2 * sigma) + 1, sigma)
    curves = []
    for base, painted in ((_mean_colour(images), chosen), (blurred, ~chosen)):
        scores = []
        for at in torch.arange(chosen[..., 0].numel()).split(batch_size):
            row, step = at // len(shown), at % len(shown)
            seen = paint(images[row], painted[row, step], base[row])
            pairs = matcher.encode(seen, matcher.tokenize([captions[i] for i in row.tolist()]))
            scores.append(target(matcher.match(pairs).float()))
        curves.append(torch.cat(scores).view(len(images), -1))
    return Curves(*curves)


@torch.no_grad()
def occlusion_maps(
    matcher: Matcher, images: Tensor, pairs: Pairs, real: Tensor, target: Target
) -> Tensor:
    """Paint over each patch in turn: how much less each word then adds to the target.

    Occlusion (Zeiler and Fergus 2013, arXiv 1311.2901, 4.2) of patches and words together: one of
    patches alone would be the same for every word.

    Args:
        images: The N processed images.
        pairs: B captions with these images.
        real: True for the words to map, (B, W).

    Returns:
        Maps (B, W, patches), >= 0; ``word_maps`` has the equation.
    """
    maps, every = torch.zeros(*real.shape, pairs.side**2), torch.eye(pairs.side**2) > 0
    owners = pairs.images_of(torch.arange(len(real), device=real.device)).tolist()
    for row, owner in enumerate(owners):
        image, (words,) = images[owner, None], real[row].nonzero(as_tuple=True)
        hidden = pairs.captions.words[row] == words[:, None]
        hidden = F.pad(hidden, (0, 0, 1, 0))  # first the whole caption
        copies = paint(image.expand(len(every), -1, -1, -1), every, _mean_colour(image))
        scores = []
        for some in torch.cat([image, copies]).split(max(1, PASSES // len(hidden))):
            rows = torch.full((len(some) * len(hidden),), row, device=real.device)
            texts = matcher.hide(pairs, hidden.repeat(len(some), 1), rows)
            seen, _ = matcher.see(some.to(matcher.model.device))
            own = torch.arange(len(some), device=real.device).repeat_interleave(len(hidden))
            logits = matcher.match(replace(texts, images=seen, owners=own))
            scores.append(target(logits.float()).view(len(some), -1))
        score = torch.cat(scores)  # of each image with each caption
        adds = score[:, :1] - score[:, 1:]
        maps[row, words.cpu()] = (adds[:1] - adds[1:]).relu().T.cpu()
    return maps.to(real.device)


def paint(images: Tensor, painted: Tensor, base: Tensor) -> Tensor:
    """Take the ``painted`` patches from ``base``: (N, 3, H, W), bool (N, patches), as images."""
    side = round(painted.shape[1] ** 0.5)
    mask = F.interpolate(painted.float().view(-1, 1, side, side), images.shape[-2:]) > 0
    return torch.where(mask.to(images.device), base, images)


def _mean_colour(images: Tensor) -> Tensor:
    return images.mean(dim=(2, 3), keepdim=True).expand_as(images)
