"""Occlusion maps, deletion and insertion, against one pass at a time and a model we know."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from softmask_plugin import load_trained
from softmask_plugin.datasets.scenes.grammar import captions, make_scenes
from softmask_plugin.datasets.scenes.render import render
from softmask_plugin.errors import UserError
from softmask_plugin.explain import Curves, deletion_insertion, word_maps
from softmask_plugin.explain.matcher import match_logit
from softmask_plugin.explain.occlusion import paint

CAPTIONS = ["a small red circle above a large blue star", "a black heart"]


def test_painting_takes_whole_patches():
    images, base = torch.zeros(1, 3, 6, 6), torch.ones(1, 3, 6, 6)
    painted = torch.tensor([[True, False, False, False, True, False, False, False, True]])
    expected = torch.eye(3).kron(torch.ones(2, 2)).expand(1, 3, 6, 6)
    assert torch.equal(paint(images, painted, base), expected)


@pytest.mark.parametrize("steps", [None, 5])
def test_curves_equal_one_pass_at_a_time(model, images, steps):
    maps = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(5))
    got = deletion_insertion(model, images, CAPTIONS, maps, steps, match_logit, batch_size=3)
    count = steps or 16
    for row, (image, caption, heat) in enumerate(zip(images, CAPTIONS, maps, strict=True)):
        order = heat.flatten().argsort(descending=True).tolist()
        mean = image.mean(dim=(1, 2))
        # scipy cuts the kernel at two sigma, as ours, and mirrors without repeating the edge
        blurred = gaussian_filter(image.numpy(), (0, 4, 4), mode="mirror", truncate=2)
        for step in range(count + 1):
            deleted, inserted = image.clone(), torch.from_numpy(blurred).clone()
            for patch in order[: round(16 * step / count)]:
                y, x = (8 * each for each in divmod(patch, 4))
                deleted[:, y : y + 8, x : x + 8] = mean[:, None, None]
                inserted[:, y : y + 8, x : x + 8] = image[:, y : y + 8, x : x + 8]
            for curve, seen in ((got.deletion, deleted), (got.insertion, inserted)):
                with torch.no_grad():
                    tokens = model.tokenize([caption])
                    text = model.bert.encode(tokens.ids, tokens.packing)
                    memory = model.bert.remember(model.visual_encoder(seen[None]))
                    logits = model.match(model.bert.fuse(text, memory).cls)
                torch.testing.assert_close(curve[row, step], logits[0, 1], rtol=1e-4, atol=1e-4)
    whole = word_maps(model, images, CAPTIONS).score.logit()
    odds = deletion_insertion(model, images, CAPTIONS, maps, 2, lambda x: x[:, 1] - x[:, 0])
    for curve, end in ((odds.deletion, 0), (odds.insertion, -1)):
        torch.testing.assert_close(curve[:, end], whole, rtol=1e-4, atol=1e-4)


def test_areas_are_means_of_the_curves():
    falling, rising = torch.tensor([[1.0, 0.5, 0.0]]), torch.tensor([[0.0, 1.0, 1.0]])
    deletion, insertion = Curves(falling, rising).areas
    assert deletion.tolist() == [0.5] and insertion.tolist() == [0.75]


def test_images_captions_and_maps_must_pair(model, images):
    with pytest.raises(ValueError, match="2 images, 1 captions, 2 maps"):
        deletion_insertion(model, images, CAPTIONS[:1], torch.rand(2, 4, 4))
    for shape in ((2, 9, 4, 4), (2, 2, 8)):  # of all words; of no square of patches
        with pytest.raises(ValueError, match="give one for each caption"):
            deletion_insertion(model, images, CAPTIONS, torch.rand(shape))
    with pytest.raises(UserError, match="a map is NaN or infinite"):
        deletion_insertion(model, images, CAPTIONS, torch.full((2, 4, 4), torch.nan))


def test_occlusion_is_what_a_word_adds_with_and_without_a_patch(model, images):
    got = word_maps(model, images, CAPTIONS, method="occlusion")
    mask_id = model.tokenizer.mask_token_id

    def logit(image, ids, mask):
        memory = model.bert.remember(model.visual_encoder(image[None]))
        text = model.bert.encode(ids[None], type(tokens.packing).of(mask[None]))
        return model.match(model.bert.fuse(text, memory).cls)[0, 1]

    tokens = model.tokenize(CAPTIONS)
    for row, word, patch in ((0, 3, 5), (0, 8, 15), (1, 2, 0), (1, 1, 9), (1, 0, 6)):
        ids, mask = tokens.ids[row], tokens.mask[row]
        hidden = ids.masked_fill(tokens.words[row] == word, mask_id)
        image, y, x = images[row].clone(), *(8 * each for each in divmod(patch, 4))
        image[:, y : y + 8, x : x + 8] = images[row].mean(dim=(1, 2))[:, None, None]
        with torch.no_grad():
            before = logit(images[row], ids, mask) - logit(images[row], hidden, mask)
            after = logit(image, ids, mask) - logit(image, hidden, mask)
        expected = F.relu(before - after)
        found = got.maps[row, word].flatten()[patch]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-6)


def test_a_caption_without_words_has_no_occlusion_maps(model, images):
    whole = word_maps(model, images, CAPTIONS, method="occlusion")
    got = word_maps(model, images, [CAPTIONS[0], ""], method="occlusion")
    torch.testing.assert_close(got.maps[0], whole.maps[0])
    assert not got.real[1].any() and not got.maps[1].any()


def test_maps_of_the_bundled_model_beat_a_random_order():
    trained = load_trained()
    scenes = [scene for scene in make_scenes("test", 16) if len(scene.things) == 2]
    texts = [captions(scene)[0].text for scene in scenes]
    images = torch.stack([trained.image_processor(render(scene, 60)) for scene in scenes])
    maps = word_maps(trained.model, images, texts).maps
    maps = (maps / maps.amax(dim=(2, 3), keepdim=True).clamp_min(1e-12)).sum(dim=1)
    own = deletion_insertion(trained.model, images, texts, maps, steps=6).areas
    random = torch.rand(maps.shape, generator=torch.Generator().manual_seed(0))
    other = deletion_insertion(trained.model, images, texts, random, steps=6).areas
    assert own[0].mean() < other[0].mean() - 0.1 and own[1].mean() > other[1].mean() + 0.1
