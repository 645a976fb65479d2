"""BLIP: with all innovations off LAVIS's blip_retrieval and blip_pretrain."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from toy_models import (
    BLIP,
    CAPTIONS,
    LOSSES,
    TWINS,
    assert_same_gradients,
    assert_same_step,
    plain_bert,
)

from benchmarks import baseline
from benchmarks.ranks import on_ranks
from softmask_plugin.errors import UserError
from softmask_plugin.explain import word_maps
from softmask_plugin.losses import local_contrast, local_contrast_across
from softmask_plugin.models import SoftMaskBlipPretrain, SoftMaskBlipRetrieval
from softmask_plugin.nn import sampling
from softmask_plugin.soft_mask import keep_factors, normalize, word_map

OFF = {"soft_mask": {"enabled": False}, "itc": {"gamma": 0.0}}


pytestmark = pytest.mark.usefixtures("same_negatives")


@pytest.fixture
def make_blip(make_other):
    """Build a small model of BLIP's shape, all innovations off: ``make_blip(cls, ...)``."""

    def make(cls, **changes):
        bert = {"layers": 3, **changes.pop("bert", {})}
        return make_other(cls, **{**OFF, **changes}, bert=bert)

    return make


def make_batch(ids, step=0, epoch=1):
    generator = torch.Generator().manual_seed(step)
    return {
        "image": torch.randn(len(ids), 3, 32, 32, generator=generator),
        "text_input": CAPTIONS[: len(ids)],
        "image_id": torch.tensor(ids),
        **{"epoch": epoch, "iters": 2, "num_iters_per_epoch": 5},
    }


@pytest.mark.parametrize("epoch", [0, 1, 4])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [7, 3, 7, 7, 1, 3], [1, 0]])
def test_retrieval(make_blip, ids, epoch):
    ours = make_blip(SoftMaskBlipRetrieval)
    theirs = baseline.blip_retrieval(ours)
    for step in range(2):  # in the second the queue knows images of the first
        assert_same_step(ours, theirs, make_batch(ids, step, epoch))


@pytest.mark.parametrize("epoch", [0, 1, 4])
@pytest.mark.parametrize("size", [2, 3, 6])
def test_pretrain(make_blip, size, epoch):
    ours = make_blip(SoftMaskBlipPretrain)
    theirs = baseline.blip_pretrain(ours)
    for step in range(2):
        assert_same_step(ours, theirs, make_batch(range(size), step, epoch))


@pytest.mark.parametrize("cls", BLIP)
def test_negatives_are_as_likely_as_in_lavis(make_blip, monkeypatch, cls):
    ours = make_blip(cls, temp=0.02)  # so peaked that the least likely matter
    drawn = []

    def first(weights, generator=None):
        drawn.append(weights / weights.sum(-1, keepdim=True))
        return torch.zeros(weights.shape[:-1], dtype=torch.long)

    monkeypatch.setattr(sampling, "draw_one", first)
    monkeypatch.setattr(torch, "multinomial", lambda weights, n: first(weights)[..., None])
    TWINS[cls](ours).train()(make_batch([4, 2, 4, 1, 3, 0]))
    expected = torch.stack(drawn).unflatten(0, (2, 6))
    drawn.clear()
    ours.train()(make_batch([4, 2, 4, 1, 3, 0]))
    torch.testing.assert_close(torch.stack(drawn), expected, rtol=1e-4, atol=1e-7)
    assert (expected[0, 0] == 0).sum() == (2 if cls is SoftMaskBlipRetrieval else 1)


def test_two_ranks_draw_negatives_from_each_other(make_blip):
    """With ``negative_all_rank``; gradients are compared after averaging, as DDP does."""

    def losses(rank):
        return [assert_same_on_rank(make_blip, rank, everywhere) for everywhere in (True, False)]

    for ended in on_ranks(2, losses):
        assert not ended.error, ended.error
        assert ended.result[0] != ended.result[1]  # other negatives


