"""Colour jitter, greyscale, sharpness and blur of an RGB array (H, W, 3), uint8, with OpenCV.

They equal torchvision's up to rounding. Pillow's, which torchvision calls, take seven times as long
and round more coarsely. LAVIS depends on OpenCV.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torchvision import transforms

# A processor runs in one of many data-loader workers. OpenCV's own threads would compete with them,
# and would not survive the fork that starts a worker.
cv2.setNumThreads(0)

Pixels = np.ndarray


def brightness(pixels: Pixels, factor: float) -> Pixels:
    """Scale all values."""
    return cv2.addWeighted(pixels, factor, pixels, 0, 0)


def contrast(pixels: Pixels, factor: float) -> Pixels:
    """Move all values away from the mean grey (factor > 1) or towards it."""
    mean = round(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0])
    return cv2.addWeighted(pixels, factor, pixels, 0, (1 - factor) * mean)


def saturation(pixels: Pixels, factor: float) -> Pixels:
    """Move all pixels away from their own grey (factor > 1) or towards it."""
    return cv2.addWeighted(pixels, factor, greyscale(pixels), 1 - factor, 0)


def hue(pixels: Pixels, turn: float) -> Pixels:
    """Turn all hues by a share of the colour circle."""
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(256 * turn) % 256)  # the circle has 256 steps; uint8 wraps
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def greyscale(pixels: Pixels) -> Pixels:
    """The luminance in all three channels."""
    return cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def sharpness(pixels: Pixels, factor: float) -> Pixels:
    """Move all pixels away from the mean of their surroundings (factor > 1) or towards it."""
    smooth = pixels.copy()  # the outermost pixels do not change
    smooth[1:-1, 1:-1] = cv2.filter2D(pixels, -1, _SMOOTH)[1:-1, 1:-1]
    return cv2.addWeighted(pixels, factor, smooth, 1 - factor, 0)


_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's kernel


def blur(pixels: Pixels, sigma: tuple[float, float]) -> Pixels:
    """Blur with a standard deviation drawn from a range (pixels)."""
    return cv2.GaussianBlur(pixels, (0, 0), torch.empty(()).uniform_(*sigma).item())


class ColorJitter(transforms.ColorJitter):
    """torchvision's ColorJitter, with the same draws and ranges, for arrays."""

    CHANGES = (brightness, contrast, saturation, hue)

    def forward(self, pixels: Pixels) -> Pixels:
        """Change one image, in a random order of the changes."""
        order, *factors = self.get_params(self.brightness, self.contrast, self.saturation, self.hue)
        for i in order.tolist():
            if factors[i] is not None:
                pixels = self.CHANGES[i](pixels, factors[i])
        return pixels
