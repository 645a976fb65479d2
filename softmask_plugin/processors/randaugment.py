"""RandAugment of an RGB array (H, W, 3), uint8, by OpenCV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import cv2
import numpy as np
import torch

from softmask_plugin.processors.distort import Pixels, brightness, sharpness


class RandAugment:
    """torchvision's RandAugment (arXiv:1909.13719), with the same draws and magnitudes, for arrays.

    Args:
        ops: Names of the operations to draw from, as in torchvision.
        num_ops: Number of operations in a row.
        magnitude: Their strength, 0 to 30.
        fill: Colour of what lies outside the image.
    """

    def __init__(
        self, ops: Sequence[str], num_ops: int, magnitude: int, fill: Sequence[int]
    ) -> None:
        self.ops, self.num_ops, self.strength, self.fill = ops, num_ops, magnitude / 30, fill

    def __call__(self, pixels: Pixels) -> Pixels:
        """Change one image."""
        for _ in range(self.num_ops):
            op = self.ops[int(torch.randint(len(self.ops), ()))]
            if op in _PLAIN:
                pixels = _PLAIN[op](pixels)
            else:
                strength = -self.strength if torch.rand(()) <= 0.5 else self.strength
                pixels = _SIGNED[op](pixels, strength, self.fill)
        return pixels


def _autocontrast(channel: Pixels) -> Pixels:
    low, high, *_ = cv2.minMaxLoc(channel)
    if low == high:
        return channel
    scale = 255 / (high - low)
    return cv2.addWeighted(channel, scale, channel, 0, -scale * low)


def _equalize(channel: Pixels) -> Pixels:
    counts = cv2.calcHist([channel], [0], None, [256], [0, 256]).astype(int).ravel()
    step = (channel.size - counts[channel.max()]) // 255
    if step == 0:
        return channel
    levels = (counts.cumsum() - counts + step // 2) // step
    return cv2.LUT(channel, levels.clip(max=255).astype(np.uint8))


def _each_channel(change: Callable[[Pixels], Pixels], pixels: Pixels) -> Pixels:
    return cv2.merge([change(channel) for channel in cv2.split(pixels)])


def _shear(pixels: Pixels, strength: float, fill: Sequence[int], axis: int) -> Pixels:
    matrix = np.eye(2, 3)
    # Measured from the image's edge, which is half a pixel from OpenCV's origin
    matrix[axis] += 0.3 * strength * np.array([axis, 1 - axis, 0.5])
    return _warp(pixels, matrix, fill)


def _rotate(pixels: Pixels, strength: float, fill: Sequence[int]) -> Pixels:
    height, width = pixels.shape[:2]
    centre = (width - 1) / 2, (height - 1) / 2
    return _warp(pixels, cv2.getRotationMatrix2D(centre, -30 * strength, 1), fill)


def _warp(pixels: Pixels, matrix: np.ndarray, fill: Sequence[int]) -> Pixels:
    """Fetch each pixel from where the matrix maps it to."""
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(pixels, matrix, pixels.shape[1::-1], flags=flags, borderValue=fill)


def _translate(pixels: Pixels, strength: float, fill: Sequence[int], axis: int) -> Pixels:
    size = pixels.shape[1 - axis]
    shift = int(150 / 331 * size * strength)
    before, after = max(shift, 0), max(-shift, 0)
    if axis == 0:
        inside, border = pixels[:, after : size - before], (0, 0, before, after)
    else:
        inside, border = pixels[after : size - before], (before, after, 0, 0)
    return cv2.copyMakeBorder(inside, *border, cv2.BORDER_CONSTANT, value=fill)


_PLAIN: dict[str, Callable[..., Pixels]] = {
    "Identity": lambda pixels: pixels,
    "AutoContrast": partial(_each_channel, _autocontrast),
    "Equalize": partial(_each_channel, _equalize),
}
_SIGNED: dict[str, Callable[..., Pixels]] = {
    "Brightness": lambda pixels, strength, _: brightness(pixels, 1 + 0.9 * strength),
    "Sharpness": lambda pixels, strength, _: sharpness(pixels, 1 + 0.9 * strength),
    "ShearX": partial(_shear, axis=0),
    "ShearY": partial(_shear, axis=1),
    "TranslateX": partial(_translate, axis=0),
    "TranslateY": partial(_translate, axis=1),
    "Rotate": _rotate,
}
