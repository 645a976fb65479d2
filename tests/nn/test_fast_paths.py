"""Every shortcut of the fast core against the plain way, forward and backward."""

from __future__ import annotations

from functools import partial, partialmethod

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toy_models import SMALL, record

from softmask_plugin.losses import local_contrast
from softmask_plugin.nn import image_memory
from softmask_plugin.nn.image_memory import LayerMemory, View
from softmask_plugin.nn.recompute import recompute
from softmask_plugin.nn.tokens import Tokens
from softmask_plugin.soft_mask import grad_cam

FIRST_FUSION, CAM_LAYER = 2, 3


def masked_albef(twin, text, mask, image_states, keep=None, image_cls=True):
    """LAVIS's multi-modal states of pairs, with image features masked before any projection."""
    if keep is not None:
        image_states = image_states * keep[:, :, None]
    seen = torch.ones(image_states.shape[:2], dtype=torch.long)
    seen[:, 0] = int(image_cls)
    return twin.text_encoder.bert(
        encoder_embeds=text,
        attention_mask=mask.long(),
        encoder_hidden_states=image_states,
        encoder_attention_mask=seen,
        return_dict=True,
        mode="fusion",
    ).last_hidden_state


@pytest.fixture
def pair(make_model, albef_twin, make_batch):
    """Our model, LAVIS's with the same weights, and a ragged batch encoded by both."""

    def make(size):
        ours = make_model().eval()
        twin = albef_twin(ours).eval()
        batch = make_batch(size)
        captions = ours.tokenize(batch["text_input"])
        image = ours.visual_encoder(batch["image"])
        tokens = ours.bert.encode(captions.ids, captions.packing)
        tokens = Tokens(tokens.states.detach(), tokens.packing)
        torch.testing.assert_close(image, twin.visual_encoder(batch["image"]))
        return ours, twin, image.detach().requires_grad_(), tokens, captions

    return make


@pytest.mark.parametrize("size", [1, 2, 6])
def test_masking_keys_and_values_is_masking_the_features(pair, size):
    ours, twin, image, tokens, captions = pair(size)
    keep = torch.rand(size, image.shape[1])
    fused = ours.bert.fuse(tokens, ours.bert.remember(image), (View(keep=keep),)).states
    padded, mask = tokens.packing.pad(tokens.states), captions.mask
    expected = masked_albef(twin, padded, mask, image, keep)[mask]
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-5)

    weight = torch.randn_like(fused)
    parameters = [
        (name, p, dict(twin.text_encoder.named_parameters())[name])
        for name, p in ours.text_encoder.named_parameters()
        if "crossattention" in name
    ]
    got = torch.autograd.grad((fused * weight).sum(), [image, *(p for _, p, _ in parameters)])
    plain = torch.autograd.grad((expected * weight).sum(), [image, *(p for _, _, p in parameters)])
    for (name, _, _), a, b in zip([("image", 0, 0), *parameters], got, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("size", [2, 6])
def test_a_pass_over_several_views_equals_a_pass_for_each(pair, size):
    ours, twin, image, tokens, captions = pair(size)
    text, mask = tokens.packing.pad(tokens.states), captions.mask
    other, keep = torch.arange(size).roll(1), torch.rand(size, image.shape[1])
    views = (View(), View(images=other), View(keep=keep), View(images=other, keep=keep))
    fused = ours.bert.fuse(Tokens.cat([tokens] * 4), ours.bert.remember(image), views)
    plain = [
        masked_albef(twin, text, mask, image),
        masked_albef(twin, text, mask, image[other]),
        masked_albef(twin, text, mask, image, keep),
        masked_albef(twin, text, mask, image[other], keep),
    ]
    plain = torch.cat(plain)[mask.repeat(4, 1)]
    torch.testing.assert_close(fused.states, plain, rtol=1e-5, atol=1e-5)


def test_the_backward_pass_keeps_keys_and_values_once_for_all_views(pair):
    ours, _, image, tokens, _ = pair(2)
    views = [View(keep=torch.rand(2, image.shape[1])) for _ in range(3)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        memory = ours.bert.remember(image)
        ours.bert.fuse(Tokens.cat([tokens] * 3), memory, views)
    storages = {t.data_ptr() for t in kept if t.numel() == memory[0].key.numel()}
    assert len(storages) == 2 * len(memory), "one of keys, one of values, in each layer"


def test_many_captions_of_one_image_share_its_memory(pair):
    ours, twin, image, tokens, captions = pair(6)
    memory = ours.bert.remember(image[:2])
    fused = ours.bert.fuse(tokens, memory, (View(captions_per_image=3),)).states
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    text, mask = tokens.packing.pad(tokens.states), captions.mask
    expected = masked_albef(twin, text, mask, image[rows])[mask]
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-5)


def test_views_must_cover_the_captions(pair):
    ours, _, image, tokens, _ = pair(4)
    with pytest.raises(ValueError, match="cover"):
        memory = ours.bert.remember(image[:2])
        ours.bert.fuse(tokens, memory, (View(captions_per_image=1),))


@pytest.mark.parametrize("size", [1, 2, 6])
def test_grad_cam_equals_lavis_hooks(pair, size):
    """LAVIS keeps a layer's attention and its gradient in hooks; here they stay local."""
    ours, twin, image, tokens, captions = pair(size)
    fused, attention = ours.bert.fuse_with_attention(tokens, ours.bert.remember(image), CAM_LAYER)
    cam = grad_cam(ours.match(fused.cls)[:, 1], attention)

    layer = twin.text_encoder.bert.encoder.layer[CAM_LAYER].crossattention.self
    layer.save_attention = True
    expected = masked_albef(twin, tokens.packing.pad(tokens.states), captions.mask, image)
    torch.testing.assert_close(fused.states, expected[captions.mask], rtol=1e-5, atol=1e-5)
    twin.itm_head(expected[:, 0])[:, 1].sum().backward()
    gradient = layer.get_attn_gradients().clamp(min=0)
    plain = (layer.get_attention_map() * gradient).mean(dim=1)[:, :, 1:]
    mask = captions.mask
    torch.testing.assert_close(cam[mask], plain[mask], rtol=1e-4, atol=1e-8)
    words = captions.words >= 0
    assert (cam[words].amax(dim=-1) > 0).all(), "a word's map is empty"


def test_dropout_spares_the_map(make_model, make_batch):
    """The probabilities are those before dropout: rows sum to one, none is zeroed."""
    bert = {
        "layers": 5,
        "fusion_layer": 2,
        "width": 32,
        "heads": 4,
        "intermediate": 64,
        "max_positions": 40,
        "vocab_size": None,
        "dropout": 0.5,
        "attention_dropout": 0.5,
    }
    model = make_model(bert=bert).train()
    captions = model.tokenize(make_batch(4)["text_input"])
    memory = model.bert.remember(model.visual_encoder(make_batch(4)["image"]))
    tokens = model.bert.encode(captions.ids, captions.packing)
    _, attention = model.bert.fuse_with_attention(tokens, memory, CAM_LAYER)
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:-1]))
    assert (attention > 0).all()


