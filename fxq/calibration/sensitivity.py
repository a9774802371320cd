"""Chunk-wise sensitivity: how much an error made in one chunk costs the whole video (Q-ARVD, arXiv 2605.21072)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fxq.calibration.rollout import Rollout, State
from fxq.runtime.workers import Workers


@dataclasses.dataclass(frozen=True)
class ChunkSensitivity:
    """``alpha`` float64 [chunks], sum 1; ``mse`` float64 [videos, chunks], the latent MSE behind it, per video."""

    alpha: Tensor
    mse: Tensor


def chunk_sensitivity(
    rollout: Rollout,
    quantized: Callable[..., object],
    full_precision: Callable[..., object] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    workers: Workers | None = None,
    finished: Callable[[int, Callable[[], Tensor]], Tensor] | None = None,
) -> ChunkSensitivity:
    """Measure each chunk's sensitivity by forked rollouts.

    Run i is the full-precision rollout except that every denoiser call of chunk i, context call included, goes through
    ``quantized``. It starts from the full-precision run's state before chunk i, so N (N + 1) / 2 chunks are computed
    beside the full-precision video and not N^2.

    Args:
        rollout: prompts and noise.
        quantized: stand-in for the denoiser in chunk i.
        full_precision: the denoiser elsewhere; the rollout's own by default.
        on_progress: told (chunks computed, total).
        workers: ranks that take turns with the batches.
        finished: called with a batch's number and a function that measures it, returns the errors [videos, chunks]:
            from an earlier run, or by calling the function.

    Returns:
        Normalised sensitivities and the errors they come from; uniform ones when no chunk had an error.

    Raises:
        ValueError: when videos differ in their number of chunks.
        fxq.runtime.workers.WorkerError: when a rank is gone.
    """
    workers = workers or Workers()
    reference = full_precision or rollout.denoiser
    units = [rollout.units(condition, draws) for condition, draws in rollout.batches]
    if len(set(units)) > 1:
        raise ValueError(f"sensitivity averages over videos of equal length, got {units} chunks; measure them apart")
    count, done = units[0], 0
    mine = range(workers.rank, len(units), workers.size)
    per_batch = count + count * (count + 1) // 2

    def advance(state: State, module: Callable[..., object]) -> State:
        nonlocal done
        with rollout.using(module):
            state = rollout.advance(state)
        done += 1
        if on_progress is not None:
            on_progress(done, per_batch * len(mine))
        return state

    def measure(batch: int) -> Tensor:
        state, videos = rollout.begin(*rollout.batches[batch]), []
        for unit in range(count):
            other = advance(rollout.fork(state), quantized)
            for _ in range(unit + 1, count):
                other = advance(other, reference)
            videos.append(other.latents)
            state = advance(state, reference)
        want = state.latents.double()
        return torch.stack([(video.double() - want).square().flatten(1).mean(1) for video in videos], dim=1)

    errors = {}
    for number in mine:
        start = done
        run = functools.partial(measure, number)
        errors[str(number)] = run() if finished is None else finished(number, run)
        done = start + per_batch
    told: dict[str, Tensor] = {}
    for part in workers.gather(errors):
        told |= part
    mse = torch.cat([told[str(i)] for i in range(len(units))])
    mean = mse.mean(0)
    if not mean.any():
        mean = torch.ones_like(mean)
    return ChunkSensitivity(mean / mean.sum(), mse)
