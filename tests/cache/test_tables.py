"""What codecs learn from calibration: where it is gathered, what it may be, how it is named."""

import dataclasses

import pytest
import torch

from fxq.cache.codecs import Klt, PerToken
from fxq.cache.codecs.record import Shape
from fxq.cache.policy import CachePolicy
from fxq.cache.tables import (
    TableError,
    check_tables,
    from_tensors,
    learned,
    learning,
    same_memory,
    same_tables,
    sampled,
    to_tensors,
)
from tests.toys import WAN, wan_rollout

MODEL = Klt(1.0, fit="model")
POLICY = CachePolicy(keys=MODEL, values=PerToken(8, 32), span=1, window=8, sink=2)
SHAPE = Shape(WAN.num_heads, WAN.dim // WAN.num_heads, 48)


@pytest.fixture(scope="module")
def rollout():
    return wan_rollout()


@pytest.fixture(scope="module")
def tables(rollout):
    return learned(POLICY, [rollout.cached_tokens(*rollout.batches[0], POLICY, 96)], WAN.num_layers)


def test_tokens_are_those_of_every_chunk_before_rotation(rollout):
    found = rollout.cached_tokens(*rollout.batches[0], POLICY, 10_000)
    state = rollout.begin(*rollout.batches[0])
    for _ in range(3):
        state = rollout.advance(state)
    want = state.cache.exact("keys", 0)  # [2, 36, heads, head_dim]
    assert set(found) == {"keys.0"}
    got = found["keys.0"].unflatten(0, (3, 2, -1)).transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert state.cache.newest("values", 0).equal(state.cache.exact("values", 0)[:, -12:])
    assert rollout.sampler.cache == CachePolicy()


def test_a_sample_is_spread_over_chunk_and_videos(rollout):
    state = rollout.advance(rollout.begin(*rollout.batches[0]))
    whole = state.cache.newest("keys", 0).flatten(0, 1)
    part = sampled(state.cache, POLICY, 3)["keys.0"]
    assert part.equal(whole[[0, 12, 23]]) and len(sampled(state.cache, POLICY, 900)["keys.0"]) == 24
    assert len(rollout.cached_tokens(*rollout.batches[0], POLICY, 12)["keys.0"]) == 12


def test_tables_fit_what_they_were_learned_from(rollout, tables):
    check_tables(POLICY, tables, SHAPE, WAN.num_layers)
    assert [place[:2] for place in learning(POLICY, 1)] == [("keys", 0)] and tables[1] == [{}]
    x = rollout.cached_tokens(*rollout.batches[0], POLICY, 10_000)["keys.0"].unsqueeze(0)[:, :48]
    record, _ = MODEL.encode(x, "keys", tables[0][0])
    assert float((MODEL.decode(record, "keys") - x).square().mean() / x.square().mean()) < 0.5


def test_tables_have_names_and_come_back(tables):
    named = to_tensors(tables)
    assert set(named) == {f"keys.0.{name}" for name in ("mean", "basis", "step", "width")}
    assert same_tables(from_tensors(named, 1), tables)
    assert not same_tables(from_tensors({n: t + 1 for n, t in named.items()}, 1), tables)
    assert not same_memory(tables[0][0], {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("basis"), "layer 0, keys: codec klt: basis is missing"),
        (lambda t: t.update(mean=t["mean"].float()), r"mean is torch.float32 \(2, 32\): expected torch.bfloat16"),
        (lambda t: t.update(basis=t["basis"] * torch.nan), "basis holds NaN"),
        (lambda t: t.update(width=t["width"] * 0), r"width sums to 0 with 0 at most: expected 64 of 8"),
        (lambda t: t.update(width=torch.tensor([[64] + [0] * 31, [0] * 32], dtype=torch.uint8)), "with 64 at most"),
        (lambda t: t.update(step=-t["step"]), "step holds numbers that are not above 0"),
    ],
)
def test_tables_of_another_kind_are_refused(tables, change, message):
    other = dict(tables[0][0])
    change(other)
    with pytest.raises(TableError, match=message):
        check_tables(POLICY, ([other], [{}]), SHAPE, 1)
    with pytest.raises(TableError, match="expected keys and values of 2"):
        check_tables(POLICY, tables, SHAPE, 2)


def test_a_rollout_without_tables_is_refused_at_its_start(rollout):
    other = wan_rollout()
    other.sampler = dataclasses.replace(other.sampler, cache=POLICY)
    with pytest.raises(ValueError, match="layer 0, keys: codec klt has no basis, which comes from calibration"):
        other.begin(*other.batches[0])
