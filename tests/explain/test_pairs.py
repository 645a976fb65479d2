"""explain() against the same computation by hand, with LAVIS's modules if they can do it."""

from __future__ import annotations

import pytest
import torch
from lavis.models.blip_models.blip_image_text_matching import compute_gradcam
from toy_models import matching_logits

from softmask_plugin.errors import UserError
from softmask_plugin.explain.pairs import explain
from softmask_plugin.models.matching import SoftMaskImageTextMatching
from softmask_plugin.models.pretrain import SoftMaskPretrain
from softmask_plugin.models.retrieval import SoftMaskRetrieval
from softmask_plugin.soft_mask import keep_factors, normalize
from softmask_plugin.tokenization import CaptionTokenizer

CAPTION = "a small red circle above a large blue star"


@pytest.fixture
def model(make_model):
    return make_model()


def fuse_plainly(twin, model, image_states, caption, keep=None):
    """LAVIS's match probability of one pair, image features masked before any projection."""
    tokens = model.caption_tokenizer.tokenize([caption])
    if keep is not None:
        image_states = image_states * keep[None, :, None]
    return matching_logits(twin, tokens, image_states).softmax(dim=-1)[0, 1]


def test_scores_equal_plain_forward_passes(model, images, albef_twin):
    twin = albef_twin(model).eval()
    captions = [CAPTION, "a black heart"]
    for image, caption, got in zip(images, captions, explain(model, images, captions), strict=True):
        with torch.no_grad():
            states = twin.visual_encoder(image[None])
            score = fuse_plainly(twin, model, states, caption)
            assert got.score == pytest.approx(score.item(), abs=1e-5)
            for mask, masked in zip(got.masks, got.masked_scores, strict=True):
                keep = torch.cat([torch.ones(1), 1 - mask.flatten()])
                expected = fuse_plainly(twin, model, states, caption, keep)
                assert masked.item() == pytest.approx(expected.item(), abs=1e-5)
        assert (got.masked_scores != got.score).any()


def test_lavis_own_gradcam_names_ours(model, make_other, images):
    for each in (model, make_other(SoftMaskImageTextMatching)):
        tokens = each.tokenizer([CAPTION, CAPTION], return_tensors="pt")
        with pytest.raises(UserError, match=r"use softmask_plugin.explain \(explain_image"):
            compute_gradcam(each, images, [CAPTION, CAPTION], tokens, block_num=1)


def test_words_maps_and_masks_go_together(model, images):
    first, second = explain(model, images, [CAPTION, "zzyx circle!"])
    assert first.caption == CAPTION and first.words == CAPTION.split()
    assert second.words[1] == "circle"
    for each in (first, second):
        assert each.cams.shape == each.masks.shape == (len(each.words), 4, 4)
        assert each.masked_scores.shape == (len(each.words),)
        assert (each.cams >= 0).all() and not each.cams.requires_grad
        low, high = each.masks.flatten(1).aminmax(dim=1)
        assert (low == 0).all()
        torch.testing.assert_close(high, torch.ones(len(each.words)))
        spread = each.cams.flatten(1)
        for cam, mask in zip(spread, each.masks.flatten(1), strict=True):
            torch.testing.assert_close(mask, (cam - cam.min()) / (cam.max() - cam.min()))
    assert not torch.equal(first.cams[2], first.cams[3])


def test_masks_are_those_of_training(make_model, make_batch):
    """The word that a training step picks gets the mask that explain() shows for it."""
    model = make_model(text={"mask_prob": 0.0})
    batch = make_batch(4)
    out = model.eval()(batch)
    shown = explain(model, batch["image"], batch["text_input"])
    for row, each in enumerate(shown):
        mask = each.masks[out.word[row]].flatten()
        torch.testing.assert_close(1 - out.keep[row, 1:], mask, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [SoftMaskPretrain, SoftMaskRetrieval])