def assert_same_on_rank(make_blip, rank, negative_all_rank):
    ours = make_blip(SoftMaskBlipRetrieval, negative_all_rank=negative_all_rank).train()
    theirs = baseline.blip_retrieval(ours).train()
    batch = make_batch([[4, 1, 4], [3, 4, 5]][rank], rank)
    batch["text_input"] = [CAPTIONS[:3], CAPTIONS[3:][::-1]][rank]  # of another length
    expected, got = theirs(dict(batch)), ours(dict(batch))
    for output in (expected, got):
        output["loss"].backward()
    for name in ("loss", "loss_itc", "loss_itm"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)
    names = [name for name, _ in ours.named_parameters()]
    gradients = [
        torch.cat([model.get_parameter(name).grad.flatten() for name in names])
        for model in (theirs, ours)
    ]
    for each in gradients:
        dist.all_reduce(each)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    for name, tensor in theirs.state_dict().items():
        own = ours.state_dict()[name]
        torch.testing.assert_close(own, tensor, rtol=1e-6, atol=1e-6, msg=name)
    return float(got["loss_itm"].detach())


# ---- the soft mask, against autograd through LAVIS's modules


class Plain:
    """LAVIS's BLIP, a pass for each kind of pair."""

    def __init__(self, theirs, ours, batch) -> None:
        self.theirs, tokens = theirs, ours.caption_tokenizer.tokenize(batch["text_input"])
        self.mask, self.ids = tokens.mask.long(), tokens.ids.clone()
        self.words = tokens.words
        self.image = theirs.visual_encoder(batch["image"])

    def seen(self, image):
        return {
            "encoder_hidden_states": image,
            "encoder_attention_mask": torch.ones(image.shape[:2], dtype=torch.long),
            "return_dict": True,
        }

    def match(self, image, texts=slice(None)):
        """Matching logits of images and captions."""
        ids = self.ids[texts].clone()
        ids[:, 0] = self.theirs.tokenizer.enc_token_id
        fused = self.theirs.text_encoder(
            ids, attention_mask=self.mask[texts], **self.seen(image)
        ).last_hidden_state
        return self.theirs.itm_head(fused[:, 0])

    def match_map(self, layer):
        """Grad-CAM of the match, (B, T, patches)."""
        attention = self.theirs.text_encoder.encoder.layer[layer].crossattention.self
        attention.save_attention = True
        score = self.match(self.image.detach())[:, 1].sum()
        attention.save_attention = False
        probabilities = attention.get_attention_map()
        (gradient,) = torch.autograd.grad(score, probabilities)
        return (gradient.relu() * probabilities)[..., 1:].mean(dim=1).detach()

    def word_map(self, word):
        """Gradient of each picked word's log-probability, given those before it, (B, patches)."""
        ids = self.ids.clone()
        ids[:, 0] = self.theirs.tokenizer.bos_token_id
        keep = torch.ones(self.image.shape[:2], requires_grad=True)
        masked = self.image.detach() * keep[:, :, None]
        logits = self.theirs.text_decoder(ids, attention_mask=self.mask, **self.seen(masked)).logits
        likely = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
        chosen = self.words[:, 1:] == word[:, None]
        (gradient,) = torch.autograd.grad((likely * chosen).sum(), keep)
        return gradient[:, 1:].relu()

    def aligned(self):
        """Unit vectors of tokens and patches, as ITC compares texts and images."""
        states = self.theirs.text_encoder(
            self.ids, attention_mask=self.mask, return_dict=True, mode="text"
        ).last_hidden_state
        words, patches = self.theirs.text_proj(states), self.theirs.vision_proj(self.image[:, 1:])
        return F.normalize(words, dim=-1), F.normalize(patches, dim=-1)

    def similarity_map(self):
        """Softmax over patches of each token's cosines, (B, T, patches)."""
        words, patches = self.aligned()
        return (words @ patches.transpose(1, 2) / self.theirs.temp).softmax(dim=-1).detach()

    def local_loss(self, negatives="pair"):
        """The contrast of words with patches."""
        words, patches = self.aligned()
        words, mask = words[:, 1:], self.mask[:, 1:] > 0
        if negatives == "pair":
            return local_contrast(words, patches, mask, self.theirs.temp)
        rows = mask.nonzero()[:, 0]
        return local_contrast_across(words[mask], patches, rows, rows >= 0, self.theirs.temp)


