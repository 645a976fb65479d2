"""Maps of a word's own score against autograd through LAVIS's modules, word by word."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from toy_models import SMALL

from softmask_plugin.errors import UserError
from softmask_plugin.explain.maps import word_maps
from softmask_plugin.explain.pairs import explain
from softmask_plugin.models.features import SoftMaskFeatureExtractor
from softmask_plugin.models.matching import SoftMaskImageTextMatching

CAPTIONS = ["a small red circle above a large blue star", "a heart", "zzyx!"]


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("image_cls", [True, False])
def test_each_word_is_hidden_and_predicted(make_model, albef_twin, images, image_cls):
    bert = {**SMALL["bert"], "image_cls": image_cls}
    model = make_model(soft_mask={"score": "word"}, bert=bert).eval()
    twin, got = albef_twin(model).eval(), word_maps(model, images, CAPTIONS)
    tokens = model.tokenize(CAPTIONS)
    seen = torch.ones(1, 17, dtype=torch.long)
    seen[:, 0] = int(image_cls)
    for row, words in enumerate(tokens.words):
        for word in range(int(words.max()) + 1):
            hidden = words == word
            ids = tokens.ids[row].masked_fill(hidden, model.tokenizer.mask_token_id)[None]
            mask = tokens.mask[row : row + 1].long()
            with torch.no_grad():
                text = twin.text_encoder.bert(
                    ids, attention_mask=mask, return_dict=True, mode="text"
                ).last_hidden_state
                states = twin.visual_encoder(images[row : row + 1])
            keep = torch.ones(1, 17, requires_grad=True)
            fused = twin.text_encoder.bert(
                encoder_embeds=text,
                attention_mask=mask,
                encoder_hidden_states=states * keep[:, :, None],
                encoder_attention_mask=seen,
                return_dict=True,
                mode="fusion",
            ).last_hidden_state
            likely = twin.text_encoder.cls(fused)[0].log_softmax(dim=-1)
            score = likely.gather(1, tokens.ids[row][:, None])[hidden].sum()
            (gradient,) = torch.autograd.grad(score, keep)
            expected = gradient[0, 1:].clamp_min(0).view(4, 4)
            torch.testing.assert_close(got.maps[row, word], expected, rtol=1e-3, atol=1e-5)
        assert got.real[row].sum() == word + 1 and (got.maps[row, word + 1 :] == 0).all()


def test_similarity_maps_are_softmaxes_of_cosines(make_model, albef_twin, images):
    model = make_model(soft_mask={"score": "similarity"}).eval()
    twin, owners = albef_twin(model).eval(), [2, 0, 0]
    got, tokens = word_maps(model, images, CAPTIONS, torch.tensor(owners)), model.tokenize(CAPTIONS)
    asked = word_maps(
        make_model().eval(), images, CAPTIONS, torch.tensor(owners), method="similarity"
    )
    assert torch.equal(asked.maps, got.maps)
    with torch.no_grad():
        for row, image in enumerate(owners):
            ids, mask = tokens.ids[row : row + 1], tokens.mask[row : row + 1].long()
            text = twin.text_encoder.bert(ids, attention_mask=mask, return_dict=True, mode="text")
            patches = twin.vision_proj(twin.visual_encoder(images[image : image + 1])[0, 1:])
            for word in range(int(tokens.words[row].max()) + 1):
                states = twin.text_proj(text.last_hidden_state[0, tokens.words[row] == word])
                near = [F.cosine_similarity(each, patches) / model.temp for each in states]
                expected = torch.stack([each.softmax(dim=0) for each in near]).mean(dim=0)
                torch.testing.assert_close(got.maps[row, word], expected.view(4, 4))


def test_the_score_is_that_of_the_whole_caption(make_model, images):
    match = word_maps(make_model().eval(), images, CAPTIONS)
    own = word_maps(make_model(soft_mask={"score": "word"}).eval(), images, CAPTIONS)
    torch.testing.assert_close(own.score, match.score)
    assert not torch.allclose(own.maps, match.maps)


@pytest.mark.parametrize("cls", [SoftMaskImageTextMatching, SoftMaskFeatureExtractor])
def test_inference_models_have_the_maps_of_pretraining(make_model, make_other, images, cls):
    trained = make_model(soft_mask={"score": "word"}).eval()
    model = make_other(cls, map_score="word").eval()
    missing, _ = model.load_state_dict(trained.state_dict(), strict=False)
    assert not missing
    for one, other in zip(*(explain(m, images, CAPTIONS) for m in (trained, model)), strict=True):
        torch.testing.assert_close(one.cams, other.cams)
        torch.testing.assert_close(one.masked_scores, other.masked_scores)


def test_without_an_mlm_head_the_maps_explain_the_match(
    make_model, make_other, images, tmp_path, caplog
):
    state = make_model().state_dict()
    headless = {key: value for key, value in state.items() if ".cls." not in key}
    for name, content, score in (("whole", state, "word"), ("headless", headless, "match")):
        torch.save({"model": content}, tmp_path / f"{name}.pth")
        model = make_other(SoftMaskImageTextMatching, map_score="word")
        model.load_from_pretrained(tmp_path / f"{name}.pth")
        assert model.options.map_score == score
    assert "headless.pth has no MLM head: word maps explain the match" in caplog.text
    with pytest.raises(UserError, match="predicts no masked words"):
        word_maps(model.eval(), images, CAPTIONS, method="word")
