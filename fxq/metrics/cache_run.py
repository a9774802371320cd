"""One rollout on a cache policy, chunk by chunk: bytes, time of encoding, and how far it drifts from exact caches."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fxq.cache.settings import policy_to_json
from fxq.cache.store import Cache
from fxq.metrics.latents import Floats, chunk_mse
from fxq.models.self_forcing import SelfForcingRollout

Score = Callable[[Tensor], Mapping[str, float]]
"""Scores by name of one chunk's latents [V, F, C, H, W]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheRun:
    """What a rollout of V videos did, one number for each chunk where nothing else is said.

    Attributes:
        policy: of the cache, in JSON form.
        exact: bytes of tokens as they are, of all videos, memory that waits for more included.
        packed: bytes of encoded spans.
        plain: as ``exact``, of the float model on exact caches with the same window.
        mse: float64 [V, chunks], of latents against the float model on exact caches with the same window.
        scores: by name; empty where nothing scores.
        reference_scores: those of the float model.
        commit: seconds of encoding.
        seconds: of the whole chunk.
        largest: of the float model's latents, as the peak of a PSNR: the difference between most and least.
    """

    policy: Mapping[str, object]
    exact: tuple[int, ...]
    packed: tuple[int, ...]
    plain: tuple[int, ...]
    mse: Floats
    scores: Mapping[str, tuple[float, ...]]
    reference_scores: Mapping[str, tuple[float, ...]]
    commit: tuple[float, ...]
    seconds: tuple[float, ...]
    largest: float


def run_cache(
    rollout: SelfForcingRollout, module: Callable[..., object] | None = None, score: Score | None = None
) -> tuple[CacheRun, Tensor]:
    """Make the first batch's videos twice, on the rollout's policy and by the float model on exact caches.

    Args:
        rollout: with the policy; left as it is.
        module: that runs on the policy; None: the float model.
        score: of a chunk.

    Returns:
        The measures, and the videos on the policy, latents [V, F, C, H, W] in CPU memory.
    """
    condition, draws = rollout.batches[0]
    chunks, sampler, committing = rollout.units(condition, draws), rollout.sampler, rollout.committing
    commit = [0.0] * chunks

    def timed(cache: Cache) -> Cache:
        _wait(cache)
        start = time.perf_counter()
        after = committing(cache)
        _wait(after)
        commit[after.frames // after.layout.chunk - 1] += time.perf_counter() - start
        return after

    rollout.committing = timed
    try:
        with rollout.using(module or rollout.denoiser):
            video, exact, packed, seconds = _made(rollout)
        rollout.committing = committing
        rollout.sampler = dataclasses.replace(sampler, cache=sampler.cache.exact)
        with rollout.using(rollout.denoiser):
            want, plain, _, _ = _made(rollout)
    finally:
        rollout.committing, rollout.sampler = committing, sampler
    frames = sampler.frames_per_chunk
    run = CacheRun(
        policy=policy_to_json(sampler.cache),
        exact=exact,
        packed=packed,
        plain=plain,
        mse=chunk_mse(video, want, frames),
        scores=_scores(video, frames, score),
        reference_scores=_scores(want, frames, score),
        commit=tuple(commit),
        seconds=seconds,
        largest=float(want.max() - want.min()),
    )
    return run, video


def _made(
    rollout: SelfForcingRollout,
) -> tuple[Tensor, tuple[int, ...], tuple[int, ...], tuple[float, ...]]:
    """Videos of the first batch in CPU memory; after each chunk bytes as they are and encoded, and its seconds."""
    condition, draws = rollout.batches[0]
    state, exact, packed, seconds = rollout.begin(condition, draws), [], [], []
    for _ in range(rollout.units(condition, draws)):
        start = time.perf_counter()
        state = rollout.advance(state)
        _wait(state.cache)
        seconds.append(time.perf_counter() - start)
        exact.append(state.cache.nbytes("exact"))
        packed.append(state.cache.nbytes("packed"))
    return state.latents.cpu(), tuple(exact), tuple(packed), tuple(seconds)


def _wait(cache: Cache) -> None:
    """Until the device has done what was asked of it, so that the clock sees it."""
    if (device := cache.keys[0].exact.tensor.device).type == "cuda":
        torch.cuda.synchronize(device)


def _scores(video: Tensor, frames: int, score: Score | None) -> dict[str, tuple[float, ...]]:
    if score is None:
        return {}
    found = [score(chunk) for chunk in video.split(frames, dim=1)]
    return {name: tuple(float(scores[name]) for scores in found) for name in found[0]}
