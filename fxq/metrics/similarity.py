"""Structural similarity of videos, frame by frame (Wang, Bovik, Sheikh, Simoncelli 2004)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from fxq.metrics.latents import Floats

_WINDOW, _DEVIATION = 11, 1.5
_K1, _K2 = 0.01, 0.03


def _gauss(size: int) -> Tensor:
    x = torch.arange(size, dtype=torch.float64, device="cpu") - (size - 1) / 2
    weights = torch.exp(-x.square() / (2 * _DEVIATION**2))
    return weights / weights.sum()


def ssim(got: Tensor, want: Tensor, low: float = -1.0, high: float = 1.0) -> Floats:
    """Mean structural similarity of each video, 1 for identical ones.

    Every channel of every frame is an image on its own; a Gaussian window of 11 pixels (deviation 1.5; fewer pixels
    where frames are smaller) moves over it where it fits whole.

    Args:
        got: [V, F, C, H, W].
        want: of the same shape.
        low: lower end of the values; they are clamped to the range, whose length sets the two constants.
        high: upper end.

    Returns:
        float64 [V].

    Raises:
        ValueError: when the shapes differ, or the range is empty.
    """
    if got.shape != want.shape:
        raise ValueError(f"videos of shapes {tuple(got.shape)} and {tuple(want.shape)} cannot be compared")
    if not high > low:
        raise ValueError(f"values between {low} and {high}: expected a range")
    return np.array([_of_video(a, b, low, high) for a, b in zip(got, want, strict=True)])


def _of_video(got: Tensor, want: Tensor, low: float, high: float) -> float:
    x, y = (video.cpu().double().clamp(low, high).flatten(0, 1).unsqueeze(1) for video in (got, want))
    kernel = _gauss(min(_WINDOW, x.shape[-2], x.shape[-1]))

    def smooth(images: Tensor) -> Tensor:
        return conv2d(conv2d(images, kernel[None, None, :, None]), kernel[None, None, None, :])

    mean_x, mean_y = smooth(x), smooth(y)
    variance_x, variance_y = smooth(x * x) - mean_x.square(), smooth(y * y) - mean_y.square()
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * (high - low)) ** 2, (_K2 * (high - low)) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float((luminance * structure).mean())
