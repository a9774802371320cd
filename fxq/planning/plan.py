"""Puts memory and speed together: what fits a GPU at which minute, and how fast it is expected to be."""

from __future__ import annotations

import dataclasses
import pathlib
from dataclasses import dataclass
from functools import cached_property

from fxq.core.config import Recipe
from fxq.planning.drive import Drive
from fxq.planning.gpus import GIB, Gpu, PlanningError, Range
from fxq.planning.job import estimate_job
from fxq.planning.memory import (
    CACHE_FORMATS,
    CacheFormat,
    LinearCall,
    activation_bytes,
    cache_bytes,
    linear_calls,
    meta_model,
    text_bytes,
    weight_bytes,
)
from fxq.planning.roofline import ARITHMETICS, chunk_seconds, frames_per_second, gain
from fxq.planning.speed import Speed as JobSpeed
from fxq.planning.workloads import Workload
from fxq.presets import PRESETS

RESERVE = 1.5 * GIB
"""For the CUDA context, libraries and what the allocator cannot use."""
TRAINED_FRAMES = 21
VIDEOS = 16
"""Of a calibration, where nobody says how many."""
MARKS = (5 / 60, 0.5, 1, 2, 5, 10, 30, 60)
LONGEST_MINUTES = 24 * 60
WEIGHTS: tuple[tuple[str, Recipe | None], ...] = (("bf16", None), ("W8A8", PRESETS["w8a8"]), ("W4A8", PRESETS["w4a8"]))


@dataclass(frozen=True)
class Fit:
    """Weights and a cache policy on the GPU.

    ``bytes`` at the asked minute with one video, ``fits`` whether the GPU holds them, ``minutes`` the longest video it
    holds (0: none, None: any length), ``videos`` how many at a time at the asked minute.
    """

    weights: str
    cache: str
    window: int
    bytes: int
    fits: bool
    minutes: float | None
    videos: int


@dataclass(frozen=True)
class Speed:
    """Expected seconds per chunk (fast, slow) and frames per second (low, high) of an arithmetic at a cache length."""

    arithmetic: str
    moment: str
    keys: int
    seconds: Range
    fps: Range


