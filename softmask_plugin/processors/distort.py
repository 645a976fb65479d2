"""Colour jitter, greyscale, sharpness and blur of an RGB array (H, W, 3), uint8, by OpenCV.

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
    return cv2.convertScaleAbs(pixels, alpha=factor)


def contrast(pixels: Pixels, factor: float) -> Pixels:
    """Move all values away from the mean grey (factor > 1) or towards it."""
    mean = round(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0])
    return cv2.addWeighted(pixels, factor, pixels, 0, (1 - factor) * mean)


def saturation(pixels: Pixels, factor: float) -> Pixels:
    """Move all pixels away from their own grey (factor > 1) or towards it."""
    return cv2.transform(pixels, factor * np.eye(3) + (1 - factor) * _LUMINANCE)


_LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green and blue


def hue(pixels: Pixels, turn: float) -> Pixels:
    """Turn all hues by a share of the colour circle."""
    hues, saturations, values = cv2.split(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL))
    chroma = cv2.multiply(saturations, values, scale=1 / 255)
    channels = []
    for primary in (0, 1 / 3, 2 / 3):
        # Distance of the hue from a channel's own, in 1/512 of the circle; int8 wraps around it
        whole, rest = divmod(256 * (turn - primary), 1)
        moved = (hues + np.uint8(whole % 256)).view(np.int8)
        distance = cv2.convertScaleAbs(moved, alpha=2, beta=2 * rest)
        # The channel has all of the chroma up to 1/6 of the circle, none from 1/3 on
        lack = cv2.addWeighted(distance, 255 * 6 / 512, distance, 0, -255)
        channels.append(cv2.subtract(values, cv2.multiply(chroma, lack, scale=1 / 255)))
    return cv2.merge(channels)


def greyscale(pixels: Pixels) -> Pixels:
    """The luminance in all three channels."""
    return cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def sharpness(pixels: Pixels, factor: float) -> Pixels:
    """Move all pixels away from the mean of their surroundings (factor > 1) or towards it."""
    # Pillow's surroundings: the mean of 3 x 3 pixels, of which the middle one counts five times
    share = (1 - factor) * 9 / 13
    sharp = cv2.addWeighted(pixels, 1 - share, cv2.blur(pixels, (3, 3)), share, 0)
    for edge in (0, -1):  # the outermost pixels do not change
        sharp[edge], sharp[:, edge] = pixels[edge], pixels[:, edge]
    return sharp


def blur(pixels: Pixels, sigma: tuple[float, float]) -> Pixels:
    """Blur with a standard deviation drawn from a range (pixels)."""
    deviation = torch.empty(()).uniform_(*sigma).item()
    # OpenCV's own Gaussian blur, of the same size, takes a third longer
    kernel = cv2.getGaussianKernel(round(6 * deviation + 1) | 1, deviation, cv2.CV_32F)
    return cv2.sepFilter2D(pixels, -1, kernel, kernel)


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
