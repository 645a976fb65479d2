"""WordCam: word_maps in batches, for chosen words, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

from softmask_plugin import WordCam
from softmask_plugin.errors import UserError
from softmask_plugin.explain import word_maps
from softmask_plugin.models.retrieval import SoftMaskRetrieval

CAPTIONS = ["a small red circle above a large blue star", "a black heart", "a ring, a red ring"]


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("method", ["gradcam", "attention", "word", "similarity", "occlusion"])
def test_maps_within_inference_mode(make_model, images, method):
    model = make_model().eval()
    expected = WordCam(model, method=method)(images, CAPTIONS)
    with torch.inference_mode():
        got = WordCam(model, method=method)(images + 0, CAPTIONS)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["gradcam", "attention", "word", "occlusion"])
def test_batches_give_the_maps_of_word_maps(make_model, images, method):
    model = make_model().eval()
    expected = word_maps(model, images, CAPTIONS, method=method).maps
    model.train()
    with WordCam(model, method=method, batch_size=2) as cam:
        got = cam(images, CAPTIONS)
    assert model.training and got.shape == (3, 9, 4, 4) and got.max() > 0
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


def test_a_phrase_has_the_mean_map_of_its_words_wherever_it_stands(make_model, images):
    model = make_model().eval()
    every = word_maps(model, images, CAPTIONS).maps
    got = WordCam(model)(images, CAPTIONS, words=["blue star", "heart", "a ring"])
    torch.testing.assert_close(got[0], every[0, 7:9].mean(dim=0), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(got[1], every[1, 2], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(got[2], every[2, :2].mean(dim=0), rtol=1e-4, atol=1e-7)
    (both,) = WordCam(model, batch_size=1)(images[2:], CAPTIONS[2:], words="ring")
    torch.testing.assert_close(both, every[2, [1, 5]].mean(dim=0), rtol=1e-4, atol=1e-7)


def test_layer_and_target_are_those_of_grad_cam(make_model, images):
    model = make_model().eval()
    first, second = (WordCam(model, layer=layer)(images, CAPTIONS) for layer in (2, 3))
    assert not torch.allclose(first, second)
    odds = WordCam(model, target=lambda logits: logits[:, 1] - logits[:, 0])(images, CAPTIONS)
    twice = WordCam(model, target=lambda logits: 2 * logits[:, 1])(images, CAPTIONS)
    base = WordCam(model)(images, CAPTIONS)
    assert not torch.allclose(odds, base, atol=1e-2 * float(base.max()))
    torch.testing.assert_close(twice, 2 * base)


@pytest.mark.parametrize(
    ("given", "words", "message"),
    [
        ({}, ["sta", "heart", "ring"], "lacks 'sta': did you mean 'star'"),
        ({}, ["red star", "heart", "ring"], "lacks 'red star'"),
        ({"method": "gradcm"}, None, "method is 'gradcm': did you mean 'gradcam'"),
        ({"method": "word"}, None, "SoftMaskRetrieval predicts no masked words"),
    ],
)
def test_mistakes(make_other, images, given, words, message):
    with pytest.raises(UserError, match=message):
        WordCam(make_other(SoftMaskRetrieval), **given)(images, CAPTIONS, words)


def test_words_images_and_layers_must_fit(make_model, images):
    model = make_model()
    with pytest.raises(ValueError, match="3 images do not pair with 3 captions and 1 words"):
        WordCam(model)(images, CAPTIONS, words=["star"])
    with pytest.raises(ValueError, match="2 images do not pair with 3 captions"):
        WordCam(model)(images[:2], CAPTIONS)
    with pytest.raises(ValueError, match="4 images do not pair with 3 captions"):
        WordCam(model, batch_size=3)(images[[0, 1, 2, 2]], CAPTIONS)
    with pytest.raises(ValueError, match="layer 0 has no cross-attention"):
        WordCam(model, layer=0)(images, CAPTIONS)
