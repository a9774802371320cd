"""Videos of full precision and of bundles side by side: decoded together chunk by chunk, compared, and written."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from fxq.comparison.bundles.contestant import FULL_PRECISION, folder_name
from fxq.comparison.bundles.results import Floats
from fxq.comparison.bundles.runs import Run
from fxq.lab import frames_of
from fxq.metrics.latents import psnr
from fxq.metrics.similarity import ssim
from fxq.models.video.decoding import VideoDecoder
from fxq.report.side_by_side import side_by_side
from fxq.report.video import Frames, video_writer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """One bundle's video: PSNR in dB of each chunk, ``forced`` and ``free``, float64 [chunks], and its SSIM."""

    forced: Floats
    free: Floats
    ssim: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """One video.

    ``bundles`` by name; ``clip``: the side-by-side's path below the folder of the clips, or ""; ``decoding``: seconds
    that each chunk of full precision took, empty without a decoder.
    """

    bundles: Mapping[str, Judged]
    clip: str = ""
    decoding: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clips:
    """Where the videos go.

    Attributes:
        folder: of all of them.
        suffix: their format, such as ``.mp4``.
        frames_per_second: of them.
        edge: shorter side in pixels that small frames are enlarged to at least.
        keep: gets the frames uint8 [F, H, W, 3] of each version chunk by chunk: (name, frames).
    """

    folder: pathlib.Path
    suffix: str
    frames_per_second: float
    edge: int = 160
    keep: Callable[[str, Frames], None] | None = None


def judge(
    reference: Run,
    others: Mapping[str, Run],
    frames_per_chunk: int,
    decoder: VideoDecoder | None,
    clips: Clips | None,
    name: str,
) -> Verdict:
    """Compare bundles' videos with full precision's, and write the videos.

    Without a decoder latents are compared, between the extremes of full precision's. With one every version is decoded
    by a stream of its own, and chunks that were made from full precision's history are decoded after its frames.

    Args:
        reference: full precision's.
        others: the bundles' by name.
        frames_per_chunk: latents of a chunk.
        decoder: of latents.
        clips: where videos go; None: nowhere.
        name: of this video's files.
    """
    if decoder is None:
        limits = float(reference.free.min()), float(reference.free.max())
        parts = zip(*(_chunks(run, frames_per_chunk) for run in (reference, *others.values())), strict=True)
        gathered = _Gathered(list(others), limits)
        for (want, _), *got in parts:
            gathered.add(want, [(free, want if forced is None else forced) for free, forced in got])
        return Verdict(bundles=gathered.judged())
    return _decoded(reference, others, frames_per_chunk, decoder, clips, name)


def _chunks(run: Run, size: int) -> Sequence[tuple[Tensor, Tensor | None]]:
    """Latents of each chunk, free and forced."""
    forced = [None] * len(run.free.split(size)) if run.forced is None else list(run.forced.split(size))
    return list(zip(run.free.split(size), forced, strict=True))


class _Gathered:
    """Measures of the chunks of one video of several versions."""

    def __init__(self, names: Sequence[str], limits: tuple[float, float]) -> None:
        self.names, self.limits = names, limits if limits[1] > limits[0] else (limits[0], limits[0] + 1.0)
        self.forced: list[list[float]] = [[] for _ in names]
        self.free: list[list[float]] = [[] for _ in names]
        self.alike: list[list[float]] = [[] for _ in names]
        self.weights: list[int] = []

    def add(self, want: Tensor, got: Sequence[tuple[Tensor, Tensor]]) -> None:
        """One chunk: what it should be [F, C, H, W], and of each version (free, forced)."""
        self.weights.append(len(want))
        for i, (free, forced) in enumerate(got):
            self.free[i].append(float(psnr(free[None], want[None], *self.limits)[0]))
            self.forced[i].append(float(psnr(forced[None], want[None], *self.limits)[0]))
            self.alike[i].append(float(ssim(free[None].float(), want[None].float(), *self.limits)[0]))

    def judged(self) -> dict[str, Judged]:
        """By name, all chunks."""
        return {
            name: Judged(
                forced=np.array(self.forced[i]),
                free=np.array(self.free[i]),
                ssim=float(np.average(self.alike[i], weights=self.weights)),
            )
            for i, name in enumerate(self.names)
        }


def _decoded(
    reference: Run,
    others: Mapping[str, Run],
    frames_per_chunk: int,
    decoder: VideoDecoder,
    clips: Clips | None,
    name: str,
) -> Verdict:
    gathered = _Gathered(list(others), (-1.0, 1.0))
    truth, streams = decoder.begin(), {other: decoder.begin() for other in others}
    everyone, seconds = [_chunks(run, frames_per_chunk) for run in (reference, *others.values())], []
    with contextlib.ExitStack() as stack:
        written = None if clips is None else _Writers(clips, list(others), name, stack)
        for (latents, _), *rest in zip(*everyone, strict=True):
            before, start = truth.fork(), time.perf_counter()
            want = truth.decode(latents[None])[0]
            seconds.append(time.perf_counter() - start)
            got = []
            for other, (free, forced) in zip(others, rest, strict=True):
                shown = streams[other].decode(free[None])[0]
                alone = before.fork().decode((free if forced is None else forced)[None])[0]
                got.append((shown, alone))
            gathered.add(want, got)
            if written is not None:
                written.add(want, [shown for shown, _ in got])
    clip = "" if written is None else written.path
    return Verdict(bundles=gathered.judged(), clip=clip, decoding=tuple(seconds))


class _Writers:
    """The side-by-side of one video, and a file of each version."""

    def __init__(self, clips: Clips, others: Sequence[str], name: str, stack: contextlib.ExitStack) -> None:
        self.clips, self.others, self.name, self.stack = clips, others, name, stack
        self.path = f"side_by_side/{name}{clips.suffix}"
        self._write: dict[str, Callable[[Frames], None]] = {}
        self._scale = 1

    def _open(self, frames: Frames) -> None:
        self._scale = max(1, -(-self.clips.edge // min(frames.shape[1:3])))
        rate = self.clips.frames_per_second
        # The side-by-side is enlarged where its panels are put together: names are not.
        self._write[self.path] = self.stack.enter_context(video_writer(self.clips.folder / self.path, rate, 1))
        for version in (FULL_PRECISION, *self.others):
            path = self.clips.folder / folder_name(version) / f"{self.name}{self.clips.suffix}"
            self._write[version] = self.stack.enter_context(video_writer(path, rate, self._scale))

    def add(self, want: Tensor, got: Sequence[Tensor]) -> None:
        """Frames float [F, 3, H, W] in -1..1 of full precision and of each version."""
        frames = {FULL_PRECISION: frames_of(want)} | {
            other: frames_of(video) for other, video in zip(self.others, got, strict=True)
        }
        if not self._write:
            self._open(frames[FULL_PRECISION])
        for version, shown in frames.items():
            self._write[version](shown)
            if self.clips.keep is not None:
                self.clips.keep(version, shown)
        rest = {other: frames[other] for other in self.others}
        self._write[self.path](side_by_side((FULL_PRECISION, frames[FULL_PRECISION]), rest, self._scale))
