"""Retrieval scores against LAVIS's compute_sim_matrix on the same weights."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lavis.common.registry import registry
from lavis.models.albef_models import compute_sim_matrix
from lavis.tasks.retrieval import RetrievalTask
from torch.utils.data import DistributedSampler

from benchmarks.baseline import albef_retrieval, blip_retrieval
from benchmarks.ranks import on_ranks
from softmask_plugin.errors import UserError
from softmask_plugin.models import SoftMaskBlipRetrieval
from softmask_plugin.models.rerank import NOT_A_CANDIDATE, Reranker, candidates

IMAGES = 5
PER_IMAGE = (1, 3, 2, 1, 2)  # captions of each image
TEXTS = [
    "a red circle",
    "a small red circle above a large blue star and below a green ring",
    "star",
    "a picture of a yellow triangle to the left of a small purple ring and a cross",
    "a black heart",
    "there is a large blue star below a red circle",
    "a small green square",
    "",
    "a green square to the right of a yellow triangle",
]


@pytest.fixture
def gallery():
    """A loader as LAVIS's retrieval task passes it to a model: batches of 2, 2 and 1 images."""
    owners = np.repeat(np.arange(IMAGES), PER_IMAGE)
    images = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    dataset = SimpleNamespace(
        text=TEXTS,
        image=[f"{i}.png" for i in range(IMAGES)],
        txt2img={text: int(image) for text, image in enumerate(owners)},
        img2txt={i: np.flatnonzero(owners == i).tolist() for i in range(IMAGES)},
    )

    class Loader(list):
        pass

    loader = Loader({"image": part} for part in images.split(2))
    loader.dataset = dataset
    return loader


def ours(model, loader, k):
    return model.compute_sim_matrix(loader, {"k_test": k})


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("twin", [albef_retrieval, blip_retrieval])
def test_scores_and_candidates_equal_lavis(
    make_model, make_other, gallery, twin, k, tmp_path, monkeypatch
):
    if twin is blip_retrieval:
        model = make_other(SoftMaskBlipRetrieval).eval()
    else:
        model = make_model().eval()
    got = ours(model, gallery, k)
    with torch.no_grad():
        expected = compute_sim_matrix(twin(model).eval(), gallery, k_test=k)
    for a, b, shape in zip(
        got, expected, [(IMAGES, len(TEXTS)), (len(TEXTS), IMAGES)], strict=True
    ):
        assert a.shape == b.shape == shape
        assert np.array_equal(a == NOT_A_CANDIDATE, b == NOT_A_CANDIDATE)
        assert ((a != NOT_A_CANDIDATE).sum(axis=1) == k).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)

    # The task writes its metrics to the run's folder too.
    monkeypatch.setitem(registry.mapping["paths"], "output_dir", str(tmp_path))
    maps = (gallery.dataset.txt2img, gallery.dataset.img2txt)
    metrics = RetrievalTask._report_metrics(*got, *maps)
    assert metrics == RetrievalTask._report_metrics(*expected, *maps)


def test_k_above_the_gallery_size_makes_all_candidates(make_model, gallery):
    model = make_model().eval()
    i2t, t2i = ours(model, gallery, 128)  # LAVIS dies of it
    assert (i2t != NOT_A_CANDIDATE).all()
    np.testing.assert_allclose(i2t, t2i.T, rtol=0, atol=1e-6)
    few, _ = ours(model, gallery, 3)  # a pair's score does not depend on who else is scored
    chosen = few != NOT_A_CANDIDATE
    np.testing.assert_allclose(few[chosen], i2t[chosen], rtol=0, atol=1e-5)


