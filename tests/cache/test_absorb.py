"""Maps that take the place of a layer's history: the closed form, the guard, the choice, the cache without history."""

import dataclasses

import pytest
import torch

from fxq.cache.absorb import Absorb, Absorption, Statistics, Watch, solve
from fxq.cache.codecs import Klt
from fxq.cache.policy import CachePolicy
from fxq.cache.settings import CacheSettingsError, policy_from_json, policy_to_json
from fxq.passes.match.cache_inputs import packed_inputs
from tests.passes.match.test_cache_inputs import BATCH, CHUNK, DIM, HEADS, LAYERS, LAYOUT, ROTARY, filled


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def statistics(local, full, groups=1):
    none = Statistics.zeros(local.shape[0], groups, local.shape[2] // groups, local.device)
    return none.added(local, full)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_map_that_is_there_is_found(groups):
    local, width = normal(2, 400, 12), 12 // groups
    maps = normal(2, groups, width, width, seed=1) / 4
    full = torch.stack([x + x @ torch.block_diag(*m) for x, m in zip(local, maps, strict=True)])
    assert torch.allclose(solve(statistics(local, full, groups), 1e-9), maps, atol=1e-4)


def test_it_is_the_ridge_regression_of_its_definition():
    local, full, alpha = normal(1, 30, 6), normal(1, 30, 6, seed=1), 0.3
    found = solve(statistics(local, full), alpha)[0, 0].double()
    a, lacking = local[0].double(), (full - local)[0].double()
    ridge = alpha * (a.T @ a).trace() / 6
    gradient = a.T @ (a @ found - lacking) + ridge * found
    assert float(gradient.abs().max()) < 1e-4


def test_rows_may_come_in_parts():
    local, full = normal(2, 30, 6), normal(2, 30, 6, seed=1)
    parts = statistics(local[:, :10], full[:, :10]).added(local[:, 10:], full[:, 10:])
    whole = statistics(local, full)
    assert torch.allclose(parts.gram, whole.gram) and torch.allclose(parts.cross, whole.cross)


def test_nothing_lacking_gives_no_map():
    local = normal(2, 30, 6)
    assert not solve(statistics(local, local), 1e-2).any()


def test_without_rows_there_is_no_map_and_no_error():
    assert not solve(Statistics.zeros(2, 1, 6, torch.device("cpu")), 1e-2).any()


def test_a_low_rank_map_is_the_best_of_its_rank():
    local, full = normal(1, 60, 8), normal(1, 60, 8, seed=1)
    whole, cut = solve(statistics(local, full), 1e-2)[0, 0], solve(statistics(local, full), 1e-2, rank=3)[0, 0]
    left = torch.linalg.svdvals(whole)[3:].square().sum().sqrt()
    assert torch.linalg.matrix_rank(cut) == 3
    assert torch.allclose((whole - cut).norm(), left, rtol=1e-4)


def test_a_strong_ridge_gives_the_prior():
    local, full, prior = normal(2, 30, 6), normal(2, 30, 6, seed=1), normal(1, 1, 6, 6, seed=2)
    assert torch.allclose(solve(statistics(local, full), 1e9, prior=prior), prior.expand(2, 1, 6, 6), atol=1e-4)
    pooled = statistics(local, full).pooled()
    assert torch.allclose(pooled.gram, statistics(local, full).gram.sum(0, keepdim=True))


def test_what_is_not_finite_gives_a_map_that_is_not():
    local = normal(2, 30, 6)
    local[1, 3, 2] = torch.nan
    found = solve(statistics(local, normal(2, 30, 6, seed=1)), 1e-2)
    assert found[0].isfinite().all() and not found[1].isfinite().all()


def driven(settings, layers, chunks=5):
    """An absorption whose layers' full results are ``1 + map`` of the local ones and noise of a given size."""
    like = torch.zeros(2, 0, 2, 6)
    absorption = Absorption.begin(settings, len(layers), 2, like)
    weights = [torch.eye(12)] * len(layers)
    for chunk in range(2, chunks):
        if not absorption.observes(chunk, True):
            continue
        absorption = absorption.entering(chunk)
        for call in range(3):
            pairs = []
            for i, (size, noise) in enumerate(layers):
                local = normal(2, 40, 12, seed=100 * chunk + 10 * call + i)
                lacking = local @ normal(12, 12, seed=i) / 4 + noise * normal(2, 40, 12, seed=7 * chunk + call + i)
                pairs.append((local, local + size * lacking))
            absorption = absorption.seen(pairs, weights)
        absorption = absorption.leaving(chunk)
    return absorption


def test_layers_are_chosen_by_what_is_left_and_guarded():
    layers = [(0.5, 0.01), (1.0, 10.0), (0.1, 0.01), (0.5, 0.5)]
    found = driven(Absorb(), layers)
    assert found.converted == (0, 2)
    assert found.verdicts[0].left < 0.05 and found.verdicts[1].left > 0.5
    assert found.maps[0].any() and not found.maps[1].any() and not found.maps[3].any()
    assert found.nbytes == 2 * 2 * 12 * 12 * 4
    assert driven(Absorb(ratio=1.0), layers).converted == (0, 2, 3)
    assert driven(Absorb(ratio=0.25), layers).converted == (2,)
    assert driven(Absorb(ratio=0.2), layers).converted == ()


def test_nothing_is_seen_after_the_warm_up_or_without_history():
    found = driven(Absorb(), [(0.5, 0.01)])
    assert not found.observes(5, True) and not found.statistics and not found.trial
    assert not Absorption.begin(Absorb(), 1, 2, torch.zeros(2, 0, 2, 6)).observes(1, False)


def test_a_watch_hands_on_the_results_and_takes_in_the_pairs():
    absorption = Absorption.begin(Absorb(), 1, 2, torch.zeros(2, 0, 2, 6))
    pair = (normal(2, 4, 12), normal(2, 4, 12, seed=1))
    watch = Watch(lambda x: (x, "keys", [pair]), absorption, [torch.eye(12)])
    assert watch(7) == (7, "keys")
    assert torch.equal(watch.absorption.statistics[0].gram, statistics(*pair).gram)
    assert not absorption.statistics[0].gram.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "diagonal"}, "form = 'diagonal'"),
        ({"form": "low_rank"}, "'low_rank' needs 1 or more"),
        ({"rank": 3}, "others take 0"),
        ({"tokens": -1}, "tokens = -1"),
        ({"tokens": 4, "form": "per_head"}, "expected 0, or 1 or more and 'full'"),
        ({"warmup": 2}, "warmup = 2"),
        ({"ratio": 1.5}, "ratio = 1.5"),
        ({"alpha": 0.0}, "alpha = 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Absorb(**settings)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (CachePolicy(absorb=Absorb()), "set sink to a chunk, 3 frames, or absorb=None"),
        (CachePolicy(sink=3, absorb=Absorb(warmup=3)), "set warmup to at least 4"),
        (CachePolicy(sink=3, keys=Klt(), absorb=Absorb(tokens=4)), "set keys and values to None, or tokens to 0"),
        (CachePolicy(sink=3, window=8, absorb=Absorb()), "use a window of at least 9, or absorb=None"),
    ],
)
def test_policies_that_cannot_absorb_are_refused_with_the_fix(policy, message):
    with pytest.raises(ValueError, match=message):
        policy.check(3)


