"""What is compared on: a model's rollouts of calibration and of evaluation, and how long those are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fxq.calibration.rollout import Draws, Rollout
from fxq.comparison.methods import ComparisonError
from fxq.lab import tiny_rollout
from fxq.models.self_forcing import SelfForcingRollout
from fxq.models.tiny import load_tiny

Rollouts = Callable[[int, int, bool], tuple[Rollout, Tensor | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to compare methods on.

    Attributes:
        name: shown in reports.
        identity: what tells it from other models, JSON values by name.
        rollouts: of (videos, seed, unseen): prompts to calibrate on, or ``unseen`` ones to measure on, and what their
            videos are asked to show, int64 [V, 7], where they are of the sprite world, else None.
        limits: of its latents, for PSNR and SSIM; None: those of the full-precision videos.
    """

    name: str
    identity: Mapping[str, object]
    rollouts: Rollouts
    limits: tuple[float, float] | None = None


def tiny_subject(batch: int = 64, device: torch.device | None = None) -> Subject:
    """The shipped model, driven in batches of so many videos."""
    device = device or torch.device("cpu")
    model = load_tiny().to(device)

    def rollouts(videos: int, seed: int, unseen: bool) -> tuple[Rollout, Tensor | None]:
        return tiny_rollout(model, videos, seed=seed, unseen=unseen, batch=batch)

    identity = {"model": "tiny", "batch": batch, "device": str(device)}
    return Subject(name="tiny", identity=identity, rollouts=rollouts, limits=(-1.0, 1.0))


def chunks_of(rollout: Rollout) -> int:
    """Chunks of the longest video."""
    return max(rollout.units(condition, draws) for condition, draws in rollout.batches)


def with_chunks(rollout: Rollout, chunks: int) -> SelfForcingRollout:
    """The rollout with videos of another length.

    Videos longer than its own get a window of its own length with the first chunk as sink and relative positions, as no
    other distance of keys was trained, unless the rollout has a window already.

    Raises:
        ComparisonError: when the rollout is not chunk by chunk on a cache of fxq.
    """
    if not isinstance(rollout, SelfForcingRollout):
        raise ComparisonError(f"--chunks: {type(rollout).__name__} decides about the length of its videos itself")
    trained, sampler, size = chunks_of(rollout), rollout.sampler, rollout.sampler.frames_per_chunk
    if chunks > trained and sampler.cache.window == -1:
        cache = dataclasses.replace(sampler.cache, window=trained * size, sink=size, positions="relative")
        sampler = dataclasses.replace(sampler, cache=cache)
    batches = []
    for condition, draws in rollout.batches:
        frames, channels, rows, columns = draws.shape
        longer = frames + (chunks - trained) * size
        batches.append((condition, Draws(draws.seeds, (longer, channels, rows, columns))))
    return SelfForcingRollout(rollout.model, batches, sampler, any_size=rollout.any_size)
