"""One video by one contestant: alone, and chunk by chunk from full precision's history; kept on disk."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxq.calibration.rollout import Condition, Draws
from fxq.comparison.bundles.contestant import Contestant
from fxq.comparison.bundles.memory import watched
from fxq.models.self_forcing import SelfForcingRollout, SelfForcingState
from fxq.runtime.writable import whole_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A video.

    Attributes:
        free: latents [F, C, H, W] on the CPU, the contestant's own from the first chunk to the last.
        forced: of the same shape; each chunk is the contestant's, made with full precision's chunks before it, which
            its own context calls encoded. None for full precision, which both are the same for.
        seconds: of each chunk of ``free``, denoising and context calls.
        peak: bytes in use at most during ``free``, see :func:`~fxq.comparison.bundles.memory.watched`.
    """

    free: Tensor
    forced: Tensor | None
    seconds: tuple[float, ...]
    peak: int


def make(
    rollout: SelfForcingRollout, condition: Condition, draws: Draws, contestant: Contestant, reference: Tensor | None
) -> Run:
    """Make one video.

    Args:
        rollout: the model's loop; its cache policy is the contestant's while this runs.
        condition: its prompt, a batch of one.
        draws: its noise, a batch of one.
        contestant: who makes it.
        reference: full precision's latents [F, C, H, W], None for full precision itself.
    """
    before, device = rollout.sampler, rollout.model.patch_embedding.weight.device
    if contestant.policy is not None:
        rollout.sampler = dataclasses.replace(before, cache=contestant.policy)
    try:
        with rollout.using(contestant.module or rollout.denoiser):
            with watched(device) as peak:
                state, seconds = rollout.begin(condition, draws), []
                for _ in range(rollout.units(condition, draws)):
                    start = _now(device)
                    state = rollout.advance(state)
                    seconds.append(_now(device) - start)
                most = peak()
            free = state.latents[0].cpu()
            del state
            forced = None if reference is None else _forced(rollout, rollout.begin(condition, draws), free, reference)
    finally:
        rollout.sampler = before
    return Run(free=free, forced=forced, seconds=tuple(seconds), peak=most)


def _forced(rollout: SelfForcingRollout, history: SelfForcingState, free: Tensor, reference: Tensor) -> Tensor:
    """Every chunk from the reference's history. The first one has none: it is that of the free video."""
    size = rollout.sampler.frames_per_chunk
    chunks, past = list(free.split(size)[:1]), reference.split(size)
    for known in past[:-1]:
        history = rollout.take(rollout.fork(history), known[None])
        chunks.append(rollout.advance(rollout.fork(history)).latents[0, -size:].cpu())
    return torch.cat(chunks)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def save(path: pathlib.Path, run: Run, identity: str) -> None:
    """Write a run, whole or not at all; ``identity`` says of what it is."""
    tensors = {"free": run.free.contiguous()} | ({} if run.forced is None else {"forced": run.forced.contiguous()})
    facts = {"identity": identity, "seconds": json.dumps(run.seconds), "peak": str(run.peak)}
    with whole_file(path) as part:
        save_file(tensors, part, metadata=facts)


def saved(path: pathlib.Path, identity: str) -> Run | None:
    """The run in a file; None when there is none, it cannot be read, or it is of something else."""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            if facts.get("identity") != identity:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        seconds, peak = tuple(map(float, json.loads(facts["seconds"]))), int(facts["peak"])
        return Run(free=tensors["free"], forced=tensors.get("forced"), seconds=seconds, peak=peak)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
