"""Small videos as animated files."""

from __future__ import annotations

import pathlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FORMATS = (".gif", ".webp", ".png")


def write_video(
    path: pathlib.Path, frames: NDArray[np.uint8], frames_per_second: float = 8.0, scale: int = 8
) -> pathlib.Path:
    """Write frames uint8 [F, H, W, 3] as animated GIF, WebP or PNG, chosen by suffix, pixels enlarged ``scale`` times.

    Raises:
        ValueError: for another suffix.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path.name}: videos are written as {', '.join(FORMATS)}")
    height, width = frames.shape[1:3]
    size = (width * scale, height * scale)
    images = [Image.fromarray(frame).resize(size, Image.Resampling.NEAREST) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    duration = round(1000 / frames_per_second)
    if path.suffix.lower() == ".webp":
        images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0, lossless=True)
    else:
        images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)
    return path
