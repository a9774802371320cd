"""What a model costs while it runs: time of a chunk, bytes of weights and cache."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from fxq.models.self_forcing import SelfForcingRollout
from fxq.report.data import Running

VIDEOS = 2
"""How often the video is made; the first time warms up."""


def measure_running(name: str, rollout: SelfForcingRollout, module: nn.Module | None = None) -> Running:
    """Make the first video of a rollout, chunk by chunk.

    Args:
        name: of the model, as shown.
        rollout: with one video in its first batch.
        module: what runs in the denoiser's place; None: the denoiser itself.
    """
    seconds = list[float]()
    running = rollout.denoiser if module is None else module
    with torch.no_grad(), rollout.using(running):
        for again in range(VIDEOS):
            state = rollout.begin(*rollout.batches[0])
            for _ in range(rollout.units(*rollout.batches[0])):
                started = time.perf_counter()
                state = rollout.advance(state)
                if again:
                    seconds.append(time.perf_counter() - started)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in running.state_dict().values()}
    return Running(
        name=name,
        seconds=statistics.median(seconds),
        weight_bytes=sum(storages.values()),
        cache_bytes=state.cache.nbytes(),
    )