def test_layers_without_a_map_are_refused(pair):
    ours, _, image, tokens, _ = pair(2)
    with pytest.raises(ValueError, match="no cross-attention"):
        ours.bert.fuse_with_attention(tokens, ours.bert.remember(image), 1)


@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("negatives", "score", "image_cls", "patch_dropout"),
    [
        (True, "match", True, 0.0),
        (False, "match", False, 0.5),
        (True, "word", True, 0.0),
        (False, "word", False, 0.0),
        (True, "word", True, 0.5),
        (True, "similarity", True, 0.0),
        (False, "similarity", True, 0.5),
    ],
)
def test_a_whole_step_equals_separate_passes(
    make_model, make_batch, albef_twin, size, shared, negatives, score, image_cls, patch_dropout
):
    """All innovations on: recompute each loss with LAVIS's modules, one pass per kind of pair.

    A batch of one has no negatives.
    """
    mask_options = {"in_mlm": True, "negatives": negatives, "score": score}
    text_options, bert = (
        {"shared": shared, "mask_prob": 0.4},
        {**SMALL["bert"], "image_cls": image_cls},
    )
    vit = {**SMALL["vit"], "patch_dropout": patch_dropout}
    ours = make_model(
        text=text_options, soft_mask=mask_options, bert=bert, local_weight=0.5, vit=vit
    ).train()
    twin = albef_twin(ours)
    batch = make_batch(size)
    seen = record(ours, "tokenize_masked", "negatives", "mask_of", "encode_momentum")
    shown = record(ours.visual_encoder, "visible")
    out = ours(batch)
    none = torch.empty(0, dtype=torch.long)
    text, (image_of, text_of) = seen["tokenize_masked"], seen.get("negatives", (none, none))
    keep, word = seen["mask_of"]
    alpha = ours.progress(batch)[1]

    mask, ids, masked_ids = text.tokens.mask, text.ids[:size], text.ids[-size:]
    assert torch.equal(ids, masked_ids) == shared
    image = lavis_image_states(twin.visual_encoder, shown["visible"])
    assert image.shape[1] == 1 + 16 * (1 - patch_dropout) == keep.shape[1]

    def encode(tokens, encoder=twin.text_encoder):
        return encoder.bert(tokens, attention_mask=mask.long(), return_dict=True, mode="text")[0]

    fuse = partial(masked_albef, image_cls=image_cls)
    states, words = encode(ids), encode(masked_ids)
    positive = fuse(twin, states, mask, image)
    n = len(text_of)
    negative_image = fuse(twin, states[:n], mask[:n], image[image_of])
    negative_text = fuse(twin, states[text_of], mask[text_of], image[:n])
    logits = twin.itm_head(torch.cat([positive, negative_image, negative_text])[:, 0])
    labels = torch.tensor([1] * size + [0] * 2 * n)
    plain = [F.cross_entropy(logits, labels)]
    torch.testing.assert_close(out.loss_itm, plain[-1])

    soft = fuse(twin, states, mask, image, keep)
    if negatives and size > 1:
        wrong = fuse(twin, states[text_of], mask[text_of], image, keep)
        soft = torch.cat([soft, wrong])
    plain.append(F.cross_entropy(twin.itm_head(soft[:, 0]), labels[: len(soft)]))
    torch.testing.assert_close(out.loss_soft, plain[-1])
    assert torch.equal(keep[:, 1:].amin(dim=1), (word < 0).float())
    if score == "word":
        expected = own_mask(fuse, twin, words, mask, image, text, word)
        torch.testing.assert_close(keep, expected, rtol=1e-3, atol=1e-4)
    else:
        assert (word >= 0).all()
    if score == "similarity":
        expected = similarity_mask(ours, twin, states, image, text.words, word)
        torch.testing.assert_close(keep, expected, rtol=1e-3, atol=1e-4)

    encoded_m, momentum = seen["encode_momentum"], ours.text_encoder_m
    _, words_m = text.versions(encoded_m.text)
    fused_m = momentum.bert.fuse(words_m, momentum.bert.remember(encoded_m.image))
    soft_labels = torch.zeros(*mask.shape, momentum.shape.vocab_size)
    soft_labels[mask] = momentum(fused_m.states).softmax(dim=-1)  # on every token
    chosen = text.masked.mask
    for loss, features in ((out.loss_mlm, image), (out.loss_mlm_soft, image * keep[:, :, None])):
        logits = twin.text_encoder.cls(fuse(twin, words, mask, features))
        hard = F.cross_entropy(logits[chosen], text.targets)
        distilled = -(soft_labels * logits.log_softmax(-1)).sum(-1)[chosen].mean()
        plain.append((1 - alpha) * hard + alpha * distilled)
        torch.testing.assert_close(loss, plain[-1])

    words = F.normalize(twin.text_proj(states), dim=-1)[:, 1:]
    patches = F.normalize(twin.vision_proj(image[:, 1:]), dim=-1)
    local = local_contrast(words, patches, mask[:, 1:], ours.temp.detach())
    plain.append(0.5 * local)
    torch.testing.assert_close(out.loss_local, local)

    total = out.loss_itc + out.loss_itm + out.loss_mlm + out.loss_soft + out.loss_mlm_soft
    torch.testing.assert_close(out.loss, total + 0.5 * out.loss_local)

    # ITC's own gradient is compared with LAVIS's in test_parity_pretrain.py
    (out.loss - out.loss_itc).backward()
    sum(plain).backward()
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None:
            got = ours.get_parameter(name).grad
            torch.testing.assert_close(
                got, parameter.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def lavis_image_states(encoder, seen):
    """States of the patches that the step saw, by LAVIS's modules."""
    if torch.is_tensor(seen):
        return encoder(seen)
    x = encoder.patch_embed(seen.images) + encoder.pos_embed[:, 1:]
    x = torch.stack([row[kept] for row, kept in zip(x, seen.patches, strict=True)])
    cls = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(x), -1, -1)
    return encoder.norm(nn.Sequential(*encoder.blocks)(torch.cat([cls, x], dim=1)))