def test_a_policy_with_it_comes_back_from_json():
    policy = CachePolicy(sink=3, absorb=Absorb(form="low_rank", rank=8, ratio=0.25))
    assert policy_from_json(policy_to_json(policy)) == policy
    with pytest.raises(CacheSettingsError, match="did you mean 'warmup'"):
        policy_from_json({"absorb": {"warm_up": 3}})


CLOSING = {
    "exact": CachePolicy(sink=2),
    "both": CachePolicy(sink=2, keys=Klt(1.0), values=Klt(1.0), span=1),
    "values": CachePolicy(sink=2, values=Klt(1.0), span=1),
    "relative": CachePolicy(sink=2, window=12, positions="relative"),
    "relative keys": CachePolicy(sink=2, window=12, positions="relative", keys=Klt(1.0), span=1),
}


@pytest.mark.parametrize("name", CLOSING)
def test_a_closed_layer_keeps_its_sink_alone(name):
    cache = filled(CLOSING[name], 6)
    open_too = cache.fork()
    cache = cache.closing([1])
    for number in range(6, 12):
        new = torch.randn(2, LAYERS, BATCH, CHUNK * LAYOUT.tokens, HEADS, DIM)
        keys = [ROTARY(k, number * CHUNK) for k in new[0]]
        cache, open_too = cache.evict(), open_too.evict()
        cache, open_too = cache.append(keys, list(new[1])).commit(), open_too.append(keys, list(new[1])).commit()
    cache, open_too = cache.evict(), open_too.evict()
    found, whole = cache.prefix(), open_too.prefix()
    tokens = 2 * LAYOUT.tokens
    for i in range(2):
        assert torch.equal(found[i][0], whole[i][0])
        assert found[i][1].shape[1] == tokens and torch.equal(found[i][1], whole[i][1][:, :tokens])
    assert cache.nbytes() < open_too.nbytes()
    inputs = packed_inputs(cache)
    if CLOSING[name].packs:
        assert all(inputs.keys[1][part].shape[1] == n for part, n in (("sink", tokens), ("recent", 0)))


def test_a_closed_layer_gives_its_memory_back():
    policy = dataclasses.replace(CLOSING["exact"])
    cache = filled(policy, 8)
    bytes_of_layer = sum(
        x.numel() * 4 for x in (cache.keys[1].exact.buffer.memory, cache.values[1].exact.buffer.memory)
    )
    closed = cache.closing([1])
    kept = 2 * BATCH * 2 * LAYOUT.tokens * HEADS * DIM * 4
    assert closed.nbytes() == cache.nbytes() - bytes_of_layer + kept
