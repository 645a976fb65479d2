"""The soft mask's pure functions: equations by hand, by property, and at their edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softmask_plugin.soft_mask import (
    grad_cam,
    keep_factors,
    mask_effect,
    normalize,
    pick_words,
    word_cam,
    word_map,
    word_score,
)

WORDS = torch.tensor([[-1, 0, 1, 1, 2, -1, -1, -1], [-1, 0, 0, 0, 0, 1, 2, -1]])


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def test_word_cam_equals_the_equation_in_loops():
    attention = torch.rand(2, 3, 4, 6)
    gradient = torch.randn(2, 3, 4, 6)
    cam = word_cam(attention, gradient)
    for b in range(2):
        for k in range(4):
            for i in range(5):  # patch i is key i + 1; key 0 is the image's [CLS]
                terms = [
                    max(gradient[b, h, k, i + 1].item(), 0) * attention[b, h, k, i + 1].item()
                    for h in range(3)
                ]
                assert cam[b, k, i].item() == pytest.approx(sum(terms) / 3, rel=1e-5)


def test_grad_cam_leaves_the_graph_and_the_parameters_alone():
    weight = torch.randn(5, requires_grad=True)
    attention = (torch.rand(2, 1, 3, 5) * weight).softmax(dim=-1)
    score = (attention * weight).sum(dim=(1, 2, 3))
    cam = grad_cam(score, attention)
    assert weight.grad is None and not cam.requires_grad
    expected = word_cam(attention.detach(), weight.expand(2, 1, 3, 5)).detach()
    torch.testing.assert_close(cam, expected)
    score.sum().backward()  # the graph is still there
    assert weight.grad is not None


def test_the_effect_of_a_mask_is_the_slope_of_the_score():
    """Against finite differences: patches whose mask would lower the score, and no others."""
    weight = torch.randn(3, 5, dtype=torch.float64)

    def score(keep):
        return (keep * weight).sin().sum(dim=1).exp() * keep[:, 0]

    keep = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)
    effect = mask_effect(score(keep), keep)
    for patch in range(1, 5):
        step = torch.zeros(5, dtype=torch.float64)
        step[patch] = 1e-4
        slope = (score(torch.ones(3, 5) + step) - score(torch.ones(3, 5) - step)) / 2e-4
        torch.testing.assert_close(effect[:, patch - 1], slope.clamp_min(0).float())
    assert (effect > 0).any() and (effect == 0).any()


def test_a_words_score_is_its_log_probability():
    logits, targets = torch.randn(4, 9, dtype=torch.bfloat16), torch.tensor([0, 8, 3, 3])
    expected = torch.distributions.Categorical(logits=logits.float()).log_prob(targets)
    torch.testing.assert_close(word_score(logits, targets), expected)


@pytest.mark.parametrize("choice", ["uniform", "content", "energy"])
def test_only_words_are_picked_and_each_can_be(choice):
    cam = torch.rand(2, 8, 4)
    generator = stream()
    picked = torch.stack([pick_words(cam, WORDS, choice, generator) for _ in range(300)])
    for row in range(2):
        assert set(picked[:, row].tolist()) == {0, 1, 2}


def test_words_of_many_pieces_are_not_favoured():
    generator = stream()
    picked = torch.stack(
        [pick_words(torch.rand(2, 8, 4), WORDS, "uniform", generator) for _ in range(3000)]
    )
    shares = torch.stack([(picked == word).float().mean(dim=0) for word in range(3)])
    assert (shares - 1 / 3).abs().max() < 0.04


def test_energy_picks_in_proportion_to_the_map():
    cam = torch.zeros(1, 8, 4)
    # Sums over four patches: word 0 has 0.4, word 1 (two pieces) 1.2, word 2 nothing.
    cam[0, 1], cam[0, 2], cam[0, 3] = 0.1, 0.2, 0.1
    generator = stream()
    picked = torch.cat([pick_words(cam, WORDS[:1], "energy", generator) for _ in range(2000)])
    assert (picked == 1).float().mean().item() == pytest.approx(0.75, abs=0.04)
    assert (picked == 2).sum() == 0


def test_a_caption_without_words_masks_nothing():
    none = torch.full((2, 8), -1)
    none[1] = WORDS[1]
    cam = torch.rand(2, 8, 4)
    for choice in ("uniform", "energy"):
        word = pick_words(cam, none, choice, stream())
        assert word[0] == -1 and word[1] >= 0
        keep = keep_factors(normalize(word_map(cam, none, word)))
        assert (keep[0] == 1).all() and (keep[1] < 1).any()


def test_maps_of_nan_do_not_end_the_run():
    """The runner skips such a step."""
    cam = torch.full((2, 8, 4), torch.nan)
    assert (pick_words(cam, WORDS, "energy", stream()) < 8).all()


def test_energy_with_maps_of_zero_still_picks_a_word():
    assert (pick_words(torch.zeros(2, 8, 4), WORDS, "energy", stream()) >= 0).all()


def test_word_map_averages_the_pieces_of_a_word():
    cam = torch.rand(2, 8, 4)
    maps = word_map(cam, WORDS, torch.tensor([1, 0]))
    torch.testing.assert_close(maps[0], cam[0, 2:4].mean(dim=0))
    torch.testing.assert_close(maps[1], cam[1, 1:5].mean(dim=0))


maps = st.lists(
    st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=9), min_size=1, max_size=4
).filter(lambda rows: len({len(row) for row in rows}) == 1)


@given(
    rows=maps, kind=st.sampled_from(["soft", "hard", "random", "uniform"]), strength=st.floats(0, 1)
)
def test_masks_lie_in_0_1_and_spare_cls(rows, kind, strength):
    masks = normalize(torch.tensor(rows))
    assert ((masks >= 0) & (masks <= 1)).all()
    keep = keep_factors(masks, kind, strength, stream())
    assert keep.shape == (len(rows), 1 + len(rows[0]))
    assert ((keep >= 0) & (keep <= 1)).all() and (keep[:, 0] == 1).all()


@given(rows=maps, scale=st.sampled_from([1e-30, 1e-10, 1.0, 1e10]))
def test_normalize_spans_0_1_at_any_scale(rows, scale):
    values = torch.tensor(rows) * scale
    masks = normalize(values)
    assert masks.isfinite().all()
    for value, mask in zip(values, masks, strict=True):
        if value.max() > value.min():
            assert mask.min() == 0 and mask.max() == pytest.approx(1, abs=1e-5)
        else:
            assert (mask == 0).all()  # a constant map, 0/0, masks nothing


def test_normalize_ignores_scale_and_offset():
    values = torch.rand(3, 16, dtype=torch.float64)
    torch.testing.assert_close(normalize(7 * values + 2), normalize(values))


def test_controls_mask_as_much_as_the_soft_mask():
    masks = normalize(torch.rand(5, 49))
    mass = masks.sum(dim=1)
    for kind in ("random", "uniform"):
        keep = keep_factors(masks, kind, 1.0, stream())
        torch.testing.assert_close((1 - keep).sum(dim=1), mass)
    random = 1 - keep_factors(masks, "random", 1.0, stream())[:, 1:]
    torch.testing.assert_close(random.sort().values, masks.sort().values)
    assert not torch.equal(random, masks)
    hard = keep_factors(masks, "hard")[:, 1:]
    assert torch.equal(hard == 0, masks > 0.5) and set(hard.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(1 - keep_factors(masks, "soft", 0.3)[:, 1:], 0.3 * masks)
    with pytest.raises(ValueError, match="unknown kind"):
        keep_factors(masks, "blurred")


def test_a_word_split_by_a_masked_piece_counts_once():
    words = torch.tensor([[-1, 0, 1, -1, 1, -1, 1, -1]])
    cam = torch.rand(1, 8, 4)
    cam[0, 1] = cam[0, [2, 4, 6]].sum(dim=0)  # equal energy
    for choice in ("uniform", "energy"):
        generator = stream()
        picked = torch.cat([pick_words(cam, words, choice, generator) for _ in range(2000)])
        assert (picked == 1).float().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_maps_survive_autocast(dtype):
    cam = 1e-9 * torch.rand(2, 8, 4)
    word = torch.tensor([1, 0])
    with torch.autocast("cpu", dtype=dtype):
        maps = word_map(cam, WORDS, word)
    assert maps.dtype == torch.float32 and torch.equal(maps, word_map(cam, WORDS, word))