def similarity_mask(ours, twin, states, image, words, word):
    """The soft mask of each picked word by the cosines of its tokens with the patches, in loops."""
    rows = []
    for i, picked in enumerate(word.tolist()):
        maps = []
        for token in states[i][words[i] == picked]:
            near = F.cosine_similarity(twin.text_proj(token), twin.vision_proj(image[i, 1:]))
            maps.append((near / ours.temp).softmax(dim=0))
        mean = torch.stack(maps).mean(dim=0)
        hidden = (mean - mean.min()) / (mean.max() - mean.min())
        rows.append(torch.cat([torch.ones(1), 1 - hidden]))
    return torch.stack(rows).detach()


def own_mask(fuse, twin, states, mask, image, text, word):
    """The soft mask of each picked word, from autograd through LAVIS's modules, pair by pair."""
    rows = []
    for i, picked in enumerate(word.tolist()):
        keep = torch.ones(1, image.shape[1], requires_grad=True)
        fused = fuse(
            twin, states[i : i + 1].detach(), mask[i : i + 1], image[i : i + 1].detach(), keep
        )
        hidden = (text.words[i] == picked) & (picked >= 0)
        target = torch.zeros_like(text.words).masked_scatter(text.masked.mask, text.targets)[i]
        likely = (
            twin.text_encoder.cls(fused)[0].log_softmax(dim=-1).gather(1, target[:, None])[:, 0]
        )
        (gradient,) = torch.autograd.grad(likely[hidden].sum(), keep)
        effect = gradient[0, 1:].clamp_min(0)
        spread = (effect.max() - effect.min()).clamp_min(1e-30)
        rows.append(torch.cat([torch.ones(1), 1 - (effect - effect.min()) / spread]))
    return torch.stack(rows)


