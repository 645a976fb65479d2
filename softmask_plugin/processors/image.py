"""Image processors: strong distortions for training (SoftMask++'s), none for evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode, RandomResizedCrop, v2

from softmask_plugin.datasets.images import to_rgb
from softmask_plugin.errors import suggest
from softmask_plugin.processors.base import Processor
from softmask_plugin.processors.distort import ColorJitter, blur, greyscale
from softmask_plugin.processors.randaugment import RandAugment
from softmask_plugin.registry import register

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_ASPECT = (3 / 4, 4 / 3)  # range of a crop's width to height

# Facts in captions that a distortion could make false
FACTS = ("left_right", "colours")

# ALBEF's and TCL's selection of RandAugment's operations
SHAPE_OPS = ("Identity", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
COLOUR_OPS = ("AutoContrast", "Equalize", "Brightness")


def random_crop(image: Image.Image, size: int, scale: list[float]) -> np.ndarray:
    """torchvision's RandomResizedCrop, with the same draws, of a PIL image to (size, size, 3).

    torch resizes bytes like Pillow, up to one or two levels, in less than half the time.
    """
    top, left, height, width = RandomResizedCrop.get_params(image, scale, list(_ASPECT))
    # The crop alone, as an array without gaps: torch would copy any other first
    pixels = np.array(image.crop((left, top, left + width, top + height)))
    channels = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    (channels,) = interpolate(channels, (size, size), mode="bicubic", antialias=True)
    return channels.permute(1, 2, 0).numpy()


@register("processor", "softmask_image_eval")
class ImageEvalProcessor(Processor):
    """Any PIL image, or array (H, W, 3) or (H, W) of uint8 -> FloatTensor (3, image_size,
    image_size), resized without keeping the aspect ratio, as in ALBEF, and normalised.

    Raises:
        UserError: An image is something else.
    """

    # Shortest side, in pixels, to which a file may be reduced while it is decoded; None: full size
    min_side: int | None = None

    def __init__(
        self,
        image_size: int = 256,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.require(
            isinstance(image_size, int) and image_size >= 1,
            f"image_size must be a positive whole number of pixels, got {image_size!r}",
        )
        self.image_size = image_size
        size = [image_size, image_size]
        self.transform: Callable = v2.Resize(size, interpolation=InterpolationMode.BICUBIC)
        self.mean = tuple(CLIP_MEAN if mean is None else mean)
        self.std = tuple(CLIP_STD if std is None else std)
        self.require(
            len(self.mean) == len(self.std) == 3 and min(self.std) > 0,
            f"mean and std need three numbers each, std above 0, got {self.mean} and {self.std}",
        )

        # (x / 255 - mean) / std, in two passes over the image
        centre, spread = (255 * torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        self.scale, self.offset = 1 / spread, -centre / spread

    def __call__(self, image: Any) -> torch.Tensor:
        """Process one image."""
        pixels = np.asarray(self.transform(self.picture(image)))
        values = torch.from_numpy(np.stack(cv2.split(pixels))).to(torch.float32)
        return values.mul_(self.scale).add_(self.offset)

    @classmethod
    def picture(cls, image: Any) -> Image.Image:
        """A PIL image or array as 8-bit RGB; UserError if it is something else."""
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size:
            known = image.ndim > 1 and image.shape[2:] in ((), (3,))
            image = Image.fromarray(image) if known else image
        shape = f" of {image.dtype} {tuple(image.shape)}" if hasattr(image, "shape") else ""
        given = f"{type(image).__name__}{shape}"
        cls.require(
            isinstance(image, Image.Image),
            f"expected a PIL image or an array (H, W, 3) of uint8, got {given}",
        )
        return to_rgb(image)


@register("processor", "softmask_image_train")
class ImageTrainProcessor(ImageEvalProcessor):
    """Strong random distortions, by default those of TCL's pretraining (CVPR 2022).

    In order: crop, colour jitter, greyscale, blur, flip, RandAugment. A probability of 0 (or the
    value noted below) turns a distortion off. All draws come from torch's random generator.

    Args:
        image_size: Side of the square result, in pixels.
        min_scale, max_scale: Range of the share of the image's area that the crop keeps, in (0, 1].
            ``min_scale: null`` resizes the whole image instead.
        color_jitter: Greatest relative change of brightness, contrast and saturation, and greatest
            turn of the hue (share of the colour circle, at most 0.5). ``null``: off.
        color_jitter_p, grayscale_p, blur_p, flip_p: Probabilities.
        blur_sigma: Range of the blur's standard deviation, in pixels of the result. Lower it if
            ``image_size`` is far below 256.
        randaugment_ops: Number of RandAugment operations in a row. 0: off.
        randaugment_magnitude: Their strength, 0 to 30. TCL's own RandAugment has another scale, to
            10, and skips each operation half of the time: 9 here turns the image by 9 degrees and
            changes its brightness by 27%, TCL's 7 by 21 degrees and 36%.
        keep_true: Facts in captions that stay true, whatever the keys above say: ``left_right`` (no
            flip), ``colours`` (no jitter, no greyscale, no colour operations in RandAugment).
        mean, std: Of the three channels, for values in [0, 1]; ``null``: CLIP's.

    Raises:
        UserError: A value out of range.
    """

    def __init__(
        self,
        image_size: int = 256,
        min_scale: float | None = 0.2,
        max_scale: float = 1.0,
        color_jitter: Sequence[float] | None = (0.4, 0.4, 0.4, 0.1),
        color_jitter_p: float = 0.8,
        grayscale_p: float = 0.2,
        blur_p: float = 0.5,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        flip_p: float = 0.5,
        randaugment_ops: int = 2,
        randaugment_magnitude: int = 9,
        keep_true: Sequence[str] = (),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(image_size, mean, std)
        self.require(
            min_scale is None or 0 < min_scale <= max_scale <= 1,
            f"0 < min_scale <= max_scale <= 1 must hold, got {min_scale} and {max_scale}",
        )
        self.require(
            color_jitter is None or len(color_jitter) == 4,
            f"color_jitter needs brightness, contrast, saturation and hue, got {color_jitter}",
        )
        self.require(
            len(blur_sigma) == 2 and 0 < blur_sigma[0] <= blur_sigma[1],
            f"blur_sigma needs a least and a greatest value above 0, got {blur_sigma}",
        )
        self.require(
            isinstance(randaugment_ops, int) and randaugment_ops >= 0,
            f"randaugment_ops must be a whole number, at least 0, got {randaugment_ops!r}",
        )
        self.require(
            0 <= randaugment_magnitude <= 30,
            f"randaugment_magnitude must be in [0, 30], got {randaugment_magnitude}",
        )
        for p in (color_jitter_p, grayscale_p, blur_p, flip_p):
            valid = isinstance(p, (int, float)) and 0 <= p <= 1
            self.require(valid, f"probabilities must be in [0, 1], got {p!r}")
        for fact in keep_true:
            self.require(fact in FACTS, f"keep_true: unknown fact '{fact}': {suggest(fact, FACTS)}")

        keep_colours, keep_left_right = "colours" in keep_true, "left_right" in keep_true
        steps: list[Callable] = []
        # At this size, even the smallest and most oblong crop is no smaller than the result
        self.min_side = math.ceil(image_size / math.sqrt((min_scale or 1) * _ASPECT[0]))
        if min_scale is None:
            steps += [self.transform, np.asarray]
        else:
            steps.append(partial(random_crop, size=image_size, scale=[min_scale, max_scale]))
        if color_jitter is not None and color_jitter_p and not keep_colours:
            steps.append(v2.RandomApply([ColorJitter(*color_jitter)], color_jitter_p))
        if grayscale_p and not keep_colours:
            steps.append(v2.RandomApply([greyscale], grayscale_p))
        if blur_p:
            steps.append(v2.RandomApply([partial(blur, sigma=blur_sigma)], blur_p))
        if flip_p and not keep_left_right:
            steps.append(v2.RandomApply([partial(cv2.flip, flipCode=1)], flip_p))
        if randaugment_ops:
            ops = SHAPE_OPS if keep_colours else SHAPE_OPS + COLOUR_OPS
            fill = [round(255 * channel) for channel in self.mean]  # about zero when normalised
            steps.append(RandAugment(ops, randaugment_ops, randaugment_magnitude, fill))
        self.transform = v2.Compose(steps)
