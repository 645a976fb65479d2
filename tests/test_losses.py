"""FocalITCLoss against torch's cross-entropy, ALBEF's formula, finite differences and limits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from softmask_plugin.errors import UserError
from softmask_plugin.losses import (
    FocalITCLoss,
    focal_cross_entropy,
    local_contrast,
    local_contrast_across,
)
from softmask_plugin.registry import get_loss_class, list_losses, register_loss


def batch(rows=4, columns=10, scale=5.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, columns, generator=generator, dtype=dtype)
    soft = torch.randn(rows, columns, generator=generator, dtype=dtype).softmax(dim=1)
    one_hot = torch.eye(rows, columns, dtype=dtype)
    return logits, one_hot, 0.4 * soft + 0.6 * one_hot


def test_gamma_zero_is_cross_entropy():
    logits, one_hot, soft = batch()
    labels = torch.arange(len(logits))
    other = logits.flip(1)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(other, labels)) / 2
    torch.testing.assert_close(FocalITCLoss(0)(logits, other, one_hot, one_hot), expected)
    expected = (F.cross_entropy(logits, soft) + F.cross_entropy(other, soft)) / 2
    torch.testing.assert_close(FocalITCLoss(0)(logits, other, soft, soft), expected)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 3.0])
def test_equals_the_formula(gamma):
    logits, _, soft = batch()
    p = logits.softmax(dim=1)
    expected = -(soft * (1 - p) ** gamma * p.log()).sum(dim=1).mean()
    torch.testing.assert_close(focal_cross_entropy(logits, soft, gamma), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_gradient_by_finite_differences(gamma):
    logits, one_hot, soft = batch(3, 6, scale=2.0)
    for targets in (one_hot, soft):
        torch.autograd.gradcheck(
            lambda x, y=targets: focal_cross_entropy(x, y, gamma), logits.requires_grad_()
        )


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("temperature", [0.001, 0.07, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_at_the_temperature_clamps(gamma, temperature, dtype):
    cosines = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    logits = (cosines / temperature).to(dtype).requires_grad_()
    loss = focal_cross_entropy(logits, torch.eye(3), gamma)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite() and loss >= 0
    assert logits.grad.isfinite().all()


def test_limits_of_p():
    certain = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = focal_cross_entropy(certain, torch.tensor([[1.0, 0.0]]), 0.5)  # p -> 1
    loss.backward()
    assert loss == 0 and (certain.grad == 0).all()
    wrong = focal_cross_entropy(certain.detach(), torch.tensor([[0.0, 1.0]]), 2.0)  # p -> 0
    torch.testing.assert_close(wrong, torch.tensor(200.0))


@given(
    gamma=st.floats(0, 5),
    more=st.floats(0.1, 3),
    seed=st.integers(0, 2**16),
    scale=st.floats(0.01, 100),
)
def test_focusing_never_raises_the_loss(gamma, more, seed, scale):
    logits, one_hot, soft = batch(scale=scale, seed=seed)
    for targets in (one_hot, soft):
        less = focal_cross_entropy(logits, targets, gamma + more)
        plain = focal_cross_entropy(logits, targets, gamma)
        assert 0 <= less <= plain + 1e-12


def test_easy_pairs_lose_the_most_weight():
    easy, hard = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.5, 0.0]])
    target = torch.tensor([[1.0, 0.0]])
    kept = [
        focal_cross_entropy(x, target, 2.0) / focal_cross_entropy(x, target, 0.0)
        for x in (easy, hard)
    ]
    assert kept[0] < 0.001 < 0.1 < kept[1]


def test_bad_input_is_refused():
    logits, one_hot, _ = batch()
    for gamma in (-1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="gamma"):
            FocalITCLoss(gamma)
    with pytest.raises(ValueError, match="one shape"):
        FocalITCLoss()(logits, logits, one_hot[:, :-1], one_hot)
    with pytest.raises(ValueError, match="one shape"):
        focal_cross_entropy(logits[0], one_hot[0], 2.0)


def test_losses_have_a_registry_of_their_own():
    assert get_loss_class("focal_itc") is FocalITCLoss
    assert "focal_itc" in list_losses()
    with pytest.raises(UserError, match="did you mean 'focal_itc'"):
        get_loss_class("focal_ict")

    def define():
        @register_loss("test_only")
        class Mine(FocalITCLoss):
            pass

        return Mine

    try:
        define()
        assert define() is get_loss_class("test_only")  # again, as a notebook's reload does
        with pytest.raises(UserError, match="already registered"):
            register_loss("test_only")(FocalITCLoss)
        with pytest.raises(UserError, match='write @register_loss."NAME"'):
            register_loss(FocalITCLoss)
    finally:
        from softmask_plugin.registry import LOSSES

        LOSSES.pop("test_only", None)


# ---- words and patches


def local_contrast_in_loops(words, patches, mask, temp):
    """The equations of SPARC, word by word."""
    terms = []
    for caption, image, real in zip(words, patches, mask, strict=True):
        caption, grouped = caption[real], []
        for word in caption:
            near = image @ word
            share = (near - near.min()) / (near.max() - near.min())
            share = share * (share >= 1 / len(image))
            one = (share / share.sum()) @ image
            grouped.append(one / one.norm())
        logits = caption @ torch.stack(grouped).T / temp
        own = torch.arange(len(caption))
        for each in (logits, logits.T):
            terms += F.cross_entropy(each, own, reduction="none")
    return torch.stack(terms).mean()


def local_contrast_across_in_loops(words, patches, mask, temp):
    """Gupta et al.'s equations, word by word and image by image."""
    scores = torch.zeros(len(words), len(patches), dtype=words.dtype)
    for c, (caption, real) in enumerate(zip(words, mask, strict=True)):
        for b, image in enumerate(patches):
            found = [(image @ word / temp).softmax(0) @ image for word in caption[real]]
            scores[c, b] = F.cosine_similarity(caption[real], torch.stack(found)).mean()
    own = torch.arange(len(words))
    return sum(F.cross_entropy(2 * each / temp, own) for each in (scores, scores.T)) / 2


