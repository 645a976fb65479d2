"""Image processors: strong distortions to train (SoftMask++'s augmentation), none to evaluate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from softmask_plugin.datasets.images import to_rgb
from softmask_plugin.errors import suggest
from softmask_plugin.processors.base import Processor
from softmask_plugin.processors.distort import (
    ColorJitter,
    GaussianBlur,
    brightness,
    greyscale,
    sharpness,
)
from softmask_plugin.registry import register

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_ASPECT = (3 / 4, 4 / 3)  # of a crop, width to height

# What captions may state that a distortion would make false.
FACTS = ("left_right", "colours")

# RandAugment's operations as ALBEF and TCL restrict them.
SHAPE_OPS = ("Identity", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
COLOUR_OPS = ("AutoContrast", "Equalize", "Brightness")


class RandAugment(v2.RandAugment):
    """torchvision's RandAugment restricted to the operations named ``ops``."""

    def __init__(self, ops: Sequence[str], num_ops: int, magnitude: int, fill: list[int]) -> None:
        super().__init__(num_ops, magnitude, fill=fill)
        self.ops = list(ops)

    @property
    def _AUGMENTATION_SPACE(self) -> dict[str, Any]:
        # Not kept: its lambdas cannot travel to a spawned worker.
        return {op: v2.RandAugment._AUGMENTATION_SPACE[op] for op in self.ops}

    def _apply_image_or_video_transform(
        self, image: Image.Image, transform_id: str, magnitude: float, **rest: Any
    ) -> Image.Image:
        if transform_id in _BY_OPENCV:
            changed = _BY_OPENCV[transform_id](np.asarray(image), 1 + magnitude)
            return Image.fromarray(changed)
        return super()._apply_image_or_video_transform(image, transform_id, magnitude, **rest)


# Pillow's sharpness takes longer than all other operations together.
_BY_OPENCV = {"Sharpness": sharpness, "Brightness": brightness}