@pytest.mark.parametrize(
    ("cls", "mask"),
    [
        (SoftMaskBlipRetrieval, {"negatives": True}),
        (SoftMaskBlipRetrieval, {"kind": "hard", "words": "energy", "layer": 0, "weight": 0.5}),
        (SoftMaskBlipPretrain, {"strength": 0.7}),
        (SoftMaskBlipPretrain, {"score": "word", "negatives": True, "words": "content"}),
        (SoftMaskBlipPretrain, {"score": "similarity", "negatives": True}),
        (SoftMaskBlipRetrieval, {"score": "similarity"}),
    ],
)
def test_the_soft_mask_equals_its_definition(make_blip, cls, mask):
    local_weight = 0.5 * (mask.get("score") == "similarity")
    ours = make_blip(cls, soft_mask={"enabled": True, **mask}, local_weight=local_weight)
    theirs, batch = TWINS[cls](ours).train(), make_batch([4, 2, 4, 1, 3, 0])
    drawn, negatives = [], ours.negatives
    ours.negatives = lambda *given: drawn.append(negatives(*given)) or drawn[0]
    plain, expected = Plain(theirs, ours, batch), theirs(dict(batch))
    got = ours.train()(dict(batch))

    word, option = got["word"], ours.options.soft_mask
    assert (word >= 0).all()
    if option.score == "word":
        maps = plain.word_map(word)
    elif option.score == "similarity":
        maps = word_map(plain.similarity_map(), plain.words, word)
    else:
        maps = word_map(plain.match_map(option.layer), plain.words, word)
    keep = keep_factors(normalize(maps), option.kind, option.strength)
    torch.testing.assert_close(got["keep"], keep, rtol=1e-3, atol=1e-4)

    masked = plain.image * got["keep"][:, :, None]
    logits = [plain.match(masked)]
    if option.negatives:
        logits.append(plain.match(masked, drawn[0][1]))
    labels = torch.cat([torch.full((6,), label) for label in (1, 0)[: len(logits)]])
    soft = torch.nn.functional.cross_entropy(torch.cat(logits), labels)
    torch.testing.assert_close(got["loss_soft"], soft, rtol=1e-5, atol=1e-5)
    total = expected["loss"] + option.weight * soft
    if local_weight:
        total = total + local_weight * plain.local_loss()
    torch.testing.assert_close(got["loss"], total, rtol=1e-5, atol=1e-5)
    for loss in (got["loss"], total):
        loss.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("negatives", ["pair", "batch"])
@pytest.mark.parametrize("cls", BLIP)
def test_words_are_contrasted_with_patches(make_blip, cls, negatives):
    ours = make_blip(cls, local_weight=0.5, local_negatives=negatives).eval()
    theirs, batch = TWINS[cls](ours).eval(), make_batch([4, 2, 4, 1, 3, 0])
    got, expected = ours(dict(batch)), Plain(theirs, ours, batch).local_loss(negatives)
    torch.testing.assert_close(got["loss_local"], expected)
    gradients = {}
    for model, loss in ((ours, got["loss_local"]), (theirs, expected)):
        loss.backward()
        gradients[model] = model.text_proj.weight.grad
    torch.testing.assert_close(gradients[ours], gradients[theirs], rtol=1e-4, atol=1e-5)
    others = sum(value for name, value in theirs(dict(batch)).items() if name in LOSSES[1:])
    torch.testing.assert_close(got["loss"], others + 0.5 * expected)


