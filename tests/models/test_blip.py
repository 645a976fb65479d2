"""BLIP: with all innovations off LAVIS's blip_retrieval and blip_pretrain."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from toy_models import CAPTIONS

from benchmarks import baseline
from benchmarks.ranks import on_ranks
from softmask_plugin.models import SoftMaskBlipPretrain, SoftMaskBlipRetrieval
from softmask_plugin.soft_mask import keep_factors, normalize, word_map

TWINS = {
    SoftMaskBlipRetrieval: baseline.blip_retrieval,
    SoftMaskBlipPretrain: baseline.blip_pretrain,
}
OFF = {"soft_mask": {"enabled": False}, "itc": {"gamma": 0.0}}
LOSSES = ("loss", "loss_itc", "loss_itm", "loss_lm")


@pytest.fixture(autouse=True)
def same_negatives(monkeypatch):
    """LAVIS draws negatives from the global generator: let both take those at the 0.3 quantile."""

    def quantile(weights, n, generator=None):
        assert n == 1
        return (weights.cumsum(-1) < 0.3 * weights.sum(-1, keepdim=True)).sum(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", quantile)


@pytest.fixture
def make_blip(make_other):
    """Build a small model of BLIP's shape, all innovations off: ``make_blip(cls, ...)``."""

    def make(cls, **changes):
        bert = {"fusion_layer": 0, "layers": 3, **changes.pop("bert", {})}
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


def assert_same_step(ours, theirs, batch):
    """Equal losses, gradients and, after the momentum model's update, state."""
    for model in (ours, theirs):
        model.train().zero_grad()
    expected, got = theirs(dict(batch)), ours(dict(batch))
    for name in LOSSES:
        if name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)
    assert got.keys() - {"loss"} == {key for key in LOSSES[1:] if key in expected}
    expected["loss"].backward()
    got["loss"].backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters(remove_duplicate=False)}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    state = ours.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


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


@pytest.mark.parametrize("cls", TWINS)
def test_negatives_are_as_likely_as_in_lavis(make_blip, monkeypatch, cls):
    ours = make_blip(cls, temp=0.02)  # so peaked that the least likely matter
    drawn = []

    def first(weights, n, generator=None):
        drawn.append(weights / weights.sum(-1, keepdim=True))
        return torch.zeros(*weights.shape[:-1], 1, dtype=torch.long)

    monkeypatch.setattr(torch, "multinomial", first)
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


@pytest.mark.parametrize(
    ("cls", "mask"),
    [
        (SoftMaskBlipRetrieval, {"negatives": True}),
        (SoftMaskBlipRetrieval, {"kind": "hard", "words": "energy", "layer": 0, "weight": 0.5}),
        (SoftMaskBlipPretrain, {"strength": 0.7}),
        (SoftMaskBlipPretrain, {"score": "word", "negatives": True, "words": "content"}),
    ],
)
def test_the_soft_mask_equals_its_definition(make_blip, cls, mask):
    ours = make_blip(cls, soft_mask={"enabled": True, **mask})
    theirs, batch = TWINS[cls](ours).train(), make_batch([4, 2, 4, 1, 3, 0])
    drawn, negatives = [], ours.negatives
    ours.negatives = lambda *given: drawn.append(negatives(*given)) or drawn[0]
    plain, expected = Plain(theirs, ours, batch), theirs(dict(batch))
    got = ours.train()(dict(batch))

    word, option = got["word"], ours.options.soft_mask
    assert (word >= 0).all()
    if option.score == "word":
        maps = plain.word_map(word)
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
    torch.testing.assert_close(got["loss"], total, rtol=1e-5, atol=1e-5)
    for loss in (got["loss"], total):
        loss.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters(remove_duplicate=False)}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