@pytest.mark.parametrize("kind", ["soft", "hard", "uniform"])
def test_masks_have_the_kind_and_strength_of_training(make_other, images, cls, kind):
    option = {"enabled": True, "kind": kind, "strength": 0.4}
    (got,) = explain(make_other(cls, soft_mask=option), images[:1], [CAPTION])
    keep = keep_factors(normalize(got.cams.flatten(1)), kind, 0.4)
    torch.testing.assert_close(got.masks.flatten(1), 1 - keep[:, 1:])
    assert (got.kind, got.strength, got.mask_name) == (kind, 0.4, f"{kind} mask × 0.4")


def test_a_random_mask_is_one_draw_of_the_same_amounts(make_model, images):
    model = make_model(soft_mask={"kind": "random"})
    before = torch.get_rng_state()
    (got,), (again,) = (explain(model, images[:1], [CAPTION]) for _ in range(2))
    assert torch.equal(got.masks, again.masks) and torch.equal(torch.get_rng_state(), before)
    hidden = normalize(got.cams.flatten(1))
    assert not torch.equal(got.masks.flatten(1), hidden)
    torch.testing.assert_close(got.masks.flatten(1).sort().values, hidden.sort().values)


@pytest.mark.parametrize("cls", [SoftMaskPretrain, SoftMaskImageTextMatching])
def test_a_model_that_trains_without_masks_shows_the_paper_s(make_other, images, cls):
    off = {"soft_mask": {"enabled": False, "kind": "hard", "strength": 0.1}}
    model = make_other(cls, **(off if cls is SoftMaskPretrain else {}))
    (got,) = explain(model, images[:1], [CAPTION])
    torch.testing.assert_close(got.masks.flatten(1), normalize(got.cams.flatten(1)))
    assert got.mask_name == "soft mask"


def test_content_words(model, images):
    (got,) = explain(model, images[:1], [CAPTION])
    assert [got.words[i] for i in got.content_words] == "small red circle large blue star".split()


def test_a_long_caption_shows_the_words_that_fit(make_model, images):
    (got,) = explain(make_model(max_txt_len=6), images[:1], [CAPTION])
    assert got.words == ["a", "small", "red", "circle"]
    assert got.kept == "a small red circle" and got.caption == CAPTION
    assert got.cut == "only the first 4 of 9 words fit"


@pytest.mark.parametrize(
    ("caption", "kept"),
    [
        ("A  Star,\n[MASK] of [SEP] rings", "A  Star,\n["),
        ("a star, [MASK]", "a star, ["),
        ("circlestar circlestar", "circlesta"),
        ("", ""),
        ("a star !", None),
        ("a \u200b star \u200b", None),
    ],
)
def test_a_cut_caption_keeps_its_spelling(model, caption, kept):
    tokenizer = CaptionTokenizer(model.tokenizer, 6)
    assert tokenizer.truncate(caption) == (caption if kept is None else kept)


def test_pieces_make_one_word(model, images):
    pieces = model.tokenizer.tokenize("circlestar")
    assert len(pieces) > 1 and "[UNK]" not in pieces
    (got,) = explain(model, images[:1], ["circlestar ring"])
    assert got.words == ["circlestar", "ring"]


def test_a_caption_without_words_has_only_a_score(model, images):
    (got,) = explain(model, images[:1], [""])
    assert got.words == [] and got.masks.shape == (0, 4, 4) and 0 <= got.score <= 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_the_model_is_left_as_it_was(model, images, training, grad):
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.set_grad_enabled(grad):
        explain(model, images, [CAPTION, ""])
        assert torch.is_grad_enabled() == grad
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_compiled_model_is_explained(model, images):
    (found,) = explain(torch.compile(model), images[:1], [CAPTION])
    (expected,) = explain(model, images[:1], [CAPTION])
    assert found.score == expected.score


def test_the_mode_comes_back_after_an_error(model, images):
    model.train()
    with pytest.raises(ValueError, match="image_size"):
        explain(model, images[..., :16], [CAPTION, CAPTION])
    assert model.training
    with pytest.raises(ValueError, match="do not pair"):
        explain(model, images, [CAPTION])
