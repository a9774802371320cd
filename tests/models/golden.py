"""Replays dumps of official rollouts through fxq and compares every call, cache and latent."""

import dataclasses
import pathlib
import re

import torch
from torch import Tensor

from fxq.models.self_forcing import SamplerConfig
from tests.models.golden_file import Golden, GoldenError, difference


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What one of our calls saw and returned."""

    call: object
    x: Tensor
    t: Tensor
    cached: int
    flow: Tensor


def replay(path: pathlib.Path) -> dict[str, float]:
    """Run the rollout of a dump through fxq; returns the largest difference per compared tensor.

    Raises AssertionError when the calls differ in order, kind, frames or position.
    """
    golden = Golden(path)
    rollout, sampler = golden.rollout, golden.sampler
    model, (condition, draws) = rollout.denoiser, rollout.batches[0]
    recorded: list[Recorded] = []
    pending: list[tuple[Tensor, Tensor, int]] = []

    def running(x, t, context, cross_k, cross_v, prefix_k, *rest):
        pending.append((x, t, prefix_k[0].shape[1]))
        return model(x, t, context, cross_k, cross_v, prefix_k, *rest)

    state, after_unit = rollout.begin(condition, draws), []
    with rollout.using(running):
        for _ in range(rollout.units(condition, draws)):
            state = rollout.advance(state, lambda call, out: recorded.append(Recorded(call, *pending.pop(), out[0])))
            after_unit.append(rollout.fork(state))

    _compare_call_list(golden, recorded)
    compared = [*_schedule(sampler), *_calls(sampler, recorded), *_caches(golden, recorded, after_unit)]
    errors = {}
    for name, ours in compared:
        if (theirs := golden.tensors.get(name)) is not None:
            if name.startswith("cache."):
                theirs = theirs[:, : ours.shape[1]]
            errors[name] = difference(ours, theirs.expand(ours.shape) if name.endswith(".t") else theirs)
    out = golden.tensor("out.latents")
    errors["out.latents"] = difference(state.latents[:, state.latents.shape[1] - out.shape[1] :], out)
    return errors


def _schedule(sampler: SamplerConfig):
    yield "schedule.sigmas", sampler.schedule.sigmas
    yield "schedule.timesteps", sampler.schedule.timesteps
    yield "schedule.steps", torch.tensor(sampler.timesteps(False))
    for name in ("schedule.first_chunk_steps", "schedule.steps_first_chunk"):
        yield name, torch.tensor(sampler.timesteps(True))


def _calls(sampler: SamplerConfig, recorded: list[Recorded]):
    for i, ours in enumerate(recorded):
        yield f"call.{i:03d}.x", ours.x
        yield f"call.{i:03d}.t", ours.t
        yield f"call.{i:03d}.flow", ours.flow
        yield f"call.{i:03d}.x0", sampler.schedule.x0(ours.x, ours.flow, ours.t)


def _caches(golden: Golden, recorded: list[Recorded], after_unit: list):
    unit_of_label = {call.get("chunk"): ours.call.chunk for call, ours in zip(golden.calls, recorded, strict=False)}
    for name in golden.tensors:
        if match := re.fullmatch(r"cache\.(\d+)\.(\d+)\.([kv])", name):
            unit = unit_of_label.get(int(match[1]), int(match[1]))
            if unit >= len(after_unit):
                raise GoldenError(f"{golden.path}: {name} is of a chunk that no call names, {len(after_unit)} ran")
            state = after_unit[unit]
            yield name, state.cache.prefix()[match[3] != "k"][int(match[2])]
        elif match := re.fullmatch(r"cross\.(\d+)\.([kv])", name):
            state = after_unit[-1]
            yield name, (state.cross_k if match[2] == "k" else state.cross_v)[int(match[1])]


def _compare_call_list(golden: Golden, recorded: list[Recorded]) -> None:
    flows = len(golden.numbered(r"call\.(\d+)\.flow"))
    for what, count in (("call.NNN.flow", flows), ("calls in the metadata", len(golden.calls) or flows)):
        assert len(recorded) == count, f"{len(recorded)} calls replayed, expected {count} ({what})"
    labels_minus_ours = set()
    for i, (theirs, ours) in enumerate(zip(golden.calls, recorded, strict=False)):
        call, span = ours.call, ours.call.spans[-1]
        tokens = call.tokens_per_frame
        assert call.index == i
        kind = theirs.get("kind", call.kind) if i >= golden.given_calls else "given"
        assert call.kind == kind, f"call {i}: kind is {call.kind}, expected {kind}"
        facts = {
            "frames": span.frames[1] - span.frames[0],
            "current_start": span.frames[0] * tokens,
            "global_end": span.frames[1] * tokens,
            "local_end": ours.cached + (span.frames[1] - span.frames[0]) * tokens,
        }
        for name, value in facts.items():
            if theirs.get(name) is not None:
                assert value == theirs[name], f"call {i}: {name} is {value}, expected {theirs[name]}"
        if i >= golden.given_calls:
            if theirs.get("chunk") is not None:
                labels_minus_ours.add(theirs["chunk"] - call.chunk)
            if theirs.get("step") is not None:
                assert span.step == theirs["step"], f"call {i}: step is {span.step}, expected {theirs['step']}"
    assert len(labels_minus_ours) <= 1, f"chunks are numbered differently: offsets {labels_minus_ours}"