def test_words_are_explained_by_the_same_map(make_blip):
    ours = make_blip(SoftMaskBlipRetrieval, soft_mask={"enabled": False, "layer": 1}).eval()
    batch = make_batch([4, 2, 4, 1, 3, 0])
    plain = Plain(baseline.blip_retrieval(ours).eval(), ours, batch)
    found = word_maps(ours, batch["image"], batch["text_input"])
    torch.testing.assert_close(found.score, plain.match(plain.image).softmax(dim=1)[:, 1])
    cam = plain.match_map(1)
    for number in range(plain.words.max() + 1):
        expected = word_map(cam, plain.words, torch.full((6,), number)).view(6, 4, 4)
        torch.testing.assert_close(found.maps[:, number], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("cls", BLIP)
def test_a_word_is_explained_by_the_patches_that_are_like_it(make_blip, cls):
    ours = make_blip(cls, local_weight=0.5).eval()
    batch = make_batch([4, 2, 4, 1, 3, 0])
    plain = Plain(TWINS[cls](ours).eval(), ours, batch)
    owners = torch.tensor([0, 1, 2, 3, 4, 5])
    found = word_maps(ours, batch["image"], batch["text_input"], owners, method="similarity")
    for number in range(plain.words.max() + 1):
        expected = word_map(plain.similarity_map(), plain.words, torch.full((6,), number))
        torch.testing.assert_close(found.maps[:, number], expected.view(6, 4, 4))
    with pytest.raises(UserError, match="compares no words with patches"):
        word_maps(make_blip(cls).eval(), batch["image"], batch["text_input"], method="similarity")


def test_a_word_is_explained_by_its_prediction(make_blip):
    ours = make_blip(SoftMaskBlipPretrain, soft_mask={"score": "word"}).eval()
    batch = make_batch([4, 2, 4, 1, 3, 0])
    plain = Plain(baseline.blip_pretrain(ours).eval(), ours, batch)
    found = word_maps(ours, batch["image"], batch["text_input"])
    torch.testing.assert_close(found.score, plain.match(plain.image).softmax(dim=1)[:, 1])
    for number in range(plain.words.max() + 1):
        expected = plain.word_map(torch.full((6,), number)).view(6, 4, 4)
        torch.testing.assert_close(found.maps[:, number], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("score", ["match", "word"])
def test_a_mask_before_it_starts_and_a_batch_of_one_are_fine(make_blip, score):
    mask = {"enabled": True, "score": score, "start_iter": 5, "negatives": True}
    ours = make_blip(SoftMaskBlipPretrain, soft_mask=mask, itc={"gamma": 2.0}, itm_words=True)
    early = ours(make_batch([0, 1], epoch=0))
    assert early.loss.isfinite() and early.keep is None
    late = ours(make_batch([0]))
    assert late.loss.isfinite() and late.loss_soft.isfinite() and late.keep.shape == (1, 17)


@pytest.mark.parametrize("score", ["match", "word"])
def test_a_batch_without_a_word_to_write_is_finite(make_blip, score):
    ours = make_blip(SoftMaskBlipPretrain, soft_mask={"enabled": True, "score": score}).train()
    ours.caption_tokenizer.sep_token = False
    found = ours({**make_batch([0, 1, 2]), "text_input": ["", "", ""]})
    assert found.loss.isfinite() and found.loss_lm == 0 and (found.keep == 1).all()
    found.loss.backward()


@pytest.mark.parametrize("score", ["match", "word"])
def test_a_caption_without_a_word_to_pick_is_not_masked(make_blip, score):
    mask = {"enabled": True, "score": score, "words": "content"}
    ours = make_blip(SoftMaskBlipPretrain, soft_mask=mask).train()
    found = ours({**make_batch([0, 1]), "text_input": ["a", CAPTIONS[1]]})
    assert found.word[0] == -1 and (found.keep[0] == 1).all()
    assert found.word[1] >= 0 and (found.keep[1] < 1).any()


# ---- options


@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (SoftMaskBlipRetrieval, {"bert": {"fusion_layer": 2}}, "fusion_layer is 2: all layers"),
        (SoftMaskBlipRetrieval, {"soft_mask": {"score": "word"}}, "score is 'word': .* no MLM"),
        (SoftMaskBlipRetrieval, {"soft_mask": {"in_mlm": True}}, "in_mlm is true: .* no MLM"),
        (SoftMaskBlipPretrain, {"soft_mask": {"in_mlm": True}}, "in_mlm is true: .* no MLM"),
        (
            SoftMaskBlipPretrain,
            {"soft_mask": {"score": "similarity"}},
            "score is 'similarity', but nothing makes BLIP's words",
        ),
        (SoftMaskBlipPretrain, {"soft_mask": {"layer": 2}}, "layer is 2: choose from 0 to 1"),
    ],
)
def test_an_option_that_blip_does_not_have_is_named(make_blip, cls, changes, message):
    with pytest.raises(UserError, match=f"^model.*{message}"):
        make_blip(cls, **changes)


