"""With all innovations off, softmask_pretrain is LAVIS's albef_pretrain."""

from __future__ import annotations

import pytest
from lavis.models.albef_models.albef_pretrain import AlbefPretrain
from toy_models import assert_same_step

from softmask_plugin.nn.sampling import mask_tokens


@pytest.fixture
def same_draws(monkeypatch, same_negatives):
    """Let both models draw the same negatives and mask the same tokens.

    LAVIS draws from the global generator in an order of its own, so its draws are replaced by the
    stream that our model uses.
    """

    def apply(model, batch):
        def mask(self, input_ids, vocab_size, device, targets, probability_matrix):
            draws, _ = model.progress(batch)
            clean = model.caption_tokenizer.tokenize(batch["text_input"])
            width = clean.ids.shape[1]
            assert (input_ids[:, width:] == 0).all()  # LAVIS pads to 30 tokens, we to the longest
            ids, chosen = mask_tokens(
                clean.ids,
                model.caption_tokenizer.maskable(clean),
                self.tokenizer.mask_token_id,
                vocab_size,
                float(probability_matrix[0, 0]),
                draws.stream("mlm"),
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
    ours = make_model(**{**albef, "text": {"shared": False, "mask_prob": 0.4}})
    theirs = albef_twin(ours)
    batch = make_batch(size, epoch=epoch)
    same_draws(ours, batch)
    assert_same_step(ours, theirs, batch)
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)


def test_state_dict_keys_are_lavis(make_model, albef_twin):
    model = make_model()
    twin = albef_twin(model)
    shapes = {k: v.shape for k, v in twin.state_dict().items()}
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes
