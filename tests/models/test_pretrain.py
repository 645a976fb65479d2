"""softmask_pretrain's behaviour: switches, edges, precision, state, several ranks."""

from __future__ import annotations

import copy
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from toy_models import CAPTIONS, SMALL, record

from benchmarks.ranks import on_ranks
from softmask_plugin.losses import local_contrast, local_contrast_across
from softmask_plugin.models import contrastive
from softmask_plugin.nn.sampling import Draws

DRAWN = ("tokenize_masked", "negatives", "draw_mask")


def losses(out):
    return {name: out[name] for name in out if name.startswith("loss")}


def assert_sound(model, out):
    """Check that losses and gradients are finite."""
    assert all(term.isfinite() for term in losses(out).values()), losses(out)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def moved(model, before):
    """Names of the tensors that changed."""
    return {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}


def lead_away(model):
    """Change the online encoders, so that an update of the momentum encoders shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return model


# ---- switches

EVERYTHING = {"mask_prob": 0.4}


@pytest.mark.parametrize(
    "change",
    [
        {"soft_mask": {"enabled": False}},
        {"itc": {"gamma": 0.0}},
        {"text": {"shared": False, **EVERYTHING}},
        {"soft_mask": {"in_mlm": True}},
        {"soft_mask": {"kind": "random"}},
        {"itm_words": True},
        {"vit": {**SMALL["vit"], "patch_dropout": 0.5}},
    ],
    ids=["no mask", "no focus", "clean text", "in_mlm", "random", "itm_words", "patch dropout"],
)
def test_switching_one_innovation_leaves_the_draws_of_the_others(
    make_model, make_batch, monkeypatch, change
):
    from softmask_plugin.models.contrastive import Similarity

    drawn = []
    similarity = Similarity(torch.eye(6), torch.eye(6), torch.eye(6, dtype=torch.bool))
    for changes in ({"text": EVERYTHING}, {"text": EVERYTHING, **change}):
        model = make_model(**changes)
        # Fixed similarities: the draws alone are compared, not what they are drawn from
        monkeypatch.setattr(
            type(model), "contrast", lambda self, online, *_: (online.image_feat.sum(), similarity)
        )
        drawn.append(record(model, *DRAWN))
        model(make_batch(6))
    for a, b in zip(*(d["negatives"] for d in drawn), strict=True):
        assert torch.equal(a, b)
    texts = [d["tokenize_masked"] for d in drawn]
    assert torch.equal(texts[0].ids[-6:], texts[1].ids[-6:])  # the masked captions
    assert torch.equal(texts[0].masked.index, texts[1].masked.index)
    if "draw_mask" in drawn[1] and "text" not in change:
        assert torch.equal(drawn[0]["draw_mask"].word, drawn[1]["draw_mask"].word)


def test_each_innovation_brings_its_terms(make_model, make_batch):
    def terms(**changes):
        return set(losses(make_model(**changes)(make_batch(4))))

    plain = {"loss", "loss_itc", "loss_itm", "loss_mlm"}
    assert terms(soft_mask={"enabled": False}) == plain
    assert terms() == plain | {"loss_soft"}
    assert terms(soft_mask={"in_mlm": True}) == plain | {"loss_soft", "loss_mlm_soft"}
    assert terms(local_weight=0.1) == plain | {"loss_soft", "loss_local"}


def test_the_mask_starts_at_its_iteration(make_model, make_batch):
    model = make_model(soft_mask={"start_iter": 8})  # steps per epoch: 5
    assert model(make_batch(4, epoch=1, iters=2)).loss_soft is None
    assert model(make_batch(4, epoch=1, iters=3)).loss_soft is not None
    free = make_model(soft_mask={"start_iter": 2})  # a loop that counts nothing: by calls
    batch = {k: v for k, v in make_batch(4).items() if k in ("image", "text_input")}
    assert [free(batch).loss_soft is None for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("words", ["uniform", "content", "energy"])
@pytest.mark.parametrize("kind", ["soft", "hard", "random", "uniform"])
def test_every_kind_of_mask_does_what_it_says(make_model, make_batch, kind, words):
    out = make_model(soft_mask={"kind": kind, "words": words})(make_batch(6))
    keep = out.keep
    assert keep.shape == (6, 17) and (keep[:, 0] == 1).all() and (out.word >= 0).all()
    patches = keep[:, 1:]
    if kind == "hard":
        assert set(patches.unique().tolist()) == {0.0, 1.0}
    elif kind == "uniform":
        assert (patches == patches[:, :1]).all() and ((patches > 0) & (patches < 1)).all()
    else:
        low, high = patches.aminmax(dim=1)
        torch.testing.assert_close(low, torch.zeros(6))
        torch.testing.assert_close(high, torch.ones(6))
    assert out.loss_soft.isfinite()


def test_kinds_mask_the_same_amount(make_model, make_batch):
    masks = {
        kind: make_model(soft_mask={"kind": kind})(make_batch(6)).keep
        for kind in ("soft", "random", "uniform")
    }
    for keep in masks.values():
        torch.testing.assert_close(keep.sum(dim=1), masks["soft"].sum(dim=1))
    assert not torch.equal(masks["random"], masks["soft"])


def test_strength_zero_is_no_mask(make_model, make_batch):
    model = make_model(soft_mask={"strength": 0.0, "in_mlm": True})
    drawn = record(model, *DRAWN)
    out = model(make_batch(6))
    assert (out.keep == 1).all()
    logits = model.match(drawn["given", "draw_mask"][0].fused["positive"].cls)
    own = F.cross_entropy(logits, torch.ones(6, dtype=torch.long))
    torch.testing.assert_close(out.loss_soft, own)
    torch.testing.assert_close(out.loss_mlm_soft, out.loss_mlm)


def test_weights_scale_their_terms_only_in_the_sum(make_model, make_batch):
    weights = {"itm_weight": 3.0, "mlm_weight": 5.0, "itc": {"gamma": 2.0, "weight": 7.0}}
    plain = make_model(soft_mask={"in_mlm": True})(make_batch(6))
    out = make_model(soft_mask={"in_mlm": True, "weight": 0.5}, **weights)(make_batch(6))
    for name in ("loss_itc", "loss_itm", "loss_mlm", "loss_soft", "loss_mlm_soft"):
        torch.testing.assert_close(out[name], plain[name], msg=name)  # reported as they are
    expected = 7 * out.loss_itc + 3 * out.loss_itm + 5 * out.loss_mlm
    expected = expected + 1.5 * out.loss_soft + 2.5 * out.loss_mlm_soft
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("words", ["uniform", "content"])
def test_the_words_own_mask_picks_only_what_mlm_hides(make_model, make_batch, words, shared):
    options = {"soft_mask": {"score": "word", "words": words}}
    model = make_model(text={"mask_prob": 0.3, "shared": shared}, **options)
    seen = set()
    for step in range(20):
        batch = make_batch(6, epoch=step)
        out = model(batch)
        clean = model.tokenize(batch["text_input"])
        draws = Draws(torch.initial_seed(), step * 5 + 3)
        hidden = (
            model.tokenize_masked(batch["text_input"], draws).ids[-6:]
            == model.tokenizer.mask_token_id
        )
        for row, word in enumerate(out.word.tolist()):
            own = (clean.words[row] == word) & (clean.words[row] >= 0)
            tokens = clean.ids[row][own & hidden[row]].tolist()
            assert bool(tokens) == (word >= 0)
            seen.update(model.tokenizer.convert_ids_to_tokens(tokens))
        assert (out.keep[out.word < 0] == 1).all() and (out.keep[out.word >= 0] < 1).any()
    assert {"circle", "star"} <= seen and "[CLS]" not in seen
    assert ("a" in seen) == (words == "uniform")


@pytest.mark.parametrize("words", ["uniform", "content"])
def test_special_and_masked_tokens_are_never_picked(make_model, make_batch, words):
    model = make_model(soft_mask={"words": words}, text={"mask_prob": 0.5})
    drawn, picked = record(model, *DRAWN), set()
    for step in range(20):
        out = model(make_batch(6, epoch=step))
        text = drawn["tokenize_masked"]
        tokens = model.tokenizer.convert_ids_to_tokens(
            text.ids[:6][(text.words == out.word[:, None]) & (text.words >= 0)].tolist()
        )
        assert (out.keep[out.word < 0] == 1).all()  # nothing to pick, nothing masked
        picked.update(tokens)
    assert not picked & {"[MASK]", "[CLS]", "[SEP]", "[PAD]"}
    assert {"circle", "star", "red"} <= picked
    assert ("a" in picked) == ("the" in picked) == (words == "uniform")


# ---- edges


@pytest.mark.parametrize("score", ["match", "word", "similarity"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("captions", "mask_prob"),
    [
        (["a red circle"], 0.15),
        (["", "", ""], 0.4),
        (["", "a red circle", "!!! ... ,"], 0.4),
        (["a red circle", "a large blue star below a cross", "a cross"], 1.0),
        (["a red circle", "a large blue star below a cross", "a cross"], 0.0),
        (["circle " * 80, "a red circle", "zzzyqx"], 0.4),
        (["a red circle"] * 3, 0.4),
    ],
    ids=["batch of 1", "empty", "some empty", "all masked", "none masked", "long", "equal"],
)
def test_odd_captions_give_finite_losses_and_gradients(
    make_model, make_batch, captions, mask_prob, shared, score
):
    mask = {"in_mlm": True, "score": score, "negatives": True}
    text = {"shared": shared, "mask_prob": mask_prob}
    model = make_model(text=text, soft_mask=mask, itm_words=True)
    batch = {**make_batch(len(captions)), "text_input": captions}
    out = model(batch)
    assert_sound(model, out)
    if not any(captions):
        assert (out.keep == 1).all() and (out.word == -1).all()
    if mask_prob == 0:
        assert out.loss_mlm == 0
    if mask_prob == 1 and shared:  # a few tokens stay or become another word: those may be picked
        assert out.loss_mlm > 0


@pytest.mark.parametrize("size", [0, 1, 3, 4, 10])
def test_any_queue_size_works_with_any_batch(make_model, make_batch, monkeypatch, size):
    gathered = []
    monkeypatch.setattr(contrastive, "concat_all_gather", lambda x: gathered.append(x) or x)
    model = make_model(queue_size=size)
    pointer = 0
    for step in range(5):
        batch = make_batch(4, epoch=step)
        out = model(batch)
        pointer = (pointer + min(4, size)) % size if size else 0
        assert int(model.queue_ptr) == pointer
        torch.testing.assert_close(model.image_queue.norm(dim=0), torch.ones(size))
    assert bool(gathered) == bool(size)  # without a queue, other ranks' features are of no use
    model.advance()
    assert_sound(model, out)


def test_spare_rows_of_the_embedding_are_never_drawn(make_model, make_batch):
    """ALBEF's weights have 30522 rows, whatever the tokenizer has."""
    bert = {**asdict(make_model().options.bert), "vocab_size": 5000}
    model = make_model(bert=bert, text={"mask_prob": 1.0})
    for step in range(4):
        out = model(make_batch(6, epoch=step))
    assert out.loss.isfinite()


