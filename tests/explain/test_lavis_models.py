"""LAVIS's own models, word by word, against LAVIS's compute_gradcam and its own forward passes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lavis.common.registry import registry
from lavis.models.albef_models.albef_retrieval import AlbefRetrieval
from lavis.models.blip2_models.blip2_image_text_matching import Blip2ITM
from lavis.models.blip_models.blip_image_text_matching import BlipITM, compute_gradcam
from lavis.models.blip_models.blip_retrieval import BlipRetrieval
from lavis.processors.blip_processors import BlipCaptionProcessor, BlipImageEvalProcessor
from omegaconf import OmegaConf
from PIL import Image
from toy_lavis import LAVIS, toy
from toy_models import matching_logits

from softmask_plugin import cli, launch
from softmask_plugin.config.paths import shipped
from softmask_plugin.errors import UserError
from softmask_plugin.explain import (
    Trained,
    explain,
    explain_image,
    load_trained,
    phrase_maps,
    word_maps,
)
from softmask_plugin.explain.gallery import Gallery, search_features
from softmask_plugin.explain.lavis_models import matcher_of
from softmask_plugin.explain.matcher import match_logit
from softmask_plugin.pointing import hits
from softmask_plugin.tasks.grounding import GroundingTask

CAPTIONS = ["a small red circle above a large blue star", "a black circlestar"]
FUSING = [cls for cls in LAVIS if cls is not Blip2ITM]  # their tokens attend to the image


@pytest.fixture(params=LAVIS, ids=lambda cls: cls.__name__)
def model(request):
    return toy(request.param)


class Door(torch.nn.Module):
    """Any of LAVIS's models as its compute_gradcam calls BLIP's."""

    def __init__(self, model):
        super().__init__()
        self.model, self.text_encoder = model, model.text_encoder

    def forward(self, samples, match_head):
        if isinstance(self.model, BlipITM):
            return self.model(samples, match_head=match_head)
        images, texts = samples["image"], samples["text_input"]
        if isinstance(self.model, BlipRetrieval):
            return BlipITM.forward(self.model, samples, match_head=match_head)
        tokens = matcher_of(self.model).tokenize(texts)
        return matching_logits(self.model, tokens, self.model.visual_encoder(images))


def score(model, images, captions):
    """The matching logits of LAVIS's own forward pass."""
    if isinstance(model, Blip2ITM):  # it does not pad
        pairs = zip(images, captions, strict=True)
        return torch.cat([model({"image": i[None], "text_input": [c]}) for i, c in pairs])
    return Door(model)({"image": images, "text_input": captions}, "itm")


@pytest.mark.parametrize("cls", FUSING)
@pytest.mark.parametrize("layer", [2, 3])
def test_maps_equal_lavis_compute_gradcam(cls, layer):
    """At the one size that it can do: 24 x 24 patches and 12 heads."""
    model = toy(cls, image=384, patch=16, heads=12)
    images = torch.randn(2, 3, 384, 384, generator=torch.Generator().manual_seed(3))
    tokens = model.tokenizer(CAPTIONS, padding="longest", return_tensors="pt")
    expected, logits = compute_gradcam(Door(model), images, CAPTIONS, tokens, block_num=layer)
    matcher = matcher_of(model)
    pairs = matcher.encode(images, matcher.tokenize(CAPTIONS))
    got, maps = matcher.token_maps(pairs, match_logit, layer, plain=False)
    torch.testing.assert_close(got, logits.detach())
    words = word_maps(model, images, CAPTIONS, layer=layer).maps
    assert words.shape == (2, 9, 24, 24)
    for row, found in enumerate(expected):
        found = found[2:]  # behind [ENC] and the mean over all tokens
        own = maps[row, 1:].unflatten(-1, (24, 24)) * tokens.attention_mask[row, 1:, None, None]
        torch.testing.assert_close(own, found, rtol=1e-4, atol=1e-5 * float(found.max()))
        assert found.max() > 0
        ids = pairs.captions.words[row, 1:]
        for word in range(int(ids.max()) + 1):
            torch.testing.assert_close(words[row, word], own[ids == word].mean(dim=0))
    assert (ids == 2).sum() > 1  # a word of several pieces