@pytest.mark.parametrize(("layers", "layer"), [(12, 7), (9, 7), (8, 6), (3, 1)])
def test_the_map_layer_is_that_of_lavis_grad_cam_but_never_the_last(make_blip, layers, layer):
    model = make_blip(SoftMaskBlipRetrieval, bert={"layers": layers})
    assert model.options.soft_mask.layer == layer


# ---- weights


def test_retrieval_starts_from_a_pretrained_model_and_its_vocabulary(make_blip, tmp_path, caplog):
    donor = make_blip(SoftMaskBlipPretrain)
    torch.save(donor.state_dict(), tmp_path / "blip.pth")
    model = make_blip(SoftMaskBlipRetrieval, seed=1)
    with caplog.at_level(logging.INFO):
        model.load_checkpoint(str(tmp_path / "blip.pth"))
    given = donor.state_dict()
    kept = model.state_dict()
    assert all(torch.equal(kept[key], given[key]) for key in kept if key != "idx_queue")
    assert "left as they were: idx_queue; not used: text_decoder" in caplog.text


def test_layers_are_not_doubled(make_blip, tmp_path):
    half = make_blip(SoftMaskBlipRetrieval, bert={"layers": 2})
    torch.save({"model": half.state_dict()}, tmp_path / "half.pth")
    whole = make_blip(SoftMaskBlipRetrieval, bert={"layers": 4})
    with pytest.raises(UserError, match=r"layer\.2\..* is none in the file"):
        whole.load_from_pretrained(str(tmp_path / "half.pth"))


def test_a_bert_lacks_two_tokens_which_stay_new(make_blip, tmp_path):
    shape = make_blip(SoftMaskBlipPretrain).bert.shape
    bert = plain_bert(replace(shape, vocab_size=shape.vocab_size - 2))
    bert.save_pretrained(tmp_path)
    model = make_blip(SoftMaskBlipPretrain, seed=1, bert_weights=str(tmp_path))
    new = model.bert.embeddings.word_embeddings.weight[-2:].clone()
    model.load_encoders()
    words = model.bert.embeddings.word_embeddings.weight
    assert torch.equal(words[:-2], bert.bert.embeddings.word_embeddings.weight)
    assert torch.equal(words[-2:], new)
    assert model.text_decoder.cls.predictions.decoder.weight is words
    for own in (model.bert, model.text_decoder.bert, model.text_encoder_m):
        query = own.encoder.layer[2].attention.self.query.weight
        assert torch.equal(query, bert.bert.encoder.layer[2].attention.self.query.weight)
    model.tokenizer.add_tokens("another")
    with pytest.raises(UserError, match="set model.vit, model.bert and model.tokenizer"):
        model.load_encoders()
    broken = {"bert.embeddings.word_embeddings.weight": torch.tensor(1.0)}
    bert.save_pretrained(tmp_path, state_dict={**bert.state_dict(), **broken})
    with pytest.raises(UserError, match="set model.vit, model.bert and model.tokenizer"):
        model.load_encoders()
