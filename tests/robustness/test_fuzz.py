"""Arbitrary files and tensors: parsed or refused with a message; finite, in range, of a shape."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from softmask_plugin.datasets.images import UnreadableImageError, open_rgb
from softmask_plugin.datasets.tables.captions import parse_captions
from softmask_plugin.datasets.tables.questions import parse_answers, parse_questions
from softmask_plugin.datasets.tables.statements import parse_statements
from softmask_plugin.errors import UserError, one_line
from softmask_plugin.soft_mask import keep_factors, normalize, pick_words, word_cam, word_map
from softmask_plugin.tokenization import CaptionTokenizer
from softmask_plugin.vocabulary import build_tokenizer

# ---- files of captions, questions and statements

READERS = {
    "captions": lambda path: parse_captions(path, "train"),
    "questions": parse_questions,
    "unanswered": lambda path: parse_questions(path, answered=False),
    "entailment": lambda path: parse_statements(path, ("image",), ("no", "yes")),
    "pairs": lambda path: parse_statements(path, ("image0", "image1"), ("False", "True")),
    "answers": parse_answers,
}
KEYS = """image image0 image1 images caption question answer sentence label image_id question_id
filename filepath split sentences raw""".split()
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.sampled_from(["a.jpg", "/a.jpg", "../a", "yes", "true", "1", "train", "\ud800", "\x00"])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
    ),
    max_leaves=12,
)
CELLS = st.text(st.sampled_from("a.jpgyes01,;\t\"'\r\n\x00 é\u2028"), max_size=8)
CSV = st.lists(st.lists(CELLS, max_size=5).map(",".join), max_size=4).map(
    lambda lines: "\n".join([f"{','.join(KEYS[:10])}", *lines])
)
CONTENT = (
    st.binary(max_size=80)
    | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | CSV.map(str.encode)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.lists(JSON, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    | st.lists(JSON, max_size=3).map(lambda rows: json.dumps({"images": rows}).encode())
)


@pytest.mark.parametrize("reader", READERS)
@given(st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".txt"]), CONTENT)
@example(".json", b'[{"image": "a\\u0000b.jpg", "caption": "x"}]')
@example(".json", b"1" * 5000)  # longer than Python turns into a number
@example(".csv", b'image,caption\na.jpg,"' + b"x" * 200_000 + b'"')
@example(".json", b'[{"image": "a", "question": "b", "answer": {"c": 5e-324, "d": 1e9}}]')
@settings(max_examples=100, deadline=None)
def test_a_file_gives_usable_items_or_a_user_error(tmp_path_factory, reader, suffix, content):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    try:
        items = READERS[reader](path)
    except UserError as error:
        assert str(error) == one_line(str(error)) and path.name in str(error)
        return
    assert items
    if reader == "captions":
        assert len({item["image"] for item in items}) == len(items)
    for item in items:
        usable(item)


def usable(item: dict | str) -> None:
    """Texts have a letter or digit and can be encoded; images are below a folder."""
    if isinstance(item, str):
        item = {"sentence": item}
    for name in item.get("images", [item["image"]] if "image" in item else []):
        assert name and not Path(name).is_absolute() and ".." not in Path(name).parts
    shares = item.get("answer", {})
    assert not shares or sum(shares.values()) == pytest.approx(1)
    said = [item[key] for key in ("question", "sentence") if key in item]
    for text in (*said, *shares, *item.get("caption", [])):
        assert any(map(str.isalnum, text)) and text.encode()


@pytest.mark.parametrize("wrap", ["{}", '{{"images": {}}}', '[{{"image": "a", "caption": {}}}]'])
def test_nesting_of_any_depth_is_refused(tmp_path, wrap):
    """Beyond JSON's own limit and that of printing a value."""
    path = tmp_path / "a.json"
    for depth in [*range(900, 1000), 10**5]:
        path.write_text(wrap.format("[" * depth + "]" * depth))
        with pytest.raises(UserError):
            parse_captions(path)