def test_texts_in_batches_score_the_same(make_model, gallery):
    model = make_model().eval()
    for a, b in zip(
        Reranker(model, {"k_test": 3}, text_batch=2).scores(gallery),
        ours(model, gallery, 3),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_without_a_matching_head_the_scores_are_those_of_itc(make_model, gallery):
    model = make_model().eval()
    with torch.no_grad():
        model.itm_head.weight.zero_()
        model.itm_head.bias.zero_()
    reranker = Reranker(model)
    images, texts = reranker.encode_images(gallery), reranker.encode_texts(TEXTS)
    similarity = (images.features @ texts.features.T).detach().numpy()
    assert np.abs(similarity).max() <= 1 + 1e-6
    np.testing.assert_allclose(ours(model, gallery, 9)[0], similarity, rtol=0, atol=1e-6)
    for found, expected in zip(ours(model, gallery, 0), (similarity, similarity.T), strict=True):
        np.testing.assert_array_equal(found, expected)


def by_words(make, model_class=None, **options):
    words = {"local_weight": 1.0, "local_negatives": "batch", **options}
    return (make(**words) if model_class is None else make(model_class, **words)).eval()


@torch.no_grad()
@pytest.mark.parametrize("blip", [False, True])
def test_words_rank_by_what_each_finds(make_model, make_other, gallery, blip):
    """Word by word and image by image; the rerank_memory that is less makes small chunks."""
    other = (make_other, SoftMaskBlipRetrieval) if blip else (make_model,)
    model = by_words(*other, temp=0.1)
    captions = model.tokenize(TEXTS)
    _, alone, _ = model.encode_captions(captions.ids, captions.packing)
    words = captions.packing.pad(model.text_features(alone.states))
    images = torch.cat([batch["image"] for batch in gallery])
    patches = model.image_features(model.visual_encoder(images)[:, 1:])
    expected = torch.zeros(IMAGES, len(TEXTS))
    for i, grid in enumerate(patches):
        for n, mask in enumerate(captions.packing.mask):
            found = [(grid @ t / 0.1).softmax(0) @ grid for t in words[n, mask][1:]]
            each = map(torch.cosine_similarity, words[n, mask][1:, None], (f[None] for f in found))
            expected[i, n] = torch.stack(list(each)).mean()
    for memory in (1.0, 1e-5, 1e-9):
        run = {"k_test": 0, "rank_by": "words", "rerank_memory": memory}
        for scores, transposed in zip(
            model.compute_sim_matrix(gallery, run), (expected, expected.T), strict=True
        ):
            np.testing.assert_allclose(scores, transposed.numpy(), rtol=0, atol=1e-5)


def test_words_propose_and_count_as_in_training(make_model, gallery):
    model = by_words(make_model, temp=0.1)
    run = {"k_test": 3, "rank_by": "words"}
    alone, _ = model.compute_sim_matrix(gallery, {**run, "k_test": 0})
    itm, _ = model.compute_sim_matrix(gallery, {**run, "rerank_scoring": "itm"})
    both, _ = model.compute_sim_matrix(gallery, {**run, "rerank_scoring": "itm+logit"})
    chosen = candidates(torch.from_numpy(alone), 3).numpy()
    assert np.array_equal(itm != NOT_A_CANDIDATE, chosen)
    np.testing.assert_allclose(both[chosen], (itm + 2 / 0.1 * alone)[chosen], rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"local_weight": 1.0, "local_negatives": "pair"}])
def test_words_that_were_not_trained_to_rank_are_refused(make_model, options):
    with pytest.raises(UserError, match=r"run.rank_by is 'words', .* needs model.local_weight"):
        Reranker(make_model(**options), {"rank_by": "words"})


@torch.no_grad()
def test_cosines_keep_their_digits_in_half_precision(make_model, gallery):
    model = make_model().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reranker = Reranker(model, {"k_test": 0})
        found, _ = reranker.scores(gallery)
        images = reranker.encode_images(gallery).features
        texts = reranker.encode_texts(gallery.dataset.text).features
    np.testing.assert_array_equal(found, (images @ texts.T).numpy())
    assert len(np.unique(found)) == found.size


