"""Videos as files that browsers and players show."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fxq.runtime.writable import whole_file

Frames = NDArray[np.uint8]

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


def write_video(path: pathlib.Path, frames: Frames, frames_per_second: float = 8.0, scale: int = 8) -> pathlib.Path:
    """Write frames uint8 [F, H, W, 3] in one piece; see :func:`video_writer`.

    Raises:
        VideoError: as there.
    """
    with video_writer(path, frames_per_second, scale) as write:
        write(frames)
    return path


@contextlib.contextmanager
def video_writer(
    path: pathlib.Path, frames_per_second: float = 8.0, scale: int = 8
) -> Iterator[Callable[[Frames], None]]:
    """A function that adds frames uint8 [F, H, W, 3] to a GIF, WebP, PNG or MP4, chosen by suffix.

    Pixels are enlarged ``scale`` times. The file takes its place once the block is left without an error. MP4 is H.264
    (MPEG-4 part 2 where PyAV was built without it) in 4:2:0, as players want it, written as frames come; sides that are
    odd are repeated at the border. The other formats keep all frames until the end.

    Raises:
        VideoError: as :func:`check_format`; or when there is no frame.
    """
    check_format(path)
    kind = path.suffix.lower()[1:]
    with whole_file(path) as part:
        if kind == "mp4":
            with _mp4(part, frames_per_second) as add:
                yield lambda frames: add(np.stack([np.asarray(image) for image in _enlarged(frames, scale)]))
            return
        images: list[Image.Image] = []
        yield lambda frames: images.extend(_enlarged(frames, scale))
        if not images:
            raise VideoError(f"{path}: there is no frame to write")
        duration = round(1000 / frames_per_second)
        options: dict[str, Any] = {"lossless": True} if kind == "webp" else {}
        images[0].save(part, kind, save_all=True, append_images=images[1:], duration=duration, loop=0, **options)


def _enlarged(frames: Frames, scale: int) -> list[Image.Image]:
    height, width = frames.shape[1:3]
    size = (width * scale, height * scale)
    return [Image.fromarray(frame).resize(size, Image.Resampling.NEAREST) for frame in frames]


@contextlib.contextmanager
def _mp4(path: pathlib.Path, frames_per_second: float) -> Iterator[Callable[[Frames], None]]:
    import av

    name = next(codec for codec in _CODECS if codec in av.codecs_available)
    rate = Fraction(frames_per_second).limit_denominator(1001)
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(name, rate=rate, options=_CODECS[name])
        assert isinstance(stream, av.VideoStream)
        stream.pix_fmt = "yuv420p"
        written = 0

        def add(frames: Frames) -> None:
            nonlocal written
            even = np.pad(frames, ((0, 0), *((0, side % 2) for side in frames.shape[1:3]), (0, 0)), mode="edge")
            if not written:
                stream.height, stream.width = even.shape[1:3]
            for frame in even:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            written += len(even)

        yield add
        if not written:
            raise VideoError("there is no frame to write")
        container.mux(stream.encode())
