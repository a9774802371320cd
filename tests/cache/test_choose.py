"""The choice of codecs per layer, on the shipped model's own caches."""

import dataclasses

import pytest
import torch

from fxq.cache.choose import cache_tables, choose, try_codec
from fxq.cache.codecs import Klt, PerToken, Prq
from fxq.cache.policy import CachePolicy
from fxq.lab import tiny_rollout
from fxq.models.tiny import load_tiny

CANDIDATES = {
    "rtn 2": PerToken(2),
    "rtn 4": PerToken(4),
    "prq": Prq(1, 16, block=32, iterations=4),
    "klt": Klt(1.0, fit="model"),
}
POLICY = CachePolicy(span=2)


@pytest.fixture(scope="module")
def cache():
    rollout, _ = tiny_rollout(load_tiny(), 4, seed=9, unseen=False)
    state = rollout.begin(*rollout.batches[0])
    for _ in range(4):
        state = rollout.advance(state)
    return state.cache


def test_more_bits_never_make_the_error_larger(cache):
    errors = []
    for bits in (2.5, 3.5, 4.5):
        policy, choices = choose(CANDIDATES, [cache], bits, POLICY, 28)
        assert sum(choice.chosen.bits for choice in choices) / len(choices) <= bits + 1e-9
        assert len(policy.keys) == len(policy.values) == 4
        errors.append(sum(choice.chosen.noise for choice in choices))
    assert errors == sorted(errors, reverse=True)


def test_a_codec_is_chosen_for_its_quality_and_says_so(cache):
    _, choices = choose(CANDIDATES, [cache], 4.5, POLICY, 28)
    for choice in choices:
        rivals = [trial for trial in choice.trials if trial.bits <= choice.chosen.bits]
        assert choice.chosen.sqnr == max(trial.sqnr for trial in rivals)
        assert f"{choice.chosen.sqnr:.1f} dB at {choice.chosen.bits:.2f} bits" in choice.reason
    assert {choice.chosen.codec for choice in choices} & {"klt", "prq"}


def test_too_few_bits_are_refused_with_what_is_least(cache):
    with pytest.raises(ValueError, match=r"0\.5 bits are too few: the cheapest codecs store 1\.0"):
        choose(CANDIDATES, [cache], 0.5, POLICY, 28)


def test_codecs_that_do_not_fit_are_left_out_and_none_left_is_an_error(cache):
    _, choices = choose(CANDIDATES | {"wide": PerToken(2, 64)}, [cache], 4.5, POLICY, 28)
    assert all(trial.codec != "wide" for choice in choices for trial in choice.trials)
    assert all("not whole blocks" in choice.unfit["wide"] for choice in choices)
    with pytest.raises(ValueError, match=r"no codec fits: .*not whole blocks"):
        choose({"wide": PerToken(2, 64)}, [cache], 4.5, POLICY, 28)
    with pytest.raises(ValueError, match="use a smaller span"):
        choose(CANDIDATES, [cache], 4.5, dataclasses.replace(POLICY, span=9), 28)


def test_a_chosen_policy_runs(cache):
    policy, _ = choose(CANDIDATES, [cache], 3.0, POLICY, 7)
    rollout, _ = tiny_rollout(load_tiny(), 2, seed=3, unseen=True)
    want = rollout.rollout(*rollout.batches[0])
    rollout.sampler = dataclasses.replace(rollout.sampler, cache=policy)
    rollout.cache_tables = cache_tables(policy, [cache])
    got = rollout.rollout(*rollout.batches[0])
    assert float((got - want).double().square().mean()) < 1e-3
    assert not torch.equal(got, want)


def test_what_learns_from_videos_is_tried_on_others(cache):
    """The basis of the very videos would do better than one of others, and would be chosen for that."""
    _, choices = choose({"klt": Klt(1.0, fit="model")}, [cache], 1.5, POLICY, 28)
    x = cache.exact("keys", 0)
    own = try_codec("klt", Klt(1.0, fit="model"), x, "keys", 150, 14, Klt(1.0, fit="model").learned(x.flatten(0, 1)))
    assert choices[0].chosen.sqnr < own.sqnr - 0.5
    rollout, _ = tiny_rollout(load_tiny(), 1, seed=9, unseen=False)
    state = rollout.begin(*rollout.batches[0])
    for _ in range(2):
        state = rollout.advance(state)
    with pytest.raises(ValueError, match="tried on others: two or more are needed"):
        choose({"klt": Klt(1.0, fit="model")}, [state.cache], 1.5, POLICY, 28)
