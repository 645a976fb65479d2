"""With all innovations off, softmask_pretrain is LAVIS's albef_pretrain."""

from __future__ import annotations

import pytest
import torch
from lavis.models.albef_models.albef_pretrain import AlbefPretrain

from softmask_plugin.nn import sampling

LOSSES = ("loss_itc", "loss_itm", "loss_mlm", "loss")


@pytest.fixture
def same_draws(monkeypatch):
    """Let both models draw the same negatives and mask the same tokens.

    LAVIS draws from the global generator in an order of its own, so its draws are replaced by the
    stream that our model uses; the negatives of both are those at the 0.3 quantile.
    """

    def quantile(weights, generator=None):
        return (weights.cumsum(-1) < 0.3).sum(-1)

    def multinomial(weights, n):
        assert n == 1
        return quantile(weights)[..., None]

    monkeypatch.setattr(sampling, "draw_one", quantile)
    monkeypatch.setattr(torch, "multinomial", multinomial)

    def apply(model, batch):
        from softmask_plugin.nn.sampling import Draws, mask_tokens

        def mask(self, input_ids, vocab_size, device, targets, probability_matrix):
            step, _ = model.progress(batch)
            clean = model.caption_tokenizer.tokenize(batch["text_input"])
            width = clean.ids.shape[1]
            assert (input_ids[:, width:] == 0).all()  # LAVIS pads to 30 tokens, we to the longest
            ids, chosen = mask_tokens(
                clean.ids,
                model.caption_tokenizer.maskable(clean),
                self.tokenizer.mask_token_id,
                vocab_size,
                float(probability_matrix[0, 0]),
                Draws(torch.initial_seed(), step).stream("mlm"),
            )
            input_ids[:, :width] = ids
            targets[:, width:] = -100
            targets[:, :width][~chosen] = -100
            return input_ids, targets

        monkeypatch.setattr(AlbefPretrain, "mask", mask)

    return apply


@pytest.mark.parametrize("size", [2, 3, 4, 6])
@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_losses_gradients_and_state_equal_lavis(
    albef, make_model, make_batch, albef_twin, same_draws, size, epoch
):
    ours = make_model(**{**albef, "text": {"shared": False, "mask_prob": 0.4}}).train()
    theirs = albef_twin(ours).train()
    batch = make_batch(size, epoch=epoch)
    same_draws(ours, batch)

    expected, got = theirs(batch), ours(batch)
    for name in LOSSES:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)

    expected["loss"].backward()
    got["loss"].backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert gradients.keys() == {n for n, p in ours.named_parameters() if p.requires_grad}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    state = ours.state_dict()
    for name, tensor in theirs.state_dict().items():  # momentum encoders, queues and pointer moved
        torch.testing.assert_close(
            state[name], tensor, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_state_dict_keys_are_lavis(make_model, albef_twin):
    model = make_model()
    twin = albef_twin(model)
    shapes = {k: v.shape for k, v in twin.state_dict().items()}
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes
