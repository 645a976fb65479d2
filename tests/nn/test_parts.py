"""Parts of the core one by one: momentum, queue, random draws, image encoder."""

from __future__ import annotations

import copy

# isort: split
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lavis.models.vit import VisionTransformerEncoder

from softmask_plugin.nn.momentum import MomentumPairs, momentum_copy
from softmask_plugin.nn.queue import enqueue_, random_queue
from softmask_plugin.nn.sampling import Draws, draw_one, mask_tokens, sample_negatives
from softmask_plugin.nn.vision import VisionTransformer

# ---- momentum


class Tied(torch.nn.Module):
    """An output layer whose matrix is the embedding, as in BERT's MLM head."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5)
        self.head.weight = self.embedding.weight


def test_momentum_tensors_are_buffers_under_the_same_names():
    online = Tied()
    momentum = momentum_copy(online)
    assert not list(momentum.parameters())
    assert momentum.state_dict().keys() == online.state_dict().keys()
    assert momentum.head.weight is momentum.embedding.weight
    assert momentum.head.weight is not online.head.weight


@pytest.mark.parametrize(
    "move",
    [lambda model: model, copy.deepcopy, lambda model: model.to(torch.float64)],
    ids=["plain", "deepcopy", "to"],
)
def test_momentum_follows_the_formula_and_tied_tensors_stay_equal(move):
    model = torch.nn.ModuleDict({"online": Tied(), "momentum": momentum_copy(Tied())})
    model = move(model)
    pairs = MomentumPairs([(model["online"], model["momentum"])])
    expected = {
        name: 0.9 * tensor + 0.1 * model["online"].state_dict()[name]
        for name, tensor in model["momentum"].state_dict().items()
    }
    pairs.update(0.9)
    torch.testing.assert_close(dict(model["momentum"].state_dict()), expected)
    assert torch.equal(model["momentum"].head.weight, model["momentum"].embedding.weight)
    pairs.update(0)
    for name, tensor in model["online"].state_dict().items():
        assert torch.equal(model["momentum"].state_dict()[name], tensor)


def test_a_copied_model_updates_its_own_momentum_encoders(make_model):
    model = make_model()
    twin = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    twin.momentum.update(0)
    assert torch.equal(twin.vision_proj_m.weight, twin.vision_proj.weight)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# ---- queue


@given(size=st.integers(0, 9), lengths=st.lists(st.integers(1, 14), max_size=8))
def test_queue_equals_a_plain_list(size, lengths):
    queues = [torch.full((1, size), -1.0), torch.full((2, size), -1.0)]
    plain, pointer, number = [-1.0] * size, 0, 0
    slot = 0
    for length in lengths:
        rows = torch.arange(number, number + length).float()[:, None]
        pointer = enqueue_(queues, [rows, rows.expand(-1, 2)], pointer)
        for value in range(number, number + length) if size else ():
            plain[slot] = float(value)
            slot = (slot + 1) % size
        number += length
        # A batch larger than the queue may start anywhere: what counts is what is there, and order
        ordered = queues[0][0].roll(-pointer).tolist()
        assert ordered == plain[slot:] + plain[:slot]
        assert torch.equal(queues[1][1], queues[0][0])
    assert pointer == 0 if size == 0 else 0 <= pointer < size


def test_queues_start_as_unit_vectors():
    torch.testing.assert_close(random_queue(7, 20).norm(dim=0), torch.ones(20))
    assert random_queue(7, 0).shape == (7, 0)


# ---- draws


def test_streams_depend_only_on_seed_step_and_purpose():
    def numbers(seed, step, purpose):
        return tuple(torch.rand(3, generator=Draws(seed, step).stream(purpose)).tolist())

    draws = Draws(1, 2)
    torch.rand(
        5, generator=draws.stream("word")
    )  # drawing for one purpose leaves the others' streams alone
    assert tuple(torch.rand(3, generator=draws.stream("mlm")).tolist()) == numbers(1, 2, "mlm")
    cases = [(1, 2, "mlm"), (1, 2, "word"), (1, 3, "mlm"), (12, 2, "mlm"), (1, 22, "mlm")]
    assert len({numbers(*case) for case in cases}) == len(cases)
    state = torch.get_rng_state()
    numbers(1, 2, "mlm")
    assert torch.equal(torch.get_rng_state(), state)  # nor the global generator


@given(size=st.integers(2, 6), seed=st.integers(0, 99), scale=st.sampled_from([0.0, 1.0, 1e3, 1e5]))
def test_a_negative_is_never_a_positive(size, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    similarity = scale * torch.randn(size, size, generator=generator)
    positives = torch.eye(size, dtype=torch.bool)
    similarity[positives] += scale  # as training makes them
    picked = sample_negatives(similarity, positives, generator)
    assert (picked != torch.arange(size)).all()


def test_negatives_come_in_proportion_to_the_softmax():
    similarity = torch.tensor([[9.0, 0.0, 1.0, 2.0]]).expand(20000, -1)
    positives = torch.tensor([[True, False, False, False]]).expand(20000, -1)
    picked = sample_negatives(similarity, positives, torch.Generator().manual_seed(0))
    shares = picked.bincount(minlength=4) / 20000
    torch.testing.assert_close(
        shares[1:], torch.tensor([0.0, 1.0, 2.0]).softmax(0), atol=0.015, rtol=0
    )


def test_draws_are_those_of_torch_and_never_fail():
    weights = torch.rand(64, 33, generator=torch.Generator().manual_seed(1))
    drawn = draw_one(weights, torch.Generator().manual_seed(2))
    expected = torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(2))
    assert torch.equal(drawn, expected.squeeze(1))
    odd = torch.tensor([[0.0, 0.0, 0.0], [torch.nan, 1.0, 1.0], [0.0, torch.inf, 0.0]])
    assert draw_one(odd).tolist() == [0, 0, 1] and draw_one(odd[:0]).shape == (0,)


def test_masking_is_80_10_10_among_maskable_tokens():
    ids = torch.full((2000, 500), 7)
    maskable = torch.arange(500).expand(2000, -1) % 2 == 0
    masked, chosen = mask_tokens(ids, maskable, 4, 1000, 0.3, torch.Generator().manual_seed(0))
    assert not (chosen & ~maskable).any() and torch.equal(masked[~chosen], ids[~chosen])
    assert chosen[maskable].float().mean().item() == pytest.approx(0.3, abs=0.003)
    seen = masked[chosen]
    assert (seen == 4).float().mean().item() == pytest.approx(0.8, abs=0.005)
    assert (seen == 7).float().mean().item() == pytest.approx(0.1, abs=0.005)
    others = seen[(seen != 4) & (seen != 7)]
    assert others.min() >= 0 and others.max() < 1000 and len(others.unique()) == 998


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_masking_none_or_all(probability, share):
    maskable = torch.arange(8).expand(3, -1) > 0
    _, chosen = mask_tokens(torch.zeros(3, 8, dtype=torch.long), maskable, 4, 9, probability)
    assert torch.equal(chosen, maskable & bool(share))


# ---- image encoder


@pytest.mark.parametrize("checkpointing", [False, True])
def test_image_encoder_equals_lavis_forward_and_backward(checkpointing):
    torch.manual_seed(0)
    ours = VisionTransformer(32, 8, width=24, depth=3, heads=3, checkpointing=checkpointing).train()
    theirs = VisionTransformerEncoder(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3
    ).train()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    got, expected = ours(images), theirs(images)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-4, msg=name
        )


def test_stochastic_depth_keeps_the_mean_and_is_off_in_evaluation():
    torch.manual_seed(0)
    block = VisionTransformer(8, 8, width=8, depth=2, heads=2, drop_path=0.5).blocks[1]
    branch = torch.ones(4000, 1, 1)
    dropped = block.train().skip(branch)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert dropped.mean().item() == pytest.approx(1, abs=0.06)
    assert torch.equal(block.eval().skip(branch), branch)


def test_images_of_another_size_are_refused():
    model = VisionTransformer(16, 8, width=8, depth=1, heads=2)
    with pytest.raises(ValueError, match="24x16 but the model is for 16x16"):
        model(torch.randn(1, 3, 24, 16))
    with pytest.raises(ValueError, match="multiple"):
        VisionTransformer(20, 8)