# ---- images


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"]), st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_image_is_rgb_or_refused(tmp_path_factory, kind, data):
    path = tmp_path_factory.getbasetemp() / "any.jpg"
    pixels = np.random.default_rng(0).integers(0, 255, (12, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format=kind)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        image = open_rgb(path, min_side=4)
    except UnreadableImageError as error:
        assert str(error) == one_line(str(error)) and "any.jpg" in str(error)
    else:
        assert image.mode == "RGB" and min(image.size) > 0


# ---- text


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer(build_tokenizer("scenes"), max_length=12)


@given(st.lists(st.text(max_size=60), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_text_is_tokenized_without_special_tokens(tokenizer, texts):
    try:
        captions = tokenizer.tokenize(texts)
    except UserError:
        return
    special = tokenizer.is_special[captions.ids]
    assert (special.sum(dim=1) == 2 + (~captions.mask).sum(dim=1)).all()  # [CLS] and [SEP]
    assert ((captions.words >= 0) == ~special).all()


# ---- soft mask

# As bits, since a library may have told the processor to take denormal numbers for zero: 0, the
# least denormal, the largest, the least normal number, 1e-30, 0.1, 1 and 1e30.
BITS = [0, 1, 0x7FFFFF, 0x800000, 0x0DA24260, 0x3DCCCCCD, 0x3F800000, 0x7149F2CA]


@st.composite
def cams(draw):
    """Maps (B, T, P) >= 0 with the words of their tokens, (B, T)."""
    b, t, p = (draw(st.integers(1, limit)) for limit in (3, 6, 9))
    bits = draw(st.lists(st.sampled_from(BITS), min_size=b * t * p, max_size=b * t * p))
    values = np.array(bits, dtype=np.int32).view(np.float32).reshape(b, t, p)
    kind = draw(st.sampled_from(["as drawn", "zero", "constant", "all masked"]))
    if kind == "zero":
        values[:] = 0
    elif kind == "constant":
        values[:] = values.flat[0]
    words = []
    for _ in range(b):
        steps = draw(st.lists(st.integers(0, 1), min_size=t, max_size=t))
        barred = draw(st.lists(st.booleans(), min_size=t, max_size=t))
        row = np.cumsum(steps).clip(max=t - 1)
        words.append(np.where(np.array(barred) | (kind == "all masked"), -1, row))
    return torch.from_numpy(values), torch.tensor(np.array(words), dtype=torch.long)


@given(
    cams(),
    st.sampled_from(["uniform", "content", "energy"]),
    st.sampled_from(["soft", "hard", "random", "uniform"]),
    st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
def test_a_mask_is_finite_and_in_0_1_whatever_the_map(cam_and_words, choice, kind, strength):
    (cam, words), stream = cam_and_words, torch.Generator().manual_seed(0)
    word = pick_words(cam, words, choice, stream)
    assert word.shape == (len(cam),)
    for picked, row in zip(word.tolist(), words.tolist(), strict=True):
        assert picked in row if max(row) >= 0 else picked == -1
    keep = keep_factors(normalize(word_map(cam, words, word)), kind, strength, stream)
    assert keep.shape == (len(cam), 1 + cam.shape[2]) and keep.dtype == torch.float32
    assert keep.isfinite().all() and (keep >= 0).all() and (keep <= 1).all()
    assert (keep[:, 0] == 1).all()
    assert (keep[(word < 0)] == 1).all()


@given(st.tuples(*(st.integers(1, 4) for _ in range(4))), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_a_cam_is_finite_and_not_negative(shape, rng):
    draw = np.random.default_rng(rng.randrange(2**32))
    b, h, t, p = shape
    attention = torch.tensor(draw.random((b, h, t, 1 + p)), dtype=torch.float32).softmax(-1)
    scale = random.Random(rng.random()).choice([0, 1e-45, 1e-38, 1, 1e30])
    gradient = torch.tensor(scale * draw.standard_normal((b, h, t, 1 + p)), dtype=torch.float32)
    cam = word_cam(attention, gradient)
    assert cam.shape == (b, t, p) and cam.isfinite().all() and (cam >= 0).all()