class RandomCrop(v2.RandomResizedCrop):
    """torchvision's crop of a PIL image, as an array (H, W, 3) of the given size.

    Torch resizes bytes as Pillow does, to a level or two, in less than half of the time.
    """

    def __init__(self, size: int, min_scale: float, max_scale: float) -> None:
        super().__init__(
            size, (min_scale, max_scale), _ASPECT, InterpolationMode.BICUBIC, antialias=True
        )

    def forward(self, image: Image.Image) -> np.ndarray:
        """Crop one image."""
        channels = super().forward(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        return cv2.merge(list(channels.numpy()))


class ImageProcessor(Processor):
    """Any PIL image -> FloatTensor (3, image_size, image_size), normalised channel by channel.

    Attributes:
        min_side: image files may be decoded at a reduced size as long as no side gets shorter than
            this, pixels; None: only at full size.
    """

    min_side: int | None = None
    transform: Callable[[Image.Image], Image.Image]

    def __init__(
        self, image_size: int, mean: Sequence[float] | None, std: Sequence[float] | None
    ) -> None:
        self.require(
            isinstance(image_size, int) and image_size >= 1,
            f"image_size must be a positive whole number of pixels, got {image_size!r}",
        )
        self.image_size = image_size
        self.mean = tuple(CLIP_MEAN if mean is None else mean)
        self.std = tuple(CLIP_STD if std is None else std)
        self.require(
            len(self.mean) == len(self.std) == 3 and min(self.std) > 0,
            f"mean and std need three numbers each, std above 0, got {self.mean} and {self.std}",
        )

        # (x / 255 - mean) / std in two passes over the image
        centre, spread = (255 * torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        self.scale, self.offset = 1 / spread, -centre / spread

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Process one image."""
        pixels = torch.from_numpy(np.array(self.transform(to_rgb(image)))).permute(2, 0, 1)
        values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return values.mul_(self.scale).add_(self.offset)


@register("processor", "softmask_image_eval")
class ImageEvalProcessor(ImageProcessor):
    """Resize to a square (the aspect ratio is not kept, as in ALBEF) and normalise."""

    NAME = "softmask_image_eval"

    def __init__(
        self,
        image_size: int = 256,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(image_size, mean, std)
        self.transform = _resize(image_size)


@register("processor", "softmask_image_train")
class ImageTrainProcessor(ImageProcessor):
    """Strong random distortions, by default those of TCL's pretraining (CVPR 2022).

    In order: crop, colour jitter, greyscale, blur, flip, RandAugment. A probability of 0 (or the
    value noted below) turns a distortion off. All draws come from torch's random generator.

    Args:
        image_size: side of the square result, pixels.
        min_scale, max_scale: share of the image's area that the crop keeps, in (0, 1].
            ``min_scale: null`` resizes the whole image instead.
        color_jitter: greatest relative change of brightness, contrast and saturation, and the
            greatest turn of the hue (share of the colour circle, at most 0.5). ``null``: off.
        color_jitter_p, grayscale_p, blur_p, flip_p: probabilities.
        blur_sigma: least and greatest standard deviation of the blur, pixels of the result. Lower
            it where ``image_size`` is far below 256.
        randaugment_ops: how many RandAugment operations are applied in a row. 0: off.
        randaugment_magnitude: their strength, 0 to 30. TCL's own RandAugment has another scale, to
            10, and skips each operation half of the time: 9 here turns the image by 9 degrees and
            changes its brightness by 27%, TCL's 7 by 21 degrees and 36%.
        keep_true: what captions state and no distortion may falsify, whatever the keys above say:
            ``left_right`` (no flip), ``colours`` (no jitter, no greyscale, and RandAugment keeps
            to geometry and sharpness).
        mean, std: of the three channels, for values in [0, 1]; ``null``: CLIP's.

    Raises:
        UserError: a value out of its range.
    """

    NAME = "softmask_image_train"

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
            0 <= randaugment_magnitude <= 30,
            f"randaugment_magnitude must lie in [0, 30], got {randaugment_magnitude}",
        )
        for p in (color_jitter_p, grayscale_p, blur_p, flip_p):
            self.require(
                isinstance(p, (int, float)) and 0 <= p <= 1,
                f"probabilities must lie in [0, 1], got {p!r}",
            )
        for fact in keep_true:
            self.require(fact in FACTS, f"keep_true: unknown fact '{fact}': {suggest(fact, FACTS)}")

        keep_colours, keep_left_right = "colours" in keep_true, "left_right" in keep_true
        steps: list[Callable] = []
        # The smallest and most oblong crop is then still no smaller than the result.
        self.min_side = math.ceil(image_size / math.sqrt((min_scale or 1) * _ASPECT[0]))
        if min_scale is None:
            steps += [_resize(image_size), np.asarray]
        else:
            steps.append(RandomCrop(image_size, min_scale, max_scale))
        if color_jitter is not None and color_jitter_p and not keep_colours:
            steps.append(v2.RandomApply([ColorJitter(*color_jitter)], color_jitter_p))
        if grayscale_p and not keep_colours:
            steps.append(v2.RandomApply([greyscale], grayscale_p))
        if blur_p:
            steps.append(v2.RandomApply([GaussianBlur(blur_sigma)], blur_p))
        steps.append(Image.fromarray)
        if flip_p and not keep_left_right:
            steps.append(v2.RandomHorizontalFlip(flip_p))
        if randaugment_ops:
            ops = SHAPE_OPS if keep_colours else SHAPE_OPS + COLOUR_OPS
            fill = [round(255 * channel) for channel in self.mean]  # normalises to about zero
            steps.append(RandAugment(ops, randaugment_ops, randaugment_magnitude, fill))
        self.transform = v2.Compose(steps)


def _resize(size: int) -> v2.Transform:
    return v2.Resize([size, size], interpolation=InterpolationMode.BICUBIC)