def across(words, patches, mask, temp):
    """``local_contrast_across`` of the grid's tokens, packed."""
    rows = torch.arange(len(mask))[:, None].expand_as(mask)
    return local_contrast_across(words.flatten(0, 1), patches, rows.flatten(), mask.flatten(), temp)


EQUATIONS = {local_contrast: local_contrast_in_loops, across: local_contrast_across_in_loops}


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@pytest.fixture
def pairs():
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])
    return unit(3, 5, 8), unit(3, 9, 8, seed=1), mask


@pytest.mark.parametrize("contrast", EQUATIONS)
def test_local_contrast_equals_its_equations(pairs, contrast):
    words, patches, mask = pairs
    got = contrast(words, patches, mask, 0.1)
    torch.testing.assert_close(got, EQUATIONS[contrast](words, patches, mask, 0.1))


@pytest.mark.parametrize("contrast", EQUATIONS)
def test_local_contrast_has_exact_gradients(pairs, contrast):
    words, patches, mask = (each[:2, :4].requires_grad_(each.is_floating_point()) for each in pairs)
    assert torch.autograd.gradcheck(lambda w, p: contrast(w, p, mask, 0.5), (words, patches))


@pytest.mark.parametrize("contrast", EQUATIONS)
def test_padding_takes_no_part_in_local_contrast(pairs, contrast):
    words, patches, mask = pairs
    other = torch.where(mask[..., None], words, unit(3, 5, 8, seed=2))
    same = (contrast(each, patches, mask, 0.1) for each in (words, other))
    torch.testing.assert_close(*same)
    assert contrast(words, patches, torch.zeros_like(mask), 0.1) == 0


@pytest.mark.parametrize("contrast", EQUATIONS)
def test_local_contrast_of_equal_patches_is_finite(pairs, contrast):
    words, patches, mask = pairs
    flat = patches[:, :1].expand(-1, 9, -1).clone().requires_grad_()
    loss = contrast(words, flat, mask, 0.1)
    loss.backward()
    assert loss.isfinite() and flat.grad.isfinite().all()


def test_words_that_lie_on_their_patches_cost_little(pairs):
    mask = pairs[-1]
    words = torch.eye(5, dtype=torch.float64).expand(3, -1, -1)
    right = local_contrast(words, words, mask, 0.01)
    wrong = local_contrast(words, words[:, :1].expand(-1, 5, -1), mask, 0.01)
    assert right < 0.01 < 0.5 < wrong


def test_across_the_batch_a_caption_finds_the_image_that_shows_its_words():
    things = torch.eye(8, dtype=torch.float64)
    words, mask = things.view(4, 2, 8), torch.ones(4, 2, dtype=torch.bool)
    patches = torch.cat([words.flip(1), things[:1].expand(4, 3, -1)], dim=1)  # in any order
    right, wrong = (across(words, each, mask, 0.01) for each in (patches, patches.roll(1, dims=0)))
    assert right < 0.01 < 10 < wrong
