"""Rollouts of the shipped model on a packed cache."""

import dataclasses

import pytest
import torch

from fxq.cache.codecs import Exact, Klt, Prq
from fxq.cache.policy import CachePolicy
from fxq.calibration.rollout import Draws
from fxq.lab import tiny_rollout
from fxq.models.self_forcing import SelfForcingRollout
from fxq.models.tiny import load_tiny


@pytest.fixture(scope="module")
def model():
    return load_tiny()


def made(model, policy, chunks=7, videos=4):
    rollout, _ = tiny_rollout(model, videos, seed=2, unseen=True)
    (condition, draws), sampler = rollout.batches[0], dataclasses.replace(rollout.sampler, cache=policy)
    longer = Draws(draws.seeds, (3 * chunks, *draws.shape[1:]))
    rollout = SelfForcingRollout(model, [(condition, longer)], sampler)
    state = rollout.begin(*rollout.batches[0])
    for _ in range(chunks):
        state = rollout.advance(state)
    return state


def peak_ratio(got, want):
    return float(10 * torch.log10(4 / (got - want).double().square().flatten(1).mean(1)).mean())


def test_without_a_codec_nothing_changes(model):
    """Bit for bit what caches that are put together anew for each chunk give."""
    state = made(model, CachePolicy(), 3)
    rollout, _ = tiny_rollout(model, 4, seed=2, unseen=True)
    noise, sampler = Draws(rollout.batches[0][1].seeds, (9, 3, 20, 20)), rollout.sampler
    from fxq.models.causal_wan import rope_tables

    empty = [torch.zeros(4, 0, 3, 32)] * 4
    keys, values, cross = list(empty), list(empty), (list(empty), list(empty))
    prompt, videos = rollout.batches[0][0]["prompt_embeds"], []
    with torch.no_grad():
        for chunk in range(3):
            x, steps = noise.noise[:, 3 * chunk : 3 * chunk + 3], sampler.timesteps(chunk == 0)
            for step, t in enumerate([*steps, 0.0]):
                text = prompt if not chunk and not step else prompt[:, :0]
                time = torch.full((4, 3), t)
                out, k, v, *cross = model(x, time, text, *cross, keys, values, *rope_tables(32, 3, 5, 5, 3 * chunk))
                if step == len(steps):
                    break
                clean = x = sampler.schedule.x0(x, out, time)
                if step + 1 < len(steps):
                    after = torch.full((4, 3), steps[step + 1])
                    x = sampler.schedule.renoise(clean, noise.renoise(chunk, step, 3), after)
            videos.append(clean)
            keys = [torch.cat(pair, 1) for pair in zip(keys, k, strict=True)]
            values = [torch.cat(pair, 1) for pair in zip(values, v, strict=True)]
    assert torch.equal(state.latents, torch.cat(videos, 1))


def test_storing_spans_exactly_changes_rounding_alone(model):
    codec = Exact("float32")
    state = made(model, CachePolicy(keys=codec, values=codec, span=2))
    assert state.cache.packed == 18
    assert peak_ratio(state.latents, made(model, CachePolicy()).latents) > 100


@pytest.mark.parametrize(("codec", "least"), [(Prq(1, 16, block=32), 58), (Klt(1.0, rank=12), 62)], ids=["qvg", "klt"])
def test_free_rollouts_stay_near_those_of_exact_caches(model, codec, least):
    state = made(model, CachePolicy(keys=codec, values=codec, span=2))
    assert peak_ratio(state.latents, made(model, CachePolicy()).latents) > least
    assert state.cache.nbytes("packed") < made(model, CachePolicy()).cache.nbytes() / 4


def test_relative_positions_do_not_drift_and_memory_stays(model):
    codec = Klt(1.0, rank=12)
    policy = CachePolicy(window=21, sink=3, positions="relative", keys=codec, values=codec, span=2)
    half, whole = made(model, policy, 10, 2).cache, made(model, policy, 16, 2).cache
    assert whole.nbytes() <= 1.2 * half.nbytes()


def test_a_fork_of_a_packed_cache_goes_on_alike(model):
    codec = Klt(1.0)
    policy = CachePolicy(window=12, sink=1, positions="relative", keys=codec, values=codec, span=1)
    rollout, _ = tiny_rollout(model, 2, seed=2, unseen=True)
    rollout.sampler = dataclasses.replace(rollout.sampler, cache=policy)
    state = rollout.begin(*rollout.batches[0])
    for _ in range(5):
        state = rollout.advance(state)
    kept = rollout.fork(state)
    first = rollout.advance(rollout.advance(state)).latents
    assert torch.equal(rollout.advance(rollout.advance(kept)).latents, first)