@pytest.mark.parametrize("where", ["itm_head.bias", "vision_proj.weight", "text_proj.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_raise_an_error(make_model, gallery, where, value):
    model = make_model().eval()
    with torch.no_grad():
        model.get_parameter(where).fill_(value)
    with pytest.raises(UserError, match="a retrieval score is NaN or infinite"):
        ours(model, gallery, 3)


def test_scores_by_matching_alone(make_model, gallery):
    model = make_model().eval()
    both = model.compute_sim_matrix(gallery, {"k_test": 3})
    alone = model.compute_sim_matrix(gallery, {"k_test": 3, "rerank_scoring": "itm"})
    similarity, _ = ours(model, gallery, 0)
    for sum_of_two, logits, cosine in zip(both, alone, (similarity, similarity.T), strict=True):
        chosen = logits != NOT_A_CANDIDATE
        assert np.array_equal(chosen, sum_of_two != NOT_A_CANDIDATE)
        np.testing.assert_allclose((logits + cosine)[chosen], sum_of_two[chosen], atol=1e-5)


def test_scores_by_the_logits_of_both(make_model, gallery):
    model = make_model(temp=0.05).eval()
    scored = (
        model.compute_sim_matrix(gallery, {"k_test": 3, "rerank_scoring": scoring})
        for scoring in ("itm", "itm+itc", "itm+logit")
    )
    for alone, with_cosine, with_logit in zip(*scored, strict=True):
        chosen = alone != NOT_A_CANDIDATE
        expected = alone + (with_cosine - alone) / 0.05
        np.testing.assert_allclose(with_logit[chosen], expected[chosen], rtol=1e-4, atol=1e-4)


def test_less_memory_means_smaller_chunks_and_the_same_scores(make_model, gallery, monkeypatch):
    model, sizes = make_model().eval(), []
    match_image = Reranker.match_image

    def spy(self, memory, texts, captions):
        sizes.append(len(captions))
        return match_image(self, memory, texts, captions)

    monkeypatch.setattr(Reranker, "match_image", spy)
    expected = ours(model, gallery, 9)
    assert max(sizes) == len(TEXTS)
    sizes.clear()
    few = model.compute_sim_matrix(gallery, {"k_test": 9, "rerank_memory": 1e-4})
    assert max(sizes) < len(TEXTS) and sum(sizes) == IMAGES * len(TEXTS)
    for a, b in zip(few, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_gallery_smaller_than_k_is_a_warning(make_model, gallery, caplog):
    ours(make_model().eval(), gallery, 7)
    assert "run.k_test is 7, but there are 5 images: all are candidates" in caplog.text
    assert "run.k_test is 7: recalls at more depend on the order of the file" in caplog.text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"k_test": -1}, "k_test"),
        ({"k_test": True}, "k_test is True: it must be a whole number"),
        ({"k_test": 2.5}, "k_test is 2.5: it must be a whole number"),
        ({"rerank_scoring": "itc"}, "rerank_scoring"),
        ({"rerank_memory": 0}, "rerank_memory"),
        ({"rerank_memory": float("inf")}, "rerank_memory is inf: it must be a number above 0"),
    ],
)
def test_a_wrong_option_is_named(make_model, option, message):
    with pytest.raises(UserError, match=message):
        Reranker(make_model(), option)


@pytest.mark.parametrize("similarity", ["itc", "words"])
def test_two_ranks_share_the_work(make_model, gallery, monkeypatch, similarity):
    """Each of two processes matches its own images; both have all scores."""
    model, run = by_words(make_model), {"k_test": 3, "rank_by": similarity}
    alone = model.compute_sim_matrix(gallery, run)
    seen, remember = [], model.bert.remember
    monkeypatch.setattr(model.bert, "remember", lambda states: seen.append(1) or remember(states))

    def rank_scores(_):
        return [*map(torch.from_numpy, model.compute_sim_matrix(gallery, run)), len(seen)]

    for rank, ended in enumerate(on_ranks(2, rank_scores)):
        assert not ended.error
        *scores, images = ended.result
        for a, b in zip(scores, alone, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
        assert images == IMAGES // 2 + (rank < IMAGES % 2)


def test_candidates_are_the_best_of_each_row():
    similarity = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]])
    assert candidates(similarity, 2).tolist() == [[False, True, True], [True, True, False]]
    assert candidates(similarity, 9).all()


def test_a_part_of_the_gallery_in_each_process_is_refused(make_model, gallery):
    """With run.use_dist_eval_sampler, each of several processes would rank only its part."""
    gallery.sampler = DistributedSampler(gallery.dataset.image, num_replicas=2, rank=0)
    with pytest.raises(UserError, match="set run.use_dist_eval_sampler=false"):
        ours(make_model().eval(), gallery, 3)
