"""Small videos as files that browsers and players show."""

from __future__ import annotations

import pathlib
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FORMATS = (".gif", ".webp", ".png", ".mp4")
_CODECS = {"libx264": {"crf": "12", "preset": "medium"}, "mpeg4": {"q": "2"}}
"""Encoders of MP4 in the order in which they are looked for, nearly without loss."""


class VideoError(ValueError):
    """A video that cannot be written so."""


def check_format(path: pathlib.Path) -> pathlib.Path:
    """See that a video of this name can be written.

    Raises:
        VideoError: for another suffix, or .mp4 where PyAV is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise VideoError(f"{path}: videos are written as {', '.join(FORMATS)}; choose such a name")
    if path.suffix.lower() == ".mp4":
        try:
            import av  # noqa: F401
        except ImportError:
            raise VideoError(
                f'{path}: .mp4 is written by PyAV, which is not installed: pip install "fxq[video]", or choose .webp'
            ) from None
    return path


def write_video(
    path: pathlib.Path, frames: NDArray[np.uint8], frames_per_second: float = 8.0, scale: int = 8
) -> pathlib.Path:
    """Write frames uint8 [F, H, W, 3] as GIF, WebP, PNG or MP4, chosen by suffix, pixels enlarged ``scale`` times.

    MP4 is H.264 (MPEG-4 part 2 where PyAV was built without it) in 4:2:0, as players want it; sides that are odd are
    repeated at the border.

    Raises:
        VideoError: as :func:`check_format`.
    """
    check_format(path)
    height, width = frames.shape[1:3]
    size = (width * scale, height * scale)
    images = [Image.fromarray(frame).resize(size, Image.Resampling.NEAREST) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    duration = round(1000 / frames_per_second)
    if path.suffix.lower() == ".mp4":
        _write_mp4(path, np.stack([np.asarray(image) for image in images]), frames_per_second)
    elif path.suffix.lower() == ".webp":
        images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0, lossless=True)
    else:
        images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)
    return path


def _write_mp4(path: pathlib.Path, frames: NDArray[np.uint8], frames_per_second: float) -> None:
    import av

    name = next(codec for codec in _CODECS if codec in av.codecs_available)
    even = np.pad(frames, ((0, 0), *((0, side % 2) for side in frames.shape[1:3]), (0, 0)), mode="edge")
    rate = Fraction(frames_per_second).limit_denominator(1001)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(name, rate=rate, options=_CODECS[name])
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = *even.shape[1:3], "yuv420p"
        for frame in even:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