@pytest.mark.parametrize("cls", FUSING)
@pytest.mark.parametrize(("image", "patch", "heads"), [(32, 8, 4), (30, 10, 2)])
def test_maps_of_any_size_equal_lavis_own_gradients(cls, image, patch, heads):
    model = toy(cls, image, patch, heads)
    images = torch.randn(2, 3, image, image, generator=torch.Generator().manual_seed(3))
    layer = matcher_of(model).layer
    attention = Door(model).text_encoder.base_model.base_model.encoder.layer[layer]
    attention = attention.crossattention.self
    attention.save_attention = True
    score(model, images, CAPTIONS)[:, 1].sum().backward()
    grads, cams = attention.get_attn_gradients(), attention.get_attention_map()
    attention.save_attention = False
    expected = (grads.clamp(0) * cams)[..., 1:].mean(dim=1).unflatten(-1, (image // patch,) * 2)
    got = word_maps(model, images, CAPTIONS)
    torch.testing.assert_close(got.maps[0], expected[0, 1:10], rtol=1e-4, atol=1e-7)
    plain = word_maps(model, images, CAPTIONS, method="attention").maps
    mean = cams[0, :, 1:10, 1:].mean(dim=0).unflatten(-1, (image // patch,) * 2)
    torch.testing.assert_close(plain[0], mean)


def test_scores_equal_lavis_forward_passes(model, images):
    with torch.no_grad():
        expected = score(model, images, CAPTIONS)
    got = word_maps(model, images, CAPTIONS)
    torch.testing.assert_close(got.score, expected.softmax(dim=-1)[:, 1])
    assert (got.maps[got.real].amax(dim=(1, 2)) > 0).all() and (got.maps >= 0).all()


def test_masked_scores_are_of_masked_features(model, images, monkeypatch):
    (got,) = explain(model, images[:1], CAPTIONS[:1])
    assert got.words == CAPTIONS[0].split()
    last = model.ln_vision if isinstance(model, Blip2ITM) else model.visual_encoder.norm
    encode, keep = last.forward, torch.ones(1, 17, 1)
    monkeypatch.setattr(last, "forward", lambda x: encode(x) * keep)
    for mask, masked in zip(got.masks, got.masked_scores, strict=True):
        keep[0, 1:, 0] = 1 - mask.flatten()
        with torch.no_grad():
            expected = score(model, images[:1], CAPTIONS[:1]).softmax(dim=-1)[0, 1]
        assert masked.item() == pytest.approx(expected.item(), abs=1e-5)
    assert (got.masked_scores - got.score).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["gradcam", "attention", "occlusion"])
def test_the_model_is_left_as_it_was(model, images, method):
    model.train()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        word_maps(model, images, CAPTIONS, method=method)
    explain(model, images, CAPTIONS)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        for kept in ("attention_map", "attn_gradients"):
            assert getattr(module, kept, None) is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_frozen_weights_and_shared_images_change_nothing(model, images):
    free = word_maps(model, images, CAPTIONS)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    frozen = word_maps(model, images.flip(0), CAPTIONS, owners=torch.tensor([1, 0]))
    torch.testing.assert_close(frozen.maps, free.maps, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(frozen.score, free.score)


def test_a_caption_s_maps_do_not_depend_on_its_batch(model, images):
    both, alone = word_maps(model, images, CAPTIONS), word_maps(model, images[1:], CAPTIONS[1:])
    atol = 1e-6 * float(alone.maps.max())
    torch.testing.assert_close(both.maps[1:, :3], alone.maps, rtol=1e-3, atol=atol)


def test_a_caption_without_words_has_only_a_score(model, images):
    (got,) = explain(model, images[:1], [""])
    assert got.words == [] and got.masks.shape == (0, 4, 4) and 0 <= got.score <= 1
    both = word_maps(model, images, ["", "a ring"])
    assert both.real.tolist() == [[False, False], [True, True]] and (both.maps[0] == 0).all()


@pytest.mark.parametrize("layer", [1, 5, -1])
def test_a_layer_without_cross_attention_is_refused(images, layer):
    with pytest.raises(ValueError, match=f"layer {layer} has .* choose one from 2 to 4"):
        word_maps(toy(AlbefRetrieval), images, CAPTIONS, layer=layer)


@pytest.mark.parametrize("method", ["gradcam", "attention", "word", "occlusion"])
def test_lavis_albef_and_ours_have_the_same_maps(make_model, albef_twin, images, method):
    ours = make_model().eval()
    theirs = albef_twin(ours).eval()
    one, other = (word_maps(m, images, CAPTIONS, method=method) for m in (ours, theirs))
    torch.testing.assert_close(other.score, one.score)
    # Occlusion is a difference of four scores, so rounding shows
    atol = 1e-6 if method == "occlusion" else 1e-4 * float(one.maps.max())
    torch.testing.assert_close(other.maps, one.maps, rtol=1e-3, atol=atol)
    assert one.maps.max() > 0


@pytest.mark.parametrize("cls", [AlbefRetrieval, BlipITM, Blip2ITM])
def test_a_model_that_predicts_no_words_says_so(cls, images):
    with pytest.raises(UserError, match=f"{cls.__name__} predicts no masked words"):
        word_maps(toy(cls), images, CAPTIONS, method="word")


def test_long_captions_are_cut_as_lavis_cuts_them(model, images):
    model.max_txt_len = 6
    caption = " ".join(CAPTIONS)
    (got,) = explain(model, images[:1], [caption])
    assert got.words == ["a", "small", "red", "circle"] and got.kept == "a small red circle"
    with torch.no_grad():
        expected = score(model, images[:1], ["a small red circle"]).softmax(dim=-1)[0, 1]
    assert got.score == pytest.approx(expected.item(), abs=1e-5)


def test_a_picture_is_processed_as_lavis_does(model):
    pixels = torch.randint(0, 255, (40, 60, 3), dtype=torch.uint8).numpy()
    got = explain_image(pixels, "A small red circle!", model)
    image = BlipImageEvalProcessor(image_size=32)(Image.fromarray(pixels))
    (expected,) = explain(model, image[None], [BlipCaptionProcessor()("A small red circle!")])
    assert got.words == expected.words == ["a", "small", "red", "circle"]
    torch.testing.assert_close(got.cams, expected.cams)


# ---- loading


@pytest.fixture
def blip(monkeypatch, tmp_path):
    """A tiny ``blip_image_text_matching`` whose type ``tiny`` is found by name, and its weights."""
    made = toy(BlipITM)
    section = {"arch": "blip_image_text_matching", "finetuned": str(tmp_path / "tiny.pth")}
    torch.save({"model": made.state_dict()}, tmp_path / "tiny.pth")
    OmegaConf.save({"model": section, "preprocess": {}}, tmp_path / "tiny.yaml")
    types = {"tiny": str(tmp_path / "tiny.yaml")}
    monkeypatch.setattr(BlipITM, "PRETRAINED_MODEL_CONFIG_DICT", types)

    def from_config(cls, config):
        model = toy(cls)
        torch.nn.init.zeros_(model.itm_head.weight)
        model.load_checkpoint_from_config(config)
        return model

    monkeypatch.setattr(BlipITM, "from_config", classmethod(from_config))
    return made, tmp_path


@pytest.mark.parametrize("own", [False, True])
def test_the_command_explains_lavis_blip(blip, capsys, own):
    model, folder = blip
    pixels = torch.randint(0, 255, (40, 60, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(folder / "a.png")
    if own:  # a checkpoint that LAVIS's runner wrote
        torch.nn.init.normal_(model.itm_head.weight)
        torch.save({"model": model.state_dict(), "epoch": 1}, folder / "mine.pth")
    given = ["--image", str(folder / "a.png"), "--caption", "a red circle", "--json"]
    named = ["--model", "blip_image_text_matching", "--type", "tiny", "-o", str(folder / "b.png")]
    mine = ["--checkpoint", str(folder / "mine.pth")] if own else []
    assert cli.main(["explain", *given, *named, *mine]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = explain_image(pixels, "a red circle", model)
    assert found["score"] == pytest.approx(expected.score, abs=1e-5)
    assert [each["word"] for each in found["words"]] == ["a", "red", "circle"]


def test_weights_of_another_model_are_refused(blip):
    model, folder = blip
    state = {key: each for key, each in model.state_dict().items() if "layer.1.cross" not in key}
    torch.save({"model": state}, folder / "albef.pth")
    with pytest.raises(UserError, match="albef.pth is not of BlipITM: it lacks 10 .*layer.1.cross"):
        load_trained(folder / "albef.pth", "blip_image_text_matching", "tiny")
    state["itm_head.weight"] = torch.zeros(2, 5)
    torch.save({"model": state}, folder / "small.pth")
    with pytest.raises(UserError, match="the weights do not fit: .* size mismatch for itm_head"):
        load_trained(folder / "small.pth", "blip_image_text_matching", "tiny")
    with pytest.raises(UserError, match="unknown type 'tyny' .*did you mean 'tiny'"):
        load_trained(None, "blip_image_text_matching", "tyny")
    with pytest.raises(UserError, match="'base' of albef_pretrain comes without weights: .*ALBEF"):
        load_trained(None, "albef_pretrain", "base")


def test_offline_a_model_of_the_hub_is_one_line(monkeypatch):
    def refuse(*_, **__):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(BlipITM, "from_config", refuse)
    with pytest.raises(UserError, match=r"cannot build BlipITM: We couldn't connect to the hub"):
        load_trained(None, "blip_image_text_matching", "base")


def test_searching_needs_a_model_of_ours(blip):
    trained = Trained.of(blip[0])
    with pytest.raises(UserError, match="a BlipITM can be explained, but not searched with"):
        Gallery(trained, [])
    with pytest.raises(UserError, match="not searched with"):
        search_features(trained, Path("any.npz"), "a dog")


# ---- grounding


@torch.no_grad()
def test_the_grounding_task_scores_lavis_models(model, images, monkeypatch, tmp_path):
    monkeypatch.setitem(registry.mapping["paths"], "output_dir", str(tmp_path))
    monkeypatch.setitem(registry.mapping["paths"], "result_dir", str(tmp_path))
    boxes = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    phrases = [{"words": [3], "box": boxes[0], "group": []}]
    entries = [
        [{"box": boxes[0], "boxes": boxes, "group": "a"} for _ in CAPTIONS],
        [{"image": i, "boxes": boxes, "phrases": phrases} for i in "ab"],
    ]
    samples = {"image": images, "text_input": [CAPTIONS[0]] * 2, "index": torch.arange(2)}
    samples["instance_id"] = ["0", "1"]
    words = word_maps(model, images, samples["text_input"])
    expected = [phrase_maps(words), phrase_maps(words, [(0, [3]), (1, [3])])]
    for annotation, maps in zip(entries, expected, strict=True):
        task = GroundingTask(alpha=0.5)
        task.before_evaluation(model, SimpleNamespace(annotation=annotation))
        rows = task.valid_step(model, samples)
        hit, _ = hits(maps.numpy(), [boxes[0]] * 2)
        assert [row["hit"] for row in rows] == hit.tolist()
        metrics = task.after_evaluation(rows, "test")
        assert metrics["pointing"] == pytest.approx(100 * hit.mean())


# ---- BLIP-2


@pytest.fixture
def blip2():
    return toy(Blip2ITM)


def test_the_map_of_blip_2_is_the_slope_of_what_a_word_adds(blip2, images, monkeypatch):
    """Finite differences of LAVIS's own forward passes; its tokenizer knows [MASK]."""
    got = word_maps(blip2, images[:1], CAPTIONS[:1]).maps[0]
    encode, keep, words = blip2.ln_vision.forward, torch.ones(1, 17, 1), CAPTIONS[0].split()
    monkeypatch.setattr(blip2.ln_vision, "forward", lambda x: encode(x) * keep)

    @torch.no_grad()
    def adds(word):
        less = " ".join("[MASK]" if i == word else each for i, each in enumerate(words))
        whole, without = (score(blip2, images[:1], [text]) for text in (CAPTIONS[0], less))
        return float(whole[0, 1] - without[0, 1])

    for word in (1, 3, 8):
        for patch in range(0, 16, 3):
            sides = []
            for factor in (1.01, 0.99):
                keep[0, 1 + patch] = factor
                sides.append(adds(word))
            keep[0, 1 + patch] = 1
            slope = max(0, (sides[0] - sides[1]) / 0.02)
            assert got[word].flatten()[patch].item() == pytest.approx(slope, abs=1e-3)
    assert got[[1, 3, 8]].max() > 0.05


def test_the_plain_map_of_blip_2_goes_through_the_queries(blip2, images):
    got = word_maps(blip2, images, CAPTIONS[:1] * 2, method="attention")
    ids = blip2.tokenizer(CAPTIONS[:1] * 2, return_tensors="pt").input_ids
    with torch.no_grad():
        found = blip2.Qformer.bert(
            ids,
            query_embeds=blip2.query_tokens.expand(2, -1, -1),
            encoder_hidden_states=blip2.ln_vision(blip2.visual_encoder(images)),
            output_attentions=True,
            return_dict=True,
        )
    reads = sum(each.mean(dim=1) for each in found.attentions)
    looks = sum(each.mean(dim=1) for each in found.cross_attentions[::2])  # layers 0, 2 and 4
    for word in range(9):
        expected = sum(
            reads[:, query, 6 + 1 + word, None] * looks[:, query, 1:] for query in range(6)
        )
        torch.testing.assert_close(got.maps[:, word].flatten(1), expected)


def test_blip_2_has_no_layer_of_its_own(blip2, images):
    with pytest.raises(UserError, match="BLIP-2 comes from all layers"):
        word_maps(blip2, images, CAPTIONS, layer=2)


def test_maps_of_blip_2_foretell_what_painting_over_a_patch_costs():
    """Deletion of one patch at a time: closer to it than plain attention and than chance."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    texts = [*CAPTIONS, "a green square", "there is a ring"]
    agreement = {"gradcam": [], "attention": [], "chance": []}
    for seed in range(3):  # in one random model, attention may agree by chance
        blip2 = toy(Blip2ITM, seed=seed)
        cost = word_maps(blip2, images, texts, method="occlusion")
        maps = {
            "chance": torch.rand(cost.maps.shape, generator=torch.Generator().manual_seed(seed))
        }
        for method in ("gradcam", "attention"):
            maps[method] = word_maps(blip2, images, texts, method=method).maps
        for method, found in maps.items():
            for pair in zip(found[cost.real], cost.maps[cost.real], strict=True):
                rows = torch.stack(pair).flatten(1)
                agreement[method].append(torch.corrcoef(rows)[0, 1].item())
    ours, plain, chance = (torch.tensor(each).nanmean() for each in agreement.values())
    assert ours > 0.4 > 0.2 > max(plain, chance)


def test_the_grounding_run_of_a_lavis_model(blip, monkeypatch):
    monkeypatch.chdir(blip[1])
    data = "datasets.scenes_grounding"
    options = ["model.arch=blip_image_text_matching", "model.model_type=tiny", "run.device=cpu"]
    options += [f"{data}.num.test=4", f"{data}.vis_processor.eval.image_size=32"]
    _, results = launch.run(shipped("projects/scenes/eval/grounding_tiny.yaml"), options, True)
    assert results["test"]["pointing_chance"] > 0