@pytest.mark.parametrize("trained", [True, False])
def test_padding_kept_for_a_gpu_changes_nothing(make_model, make_batch, monkeypatch, trained):
    """On CUDA the padding of negatives stays, since only the device knows their lengths."""
    results = []
    for trim in (None, False):
        model = make_model(soft_mask={"negatives": True}).train(trained)
        take = Tokens.take
        monkeypatch.setattr(Tokens, "take", partialmethod(take, trim=trim))
        loss = model(make_batch(6))["loss"]
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
        monkeypatch.undo()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def layer_memory():
    """A layer's keys and values, and queries of three captions, in double precision."""
    torch.manual_seed(0)
    images, heads, tokens, words, width = 3, 2, 7, 4, 5

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    key, value = draw(images, heads, tokens, width), draw(images, heads, tokens, width)
    bias = draw(heads, width, 1), draw(heads, 1, width)
    return LayerMemory(key, value, *bias), draw(images, heads, words, width)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("other", [None, [2, 0, 0]])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_equals_attention_to_masked_keys_and_values(
    layer_memory, dropout, other, masked, monkeypatch
):
    """With dropout too: the plain attention drops the same probabilities."""
    memory, query = layer_memory
    keep = torch.rand(3, 7, dtype=torch.float64) if masked else None
    images = None if other is None else torch.tensor(other)
    kept = (torch.rand(3, 2, 4, 7) >= dropout) / (1 - dropout)

    for module in ("attention", "image_memory"):
        path = f"softmask_plugin.nn.{module}.drop"
        monkeypatch.setattr(path, lambda x, rate: x * kept if rate else x)
    got = memory.attend(query, [View(images=images, keep=keep)], dropout)

    rows = torch.arange(3) if images is None else images
    factor = 1 if keep is None else keep[:, None, :, None]
    key_bias = memory.key_bias.transpose(1, 2)
    key = key_bias + factor * (memory.key[rows] - key_bias)
    value = memory.value_bias + factor * (memory.value[rows] - memory.value_bias)
    probabilities = (query @ key.transpose(2, 3) / 5**0.5).softmax(dim=-1)
    expected = (probabilities * (kept if dropout else 1)) @ value
    torch.testing.assert_close(got, expected)

    weight = torch.randn_like(got)
    leaves = [query, memory.key, memory.value]
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_recomputing_repeats_the_dropout(layer_memory, monkeypatch):
    """The backward pass gathers other images' keys and values again, with the same dropout."""
    memory, query = layer_memory
    view, results = View(images=torch.tensor([1, 2, 0])), []
    for again in (True, False):
        if not again:
            monkeypatch.setattr(
                image_memory, "recompute", lambda function, *given, draws: function(*given)
            )
        torch.manual_seed(3)
        out = memory.attend(query, [view], 0.5)
        results.append([out, *torch.autograd.grad(out.square().sum(), [query, memory.key])])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_recomputing_repeats_no_product():
    """Only what comes before a final linear layer runs again."""
    linear, x = torch.nn.Linear(64, 64), torch.randn(8, 64, requires_grad=True)
    counts = []
    for call in (recompute, lambda function, x: function(x)):
        with FlopCounterMode(display=False) as counter:
            call(lambda x: linear(F.gelu(x)), x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
