"""What a comparison of bundles found."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Space = Literal["pixels", "latents"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What making the videos took: ``seconds`` float64 [V, chunks], and ``peak`` bytes, the most of any video."""

    seconds: Floats
    peak: int

    @property
    def per_chunk(self) -> float:
        """Median seconds of a chunk; the first chunk of the first video, which makes things ready, hardly moves it."""
        return float(np.median(self.seconds))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BundleRow:
    """One bundle on all videos.

    Attributes:
        name: of the bundle.
        bits: of its linears.
        size_ratio: bytes of all linears over bf16.
        forced: PSNR in dB of each chunk made from full precision's history, float64 [V, chunks].
        free: the same of the bundle's own videos.
        ssim: structural similarity of its own videos, float64 [V].
        cost: time and memory.
        metrics: by name, those that were given.
    """

    name: str
    bits: str
    size_ratio: float
    forced: Floats
    free: Floats
    ssim: Floats
    cost: Cost
    metrics: Mapping[str, float]

    @property
    def median(self) -> float:
        """Of the forced PSNR of all chunks of all videos."""
        return float(np.median(self.forced))

    @property
    def worst(self) -> float:
        """The least forced PSNR of any chunk of any video."""
        return float(self.forced.min())

    @property
    def worst_place(self) -> tuple[int, int]:
        """Video and chunk of it, counted from 1."""
        video, chunk = np.unravel_index(int(self.forced.argmin()), self.forced.shape)
        return int(video) + 1, int(chunk) + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class BundleResults:
    """Everything that was found.

    Attributes:
        title: says model and counts.
        command: that makes them again.
        date: as ISO has it.
        environment: versions and machine.
        settings: of model, loop and files.
        space: what PSNR and SSIM are of: pixels of decoded frames, or latents where there is no decoder.
        memory: what ``peak`` counts, in words.
        prompts: of the videos.
        full: full precision's cost.
        full_metrics: the metrics on full precision's own videos.
        rows: of the bundles.
        clips: of each video the file of the side-by-side, relative to the report; empty without a decoder.
        frames_per_second: of these.
        decoding: median seconds of decoding a chunk, None without a decoder.
    """

    title: str
    command: str
    date: str
    environment: Mapping[str, str]
    settings: Mapping[str, object]
    space: Space
    memory: str
    prompts: tuple[str, ...]
    full: Cost
    full_metrics: Mapping[str, float]
    rows: tuple[BundleRow, ...]
    clips: tuple[str, ...]
    frames_per_second: float
    decoding: float | None = None

    @property
    def chunks(self) -> int:
        """Of a video."""
        return int(self.full.seconds.shape[1])