# ---- training


@pytest.mark.parametrize("in_mlm", [False, True])
def test_every_trainable_parameter_gets_a_gradient(make_model, make_batch, in_mlm):
    model = make_model(soft_mask={"in_mlm": in_mlm}, text={"mask_prob": 0.4})
    model(make_batch(6)).loss.backward()
    for name, parameter in model.named_parameters():
        # A key's bias shifts all of a query's scores alike, so softmax cancels it; a mask undoes
        # that in cross-attention
        if not name.endswith("attention.self.key.bias") or "crossattention" in name:
            assert parameter.grad.abs().max() > 0, name


def test_losses_fall_on_a_repeated_batch(make_model, make_batch):
    model = make_model(text={"mask_prob": 0.3}, alpha=0.0, learn_temp=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    seen = []
    for _ in range(30):
        out = model(make_batch(4))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        seen.append({name: float(term.detach()) for name, term in losses(out).items()})
    first, last = seen[0], seen[-1]
    assert last["loss"] < 0.6 * first["loss"]
    for name, term in first.items():
        assert last[name] < term, name


def test_only_seed_and_step_decide_the_loss(make_model, make_batch):
    def loss(seed=7, used=0, **progress):
        model = make_model(soft_mask={"kind": "random"}, itm_words=True)
        torch.manual_seed(seed)
        torch.rand(used)  # where the global stream stands is no matter
        return float(model(make_batch(6, **progress)).loss.detach())

    assert loss() == loss(used=5)
    assert len({loss(), loss(seed=8), loss(epoch=2)}) == 3


def test_training_updates_momentum_encoders_and_queues_once(make_model, make_batch):
    model = lead_away(make_model(momentum=0.9)).train()
    before = copy.deepcopy(model.state_dict())
    model(make_batch(4))
    momentum = {name for name in before if name.partition(".")[0].endswith("_m")}
    assert moved(model, before) == momentum - {"text_encoder_m.bert.embeddings.position_ids"} | {
        "image_queue",
        "text_queue",
        "queue_ptr",
    }
    for name in moved(model, before) & momentum:
        online = before[name.replace("_m.", ".", 1)]
        expected = 0.9 * before[name] + 0.1 * online
        torch.testing.assert_close(model.state_dict()[name], expected, msg=name)
    assert torch.equal(model.image_queue[:, 4:], before["image_queue"][:, 4:])


@pytest.mark.parametrize("grad", [True, False])
def test_evaluation_changes_no_state(make_model, make_batch, grad):
    model = lead_away(make_model()).eval()
    before = copy.deepcopy(model.state_dict())
    with torch.set_grad_enabled(grad):
        out = model(make_batch(4))
    assert not moved(model, before)
    assert out.loss.requires_grad == grad and out.loss_soft.isfinite()
    trained = lead_away(make_model()).train()(make_batch(4))
    torch.testing.assert_close(out.loss_soft, trained.loss_soft)  # the same map without gradients


def test_nothing_of_a_step_stays_on_the_modules(make_model, make_batch):
    model = make_model()

    def held():
        return {
            (name, key): tuple(value.shape)
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if torch.is_tensor(value)
        }

    before = held()
    model(make_batch(4)).loss.backward()
    assert held() == before


# ---- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", ["match", "word", "similarity"])
@pytest.mark.parametrize("shared", [True, False])
def test_half_precision_is_near_full_precision(make_model, make_batch, dtype, shared, score):
    changes = {
        "text": {"shared": shared, "mask_prob": 0.3},
        "soft_mask": {"in_mlm": True, "score": score, "negatives": True},
        "local_weight": 1,
        "itm_words": True,
    }
    full, half = make_model(**changes), make_model(**changes)
    expected = full(make_batch(6))
    with torch.autocast("cpu", dtype=dtype):
        out = half(make_batch(6))
    for name, term in losses(expected).items():
        assert out[name].dtype == torch.float32
        torch.testing.assert_close(out[name], term, rtol=0.05, atol=0.0, msg=name)
    assert out.keep.dtype == torch.float32
    scale = 1.0 if dtype == torch.bfloat16 else 2.0**10  # what a GradScaler does
    (out.loss * scale).backward()
    expected.loss.backward()
    for (name, got), plain in zip(half.named_parameters(), full.parameters(), strict=True):
        assert got.grad.isfinite().all(), name
        if plain.grad.norm() > 0.1:
            near = F.cosine_similarity(got.grad.flatten(), plain.grad.flatten(), dim=0)
            assert near > 0.97, (name, float(near))


# ---- two processes


def test_two_ranks_agree_despite_different_seeds(make_model):
    ended = on_ranks(2, lambda rank: train_and_retrieve(make_model(rank, momentum=0.9), rank))
    assert [rank.error for rank in ended] == ["", ""]


def train_and_retrieve(model, rank):
    """What each rank of the test above does; its model and its images are of another seed."""
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    assert not list(ddp.named_module_buffers), "DDP would broadcast buffers at every step"
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for step in range(3):
        batch = {
            "image": torch.randn(3, 3, 32, 32),
            "text_input": CAPTIONS[rank::2],
            "epoch": 0,
            "iters": step,
            "num_iters_per_epoch": 3,
        }
        optimizer.zero_grad()
        ddp(batch).loss.backward()
        optimizer.step()
    assert int(model.queue_ptr) == 18 == model.pointer  # of 24: 3 steps of 2 times 3
    states = [None, None]
    dist.all_gather_object(states, model.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), f"{name} differs between ranks"

    class Loader(list):
        dataset = SimpleNamespace(text=CAPTIONS)

    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loader, task = Loader([{"image": images}]), {"k_test": 3}
    together = model.eval().compute_sim_matrix(loader, task)
    dist.destroy_process_group()
    alone = model.compute_sim_matrix(loader, task)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b))


@pytest.mark.parametrize("negatives", ["pair", "batch"])
def test_local_negatives_choose_the_contrast(make_model, make_batch, negatives):
    model = make_model(local_weight=0.1, local_negatives=negatives, text={"shared": False}).eval()
    batch = make_batch(4)
    got = model(batch).loss_local
    with torch.no_grad():
        captions = model.tokenize(batch["text_input"])
        states = model.bert.encode(captions.ids, captions.packing).states
        words = captions.packing.pad(model.text_features(states))[:, 1:]
        patches = model.image_features(model.visual_encoder(batch["image"])[:, 1:])
    mask = captions.mask[:, 1:]
    if negatives == "pair":
        expected = local_contrast(words, patches, mask, model.temp)
    else:
        rows = mask.nonzero()[:, 0]
        expected = local_contrast_across(words[mask], patches, rows, rows >= 0, model.temp)
    torch.testing.assert_close(got, expected)
