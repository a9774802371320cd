"""One calibration seed: its rollouts and its lab, and the measures of one row after the other on them."""

from __future__ import annotations

import dataclasses

from fxq.comparison.methods import ComparisonError, Entry
from fxq.comparison.subject import Subject, chunks_of, with_chunks
from fxq.core.ir import QuantGraph
from fxq.lab import Candidate, Lab, evaluate, latents_of, object_scores
from fxq.report.data import Variant
from fxq.runtime.progress import Progress

UNSEEN = 100
"""Added to a calibration seed: the seed of the videos that its rows are measured on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extent:
    """What every row gets: videos to measure and to calibrate on, chunks of the former (None: the model's own)."""

    videos: int = 64
    calibration_videos: int = 16
    chunks: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """Full precision on a seed's videos.

    ``scores`` of the scorer (empty outside of the sprite world), ``limits`` for PSNR and SSIM, ``chunks`` of a video
    and of one of the model's own length.
    """

    scores: dict[str, float]
    limits: tuple[float, float]
    chunks: int
    trained: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seconds:
    """What quantizing one way alone takes: statistics of layers, sensitivities of chunks, methods."""

    statistics: float
    sensitivity: float
    methods: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.statistics + self.sensitivity + self.methods


class Bench:
    """A model bound to the prompts and noise of one seed, to quantize and measure in any way."""

    def __init__(self, subject: Subject, extent: Extent, seed: int, bar: Progress, before: Bench | None = None) -> None:
        """Generate the full-precision videos. What the bench of another seed has traced is not traced again.

        Raises:
            ComparisonError: when the videos cannot have the asked length, or are no whole chunks.
        """
        self.seed = seed
        self.calibration, _ = subject.rollouts(extent.calibration_videos, seed, False)
        self.rollout, self.conditions = subject.rollouts(extent.videos, UNSEEN + seed, True)
        trained = chunks_of(self.rollout)
        if extent.chunks is not None:
            self.rollout = with_chunks(self.rollout, extent.chunks)
        with bar.step("full-precision videos"):
            self.latents = latents_of(self.rollout)
        chunks = chunks_of(self.rollout)
        if self.latents.shape[1] % chunks:
            raise ComparisonError(f"{self.latents.shape[1]} frames are not {chunks} chunks of one length")
        scores = {} if self.conditions is None else object_scores(self.latents, self.conditions)
        limits = subject.limits or (float(self.latents.min()), float(self.latents.max()))
        self.reference = Reference(scores=scores, limits=limits, chunks=chunks, trained=trained)
        self._lab: Lab | None = None
        self._traced: QuantGraph | None = None
        if before is not None and before.calibration.denoiser is self.calibration.denoiser:
            self._traced = before._traced

    def measure(self, entry: Entry, bar: Progress) -> tuple[Variant, Seconds]:
        """Quantize one way, and measure; every random choice follows from the seed."""
        recipe = dataclasses.replace(entry.recipe, seed=self.seed)
        if self._lab is None:
            self._lab = Lab(self.calibration, recipe, bar, self._traced)
            self._traced = self._lab.traced
        lab, lab.bar = self._lab, bar
        statistics = lab.collected(recipe).seconds
        sensitivity = lab.timed_sensitivity(recipe)[1] if recipe.chunk_weighting.needs_sensitivity else 0.0
        module, methods = lab.quantized(recipe, recipe)
        seconds = Seconds(statistics=statistics, sensitivity=sensitivity, methods=methods)
        candidate = Candidate(method=entry.method, bits=entry.bits, module=module, seconds=seconds.total)
        limits = self.reference.limits
        (variant,), _ = evaluate(self.rollout, self.conditions, self.latents, [candidate], bar, limits)
        return variant, seconds