@dataclass(frozen=True)
class Plan:
    """A model on a GPU for so many minutes of video; every number is an estimate from shapes.

    ``window`` is that of the windowed caches, in latent frames; ``other`` bytes are taken by other things on the GPU.
    """

    workload: Workload
    gpu: Gpu
    minutes: float
    window: int
    other: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= LONGEST_MINUTES:
            raise PlanningError(f"minutes = {self.minutes}: expected more than 0, at most {LONGEST_MINUTES}")
        if self.other < 0:
            raise PlanningError(f"other memory = {self.other} bytes: expected 0 or more")
        dataclasses.replace(self.workload, window=self.window)  # refuses one that is too small

    @property
    def usable(self) -> int:
        """Bytes of the GPU for this model."""
        return self.gpu.memory - int(RESERVE) - self.other

    @property
    def windows(self) -> tuple[int, ...]:
        """The windowed cache and the full one (-1)."""
        return (self.window, -1)

    @cached_property
    def weights(self) -> dict[str, int]:
        """Bytes of the weights in bf16, W8A8 and W4A8."""
        model = meta_model(self.workload.config)
        return {name: weight_bytes(model, recipe) for name, recipe in WEIGHTS}

    @cached_property
    def linears(self) -> tuple[LinearCall, ...]:
        """Linears of one denoiser call."""
        workload = self.workload
        return linear_calls(meta_model(workload.config), workload.frames_per_chunk, workload.latent)

    def quantizing(self) -> dict[str, tuple[int, int]]:
        """Memory and disk, in bytes, of the machine that quantizes the model, by weights.

        With the preset and a checkpoint directory, on 16 videos of 21 latent frames of this size.
        """
        workload = self.workload
        chunks = -(-TRAINED_FRAMES // workload.frames_per_chunk)
        calls = VIDEOS * chunks * (workload.steps + workload.context_calls)
        first, last = (
            activation_bytes(workload, frames, self.window)
            + 2 * cache_bytes(workload, frames, self.window, CACHE_FORMATS[0])
            for frames in (workload.frames_per_chunk, chunks * workload.frames_per_chunk)
        )
        drive = Drive(calls=calls, tokens=workload.chunk_tokens, call_bytes=last)
        example = dataclasses.replace(drive, call_bytes=first)
        model, found = meta_model(workload.config), {}
        for name, recipe in WEIGHTS:
            if recipe is not None:
                here, speed = pathlib.Path(), JobSpeed(1.0, 0.0)
                needed = estimate_job(model, recipe, drive, example=example, folder=here, speed=speed)
                found[name] = needed.ram_bytes, needed.disk_bytes
        return found

    def cache_over_time(self) -> list[tuple[str, list[tuple[float, int]]]]:
        """For each cache policy its name and (minutes, bytes) up to the asked minute."""
        marks = [mark for mark in MARKS if mark < self.minutes] + [self.minutes]
        frames = [self.workload.frames(mark) for mark in marks]
        return [
            (cache_name(window, stored), list(zip(marks, sizes, strict=True)))
            for window in self.windows
            for stored in CACHE_FORMATS
            for sizes in [[cache_bytes(self.workload, count, window, stored) for count in frames]]
        ]

    def needed(self, weights: str, frames: int, window: int, stored: CacheFormat) -> int:
        """Bytes with one video after ``frames`` latent frames."""
        shared = self.weights[weights] + activation_bytes(self.workload, frames, window)
        return shared + self.per_video(frames, window, stored)

    def per_video(self, frames: int, window: int, stored: CacheFormat) -> int:
        """Bytes that every further video needs: its keys and values, and those of its text."""
        return cache_bytes(self.workload, frames, window, stored) + text_bytes(self.workload.config)

    def fits(self) -> list[Fit]:
        """Every choice of weights with every cache policy."""
        return [
            self._fit(weights, window, stored)
            for weights in self.weights
            for window in self.windows
            for stored in CACHE_FORMATS
        ]

    def _fit(self, weights: str, window: int, stored: CacheFormat) -> Fit:
        frames = self.workload.frames(self.minutes)
        needed, each = self.needed(weights, frames, window, stored), self.per_video(frames, window, stored)
        return Fit(
            weights=weights,
            cache=cache_name(window, stored),
            window=window,
            bytes=needed,
            fits=needed <= self.usable,
            minutes=self._longest(weights, window, stored),
            videos=max(0, (self.usable - needed) // each + 1) if needed <= self.usable else 0,
        )

    def _longest(self, weights: str, window: int, stored: CacheFormat) -> float | None:
        """Minutes of video until memory is full; None where it never is, 0 where not even a chunk fits."""
        workload = self.workload
        size, least = workload.frames_per_chunk, 0
        most = workload.frames(LONGEST_MINUTES) // size
        teeth = stored.policy(workload, window).span  # memory falls whenever a span is encoded

        def fits(chunks: int) -> bool:
            last = range(max(0, chunks - teeth), chunks + 1)
            return all(self.needed(weights, count * size, window, stored) <= self.usable for count in last)

        if fits(most):
            return None
        while least < most:
            middle = (least + most + 1) // 2
            if fits(middle):
                least = middle
            else:
                most = middle - 1
        return least * workload.chunk_seconds / 60

    def moments(self) -> list[tuple[str, int]]:
        """Moments of the video and how many tokens a chunk then attends to."""
        workload, frames = self.workload, self.workload.frames(self.minutes)
        found = [("first chunk", workload.frames_per_chunk)]
        for window, text in ((self.window, f"window of {self.window} frames"), (-1, "full cache")):
            found.append((f"{text}, at {clock(self.minutes)}", workload.kept_frames(frames, window)))
        return [(text, count * workload.tokens_per_frame) for text, count in found]

    def speeds(self) -> list[Speed]:
        """Expected speed of every arithmetic at every moment."""
        rows = []
        for arithmetic in ARITHMETICS:
            for moment, keys in self.moments():
                seconds = chunk_seconds(self.workload, self.linears, self.gpu, arithmetic, keys)
                fps = frames_per_second(self.workload, seconds)
                rows.append(Speed(arithmetic.name, moment, keys, seconds, fps))
        return rows

    def gains(self) -> list[tuple[str, Range]]:
        """Moments and the expected speed-up of W8A8 over compiled bf16."""
        return [(text, gain(self.workload, self.linears, self.gpu, keys)) for text, keys in self.moments()]


def make_plan(workload: Workload, gpu: Gpu, minutes: float, window: int | None = None, other: int = 0) -> Plan:
    """A plan; without ``window`` the windowed caches have the model's, or the 21 frames such models are trained on.

    Raises:
        PlanningError: when minutes, window or other memory are out of range.
    """
    if window is None:
        least = workload.sink + workload.frames_per_chunk
        window = max(TRAINED_FRAMES, least) if workload.window == -1 else workload.window
    if window == -1:
        raise PlanningError("window = -1: the full cache is always shown; give the frames of the windowed one")
    return Plan(workload, gpu, minutes, window, other)


def cache_name(window: int, stored: CacheFormat | None = None) -> str:
    """As "full, qvg" or "window 21, bf16"."""
    span = "full" if window == -1 else f"window {window}"
    return span if stored is None else f"{span}, {stored.name}"


def clock(minutes: float) -> str:
    """As "5 s" or "2 min"."""
    return f"{minutes * 60:.0f} s" if minutes < 1 else f"{minutes:g} min"
