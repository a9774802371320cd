"""What is measured of a rollout on a cache policy."""

import dataclasses

import numpy as np
import pytest
import torch

from fxq.cache.codecs import Klt, PerToken
from fxq.cache.policy import CachePolicy
from fxq.cache.settings import policy_from_json
from fxq.metrics.cache_run import run_cache
from tests.toys import wan_rollout

POLICY = CachePolicy(keys=Klt(1.0), values=PerToken(2, 32, scale_dtype="bfloat16"), span=1, window=6, sink=2)


def rollout_with(policy, frames=12):
    rollout = wan_rollout(frames=frames)
    rollout.sampler = dataclasses.replace(rollout.sampler, cache=policy)
    return rollout


@pytest.fixture(scope="module")
def measured():
    rollout = rollout_with(dataclasses.replace(POLICY, window=10))
    return rollout, *run_cache(rollout, score=lambda chunk: {"mean": float(chunk.mean())})


def test_the_video_is_the_rollouts_and_its_distance_is_that_from_exact_caches(measured):
    rollout, run, video = measured
    assert torch.equal(video, rollout.rollout(*rollout.batches[0]))
    exact = rollout_with(rollout.sampler.cache.exact)
    want = exact.rollout(*exact.batches[0])
    off = (video - want).double().square().unflatten(1, (6, 2)).flatten(2).mean(2)
    np.testing.assert_allclose(run.mse, off.numpy())
    assert not run.mse[:, :2].any() and run.mse[:, 4].all()
    assert run.largest == pytest.approx(float(want.max() - want.min()))
    assert run.scores["mean"][3] == pytest.approx(float(video[:, 6:8].mean()))
    assert run.reference_scores["mean"][3] == pytest.approx(float(want[:, 6:8].mean()))


def test_bytes_and_seconds_are_those_after_each_chunk(measured):
    rollout, run, _ = measured
    state, sizes = rollout.begin(*rollout.batches[0]), []
    for _ in range(6):
        state = rollout.advance(state)
        sizes.append((state.cache.nbytes("exact"), state.cache.nbytes("packed")))
    assert list(zip(run.exact, run.packed, strict=True)) == sizes
    assert run.packed[0] == 0 < run.packed[-1] < run.plain[-1] and run.exact[-1] < run.plain[-1]
    assert all(0 < a < b for a, b in zip(run.commit, run.seconds, strict=True))
    spans = [after > before for before, after in zip(run.packed, run.packed[1:], strict=False)]
    first = spans.index(True) + 1
    assert run.commit[first] > 2 * run.commit[0]
    assert policy_from_json(run.policy) == rollout.sampler.cache


def test_a_module_runs_on_the_policy_and_the_float_model_beside_it():
    rollout = rollout_with(CachePolicy(), frames=4)

    def louder(*args):
        output, *rest = rollout.denoiser(*args)
        return output * 1.5, *rest

    run, video = run_cache(rollout, louder)
    assert (run.mse > 0).all() and run.exact == run.plain and run.scores == {}
    assert not torch.equal(video, rollout.rollout(*rollout.batches[0]))


def test_the_rollout_is_left_as_it_was():
    rollout = rollout_with(CachePolicy(), frames=4)
    sampler, committing = rollout.sampler, rollout.committing

    def broken(*args):
        raise RuntimeError("a call")

    with pytest.raises(RuntimeError, match="a call"):
        run_cache(rollout, broken)
    assert (rollout.sampler, rollout.committing) == (sampler, committing)
