"""Image and text processors: what they accept, what they change, what they must not change."""

from __future__ import annotations

import pickle
import random
import re
from collections.abc import Sequence

import cv2
import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image
from torchvision.transforms import functional, v2

from softmask_plugin.datasets.images import open_rgb, to_rgb
from softmask_plugin.errors import UserError
from softmask_plugin.processors import (
    CaptionProcessor,
    ImageEvalProcessor,
    ImageTrainProcessor,
    QuestionProcessor,
    distort,
)
from softmask_plugin.processors.image import CLIP_MEAN, CLIP_STD, COLOUR_OPS, SHAPE_OPS, random_crop
from softmask_plugin.processors.randaugment import RandAugment

NONE = {
    "min_scale": None,
    "color_jitter": None,
    "grayscale_p": 0,
    "blur_p": 0,
    "flip_p": 0,
    "randaugment_ops": 0,
}


def photo(width: int = 48, height: int = 40) -> Image.Image:
    """Smooth colours, without symmetry."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    channels = [x / width, y / height, (x / width) ** 2 * y / height]
    return Image.fromarray((255 * np.stack(channels, -1)).astype(np.uint8))


def drawn(process, image, seed: int = 0):
    """What a process that draws from torch makes of an image."""
    torch.manual_seed(seed)
    return process(image)


def pixel(image: Image.Image) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel((0, 0))  # type: ignore[return-value]


def test_registered_under_their_names():
    for name, cls in {
        "softmask_image_train": ImageTrainProcessor,
        "softmask_image_eval": ImageEvalProcessor,
        "softmask_caption": CaptionProcessor,
        "softmask_question": QuestionProcessor,
    }.items():
        assert registry.get_processor_class(name) is cls
        assert isinstance(cls.from_config(OmegaConf.create({"name": name})), cls)
        assert isinstance(cls.from_config(), cls)


# ---- modes of images


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 100, (100, 100, 100)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (200, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (10, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16B", 257 * 100, (100, 100, 100)),
        ("I", 257 * 100, (100, 100, 100)),
        ("I", 100, (100, 100, 100)),
        ("F", 0.2, (51, 51, 51)),
        ("F", 100.4, (100, 100, 100)),
    ],
)
def test_colours_survive(mode, colour, expected):
    assert pixel(to_rgb(Image.new(mode, (3, 3), colour))) == expected


def test_unbounded_values_are_stretched():
    image = Image.fromarray(np.array([[-1.0, 0.0, 1.0]], dtype=np.float32))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 128, 255]
    broken = Image.fromarray(np.array([[np.nan, np.inf, 1.0]], dtype=np.float32))
    assert to_rgb(broken).mode == "RGB"


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_is_white(mode, tmp_path):
    image = Image.new(mode, (3, 3), 0)
    image.putpixel((0, 0), 0 if mode != "RGB" else (0, 0, 0))
    image.save(tmp_path / "a.png", transparency=0 if mode != "RGB" else (0, 0, 0))
    assert pixel(open_rgb(tmp_path / "a.png")) == (255, 255, 255)


def test_a_16_bit_png_keeps_its_contrast(tmp_path):
    values = np.array([[0, 20000, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.asarray(open_rgb(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 78, 255]


# ---- files


def test_photos_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown rotated by 90 degrees clockwise
    photo(40, 20).save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = open_rgb(tmp_path / "a.jpg")
    assert upright.size == (20, 40)
    expected = np.asarray(photo(40, 20).transpose(Image.Transpose.ROTATE_270), dtype=int)
    assert np.abs(np.asarray(upright, dtype=int) - expected).mean() < 5


def test_large_jpegs_are_decoded_smaller_but_large_enough(tmp_path):
    photo(640, 480).save(tmp_path / "a.jpg")
    assert type(open_rgb(tmp_path / "a.jpg")) is Image.Image  # and no longer tied to its file
    assert open_rgb(tmp_path / "a.jpg").size == (640, 480)
    assert open_rgb(tmp_path / "a.jpg", 200).size == (320, 240)
    assert open_rgb(tmp_path / "a.jpg", 481).size == (640, 480)


# ---- image processors


def test_evaluation_equals_that_of_lavis():
    reference = registry.get_processor_class("blip_image_eval")(image_size=32)
    torch.testing.assert_close(ImageEvalProcessor(32)(photo()), reference(photo()))


@pytest.mark.parametrize("kind", ["softmask_image_eval", "softmask_image_train"])
def test_arrays_are_images_too(kind):
    process = registry.get_processor_class(kind)(image_size=32)
    for image in (photo(), photo().convert("L")):
        expected = drawn(process, image)
        torch.testing.assert_close(drawn(process, np.asarray(image)), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("image", "given"),
    [
        (np.zeros((3, 8, 8), np.uint8), "ndarray of uint8 (3, 8, 8)"),
        (np.zeros(8, np.uint8), "ndarray of uint8 (8,)"),
        (np.zeros((8, 8, 3)), "ndarray of float64 (8, 8, 3)"),
        (np.zeros((0, 8, 3), np.uint8), "ndarray of uint8 (0, 8, 3)"),
        (torch.zeros(3, 8, 8), "Tensor of torch.float32 (3, 8, 8)"),
        ("photo.jpg", "str"),
        (None, "NoneType"),
    ],
)
def test_anything_else_is_named(image, given):
    expected = "expected a PIL image or an array (H, W, 3) of uint8"
    with pytest.raises(UserError) as caught:
        ImageEvalProcessor(32)(image)
    assert str(caught.value) == f"softmask_image_eval: {expected}, got {given}"


def test_training_without_distortions_equals_evaluation():
    plain = ImageTrainProcessor(32, **NONE)
    torch.testing.assert_close(plain(photo()), ImageEvalProcessor(32)(photo()))


@pytest.mark.parametrize(
    "distortion",
    [
        {"min_scale": 0.3, "max_scale": 0.5},
        {"color_jitter": [0.4, 0.4, 0.4, 0.1], "color_jitter_p": 1},
        {"grayscale_p": 1},
        {"blur_p": 1, "blur_sigma": [1, 2]},
        {"flip_p": 1},
        {"randaugment_ops": 4, "randaugment_magnitude": 20},
    ],
    ids=lambda options: next(iter(options)),
)
def test_each_distortion_alone_does_something(distortion):
    torch.manual_seed(0)
    distorted = ImageTrainProcessor(32, **{**NONE, **distortion})(photo())
    assert (distorted - ImageEvalProcessor(32)(photo())).abs().mean() > 0.005


@pytest.mark.parametrize("change", ["brightness", "contrast", "saturation", "hue", "sharpness"])
@pytest.mark.parametrize("amount", [0.0, 0.35, 0.7])
def test_colours_change_as_in_torchvision(change, amount):
    value = amount - 0.35 if change == "hue" else 2 * amount  # a turn of the circle, or a factor
    pixels = np.asarray(photo(96, 80))
    exact = functional.pil_to_tensor(photo(96, 80)) / 255
    expected = 255 * getattr(functional, f"adjust_{change}")(exact, value).permute(1, 2, 0).numpy()
    error = np.abs(getattr(distort, change)(pixels, value) - expected)
    # The hue is rounded to 1/256 of the circle, by which a channel moves by up to 3 levels
    assert error.max() < (6 if change == "hue" else 0.9)
    assert error.mean() < 0.4


def test_jitter_draws_as_torchvision_does():
    image = photo(96, 80)
    options = (0.4, 0.4, 0.4, 0)  # a hue is turned more coarsely than torchvision does
    ours, theirs = (kind.ColorJitter(*options) for kind in (distort, torchvision.transforms))
    for seed in range(20):
        given = drawn(ours, np.asarray(image), seed).astype(int)
        # Pillow drops the fraction after each of the three changes
        assert np.abs(given - np.asarray(drawn(theirs, image, seed))).mean() < 2


def test_crops_equal_those_of_pillow():
    pillow = v2.RandomResizedCrop(32, (0.2, 1), interpolation=v2.InterpolationMode.BICUBIC)
    for seed in range(20):
        torch.manual_seed(seed)
        given = random_crop(photo(96, 80), 32, [0.2, 1]).astype(int)
        torch.manual_seed(seed)
        assert np.abs(given - np.asarray(pillow(photo(96, 80)))).max() <= 2


@pytest.mark.parametrize("op", SHAPE_OPS + COLOUR_OPS)
def test_randaugment_changes_as_torchvision_does(op):
    torch.manual_seed(0)
    noise = Image.fromarray(torch.randint(40, 200, (40, 52, 3), dtype=torch.uint8).numpy())
    ours, theirs = randaugments([op], 1)
    for seed in range(4):  # more and less of it
        given = drawn(ours, np.asarray(noise), seed).astype(int)
        error = np.abs(given - np.asarray(drawn(theirs, noise, seed))).max(-1)
        # Halfway between two pixels, Pillow may take the other one
        assert (error > 1).mean() <= (0.002 if op == "Rotate" else 0)
        assert op == "Identity" or np.abs(given - np.asarray(noise)).mean() > 2


def test_randaugment_draws_as_torchvision_does():
    ours, theirs = randaugments(SHAPE_OPS + COLOUR_OPS, 2)
    for seed in range(40):
        given = drawn(ours, np.asarray(photo()), seed).astype(int)
        assert np.abs(given - np.asarray(drawn(theirs, photo(), seed))).mean() < 1


def randaugments(ops: Sequence[str], num_ops: int) -> tuple[RandAugment, v2.RandAugment]:
    theirs = v2.RandAugment(num_ops, 9, fill=[1, 2, 3])
    theirs._AUGMENTATION_SPACE = {op: theirs._AUGMENTATION_SPACE[op] for op in ops}
    return RandAugment(ops, num_ops, 9, [1, 2, 3]), theirs


def test_processors_can_be_pickled():
    processor = ImageTrainProcessor(32)
    twin = pickle.loads(pickle.dumps(processor))
    torch.testing.assert_close(drawn(twin, photo()), drawn(processor, photo()), rtol=0, atol=0)


def test_blur_is_a_gaussian():
    point = np.zeros((41, 41, 3), np.uint8)
    point[20, 20] = 255
    row = distort.blur(point, (2, 2))[20, :, 0].astype(float)
    x = np.arange(41) - 20
    expected = row[20] * np.exp(-(x**2) / (2 * 2**2))
    np.testing.assert_allclose(row, expected, atol=1)
    image = np.asarray(photo(96, 80))
    for sigma in (0.1, 0.5, 1, 2):
        error = distort.blur(image, (sigma, sigma)).astype(int) - cv2.GaussianBlur(
            image, (0, 0), sigma
        )
        assert np.abs(error).max() <= 1 and abs(error.mean()) < 0.05


def test_draws_come_from_torch_alone():
    processor = ImageTrainProcessor(24)
    python, numpy = random.getstate(), np.random.get_state()
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(torch.stack([processor(photo()) for _ in range(8)]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert results[0].std(0).mean() > 0.05
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy[1])


def test_colours_can_be_kept_true():
    orange = (240, 140, 20)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))

    def shown(processor: ImageTrainProcessor) -> set[tuple[int, ...]]:
        """Colours in the middle, where no operation shifts the padding to, of a plain image."""
        torch.manual_seed(0)
        tensors = [processor(Image.new("RGB", (30, 30), orange)) for _ in range(60)]
        middles = [(255 * (t * std + mean))[:, 12:20, 12:20].flatten(1) for t in tensors]
        return set(map(tuple, torch.cat(middles, 1).round().int().T.tolist()))

    assert shown(ImageTrainProcessor(32, keep_true=["colours"])) == {orange}
    assert len(shown(ImageTrainProcessor(32))) > 40


def test_left_and_right_can_be_kept_true():
    image = Image.new("RGB", (40, 40))
    image.paste("white", (20, 0, 40, 40))

    def flips(processor: ImageTrainProcessor) -> int:
        torch.manual_seed(0)
        tensors = [processor(image)[0] for _ in range(60)]
        return sum(bool(t[:, :8].mean() > t[:, 8:].mean()) for t in tensors)

    options = {"min_scale": 0.9, "color_jitter": None}
    assert flips(ImageTrainProcessor(16, keep_true=["left_right"], flip_p=1, **options)) == 0
    assert flips(ImageTrainProcessor(16, **options)) > 15


def test_reduced_decoding_never_enlarges_a_crop():
    processor = ImageTrainProcessor(256, min_scale=0.2)
    assert processor.min_side is not None
    smallest_crop = (0.2 * processor.min_side**2 * 3 / 4) ** 0.5
    assert 256 <= smallest_crop < 258
    assert ImageEvalProcessor(256).min_side is None  # evaluation sees the file as it is


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 0.5}, "unknown key softmask_image_train.flip: did you mean 'flip_p'?"),
        ({"keep_true": ["colors"]}, "unknown fact 'colors': did you mean 'colours'?"),
        ({"keep_true": []}, None),
        ({"image_size": 0}, "image_size"),
        ({"image_size": "big"}, "image_size"),
        ({"min_scale": 0.8, "max_scale": 0.5}, "min_scale"),
        ({"min_scale": "small"}, "softmask_image_train"),
        ({"color_jitter": [0.4]}, "color_jitter"),
        ({"color_jitter": [0.4, 0.4, 0.4, 0.9]}, "hue"),
        ({"flip_p": 1.5}, "probabilities"),
        ({"blur_p": "often"}, "probabilities"),
        ({"blur_sigma": [2, 1]}, "blur_sigma"),
        ({"randaugment_ops": -1}, "randaugment_ops"),
        ({"randaugment_magnitude": 31}, "randaugment_magnitude"),
        ({"mean": [0.5], "std": [0.5]}, "mean and std"),
    ],
    ids=str,
)
def test_wrong_options_get_one_clear_line(options, message):
    config = OmegaConf.create({"name": "softmask_image_train", **options})
    if message is None:
        ImageTrainProcessor.from_config(config)
        return
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        ImageTrainProcessor.from_config(config)
    assert "\n" not in str(caught.value)


# ---- text processors


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A Dog's red-haired  owner, waiting...\n", "a dogs red haired owner waiting"),
        ("<person> and/or a cat!", "person and or a cat"),
        ('"(*#:;~)"', ""),
        ("   ", ""),
        ("", ""),
        (None, ""),
        (float("nan"), ""),
        (12, "12"),
        (True, "true"),
    ],
)
def test_captions_are_cleaned_as_albef_does(raw, clean):
    assert CaptionProcessor()(raw) == clean


PIECES = ["A", "dog", "É", "ß", "7", "<person>", "-", "/", ",", ".", "'", "#", " ", "\n", "\u00a0"]


@given(st.lists(st.sampled_from(PIECES)).map("".join), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_cleaned_captions_keep_words_in_order(text, max_words):
    cleaned = CaptionProcessor(max_words)(text)
    words = re.sub("[-/]", " ", re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())).split()
    expected = [word.replace("<person>", "person") for word in words]
    assert cleaned.split() == expected[:max_words]
    assert cleaned == " ".join(cleaned.split())


def test_other_types_are_refused():
    with pytest.raises(UserError, match="softmask_question: expected text, got list"):
        QuestionProcessor()(["what", "is", "it"])


def test_questions_may_be_longer():
    text = "word " * 80
    assert len(CaptionProcessor()(text).split()) == 30
    assert len(QuestionProcessor()(text).split()) == 50
    assert len(QuestionProcessor.from_config({"max_words": 3})(text).split()) == 3
    for wrong in (0, 2.5, "many"):
        with pytest.raises(UserError, match="max_words"):
            CaptionProcessor.from_config({"max_words": wrong})
