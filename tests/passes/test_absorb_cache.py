"""Graphs whose layers can forget their history: maps as inputs, what they are fitted to, rollouts."""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fxq
from fxq.cache.absorb import Absorb, Absorption
from fxq.cache.codecs import Klt
from fxq.cache.policy import CachePolicy
from fxq.cache.saved import SavedCacheError
from fxq.calibration.rollout import Draws
from fxq.calls.captured import convention, rules_of
from fxq.capture.trace import trace
from fxq.core.facts import Facts
from fxq.core.pipeline import PassError, run_passes
from fxq.kernels import absorb
from fxq.lab import tiny_rollout
from fxq.models.causal_wan import attention
from fxq.models.saved_state import load_state, save_state
from fxq.models.self_forcing import SelfForcingRollout
from fxq.models.tiny import load_tiny
from fxq.passes import AbsorbCache, PackCache, absorb_cache, pack_cache
from fxq.passes.absorb_cache import observed
from fxq.passes.match.cache_inputs import FEW, MAPS, TABLES, packed_inputs
from tests.features import assert_same

PLAIN = CachePolicy(sink=3)
POLICY = dataclasses.replace(PLAIN, absorb=Absorb())
CODED = dataclasses.replace(POLICY, keys=Klt(1.0, rank=12), values=Klt(1.0, rank=12), span=1)
WARM = 15  # frames


@pytest.fixture(scope="module")
def tiny():
    return load_tiny()


@pytest.fixture(scope="module")
def traced(tiny):
    rollout, _ = tiny_rollout(tiny, 2, seed=1, unseen=False)
    args, shapes = rollout.example_call()
    return trace(tiny, args, None, shapes)


@pytest.fixture(scope="module")
def absorbing(traced):
    return run_passes(traced.fork(), (AbsorbCache(POLICY),)).module


@pytest.fixture(scope="module")
def quantized(tiny):
    rollout, _ = tiny_rollout(tiny, 2, seed=1, unseen=False)
    return fxq.quantize(tiny, rollout, "w8a8-dynamic", progress=False)


def rollout_of(model, policy, chunks=8, videos=16):
    rollout, _ = tiny_rollout(model, videos, seed=2, unseen=True)
    (condition, draws), sampler = rollout.batches[0], dataclasses.replace(rollout.sampler, cache=policy)
    return SelfForcingRollout(model, [(condition, Draws(draws.seeds, (3 * chunks, *draws.shape[1:])))], sampler)


def made(model, module, policy, chunks=8, videos=16):
    rollout = rollout_of(model, policy, chunks, videos)
    state = rollout.begin(*rollout.batches[0])
    with rollout.using(module):
        for _ in range(chunks):
            state = rollout.advance(state)
    return state


def psnr(got, want, chunks=(5, 8)):
    lo, hi = (3 * c for c in chunks)
    errors = (got - want)[:, lo:hi].double().square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / errors)).mean())


@pytest.fixture
def without_maps(monkeypatch):
    """Layers forget their history and nothing takes its place."""
    leaving = Absorption.leaving

    def evict(self, chunk):
        after = leaving(self, chunk)
        return dataclasses.replace(after, maps=tuple(torch.zeros_like(found) for found in after.maps))

    return lambda: monkeypatch.setattr(Absorption, "leaving", evict)


POSITIONS = {"absolute": PLAIN, "relative": CachePolicy(sink=3, window=21, positions="relative")}


@pytest.mark.sweep
@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_half_the_layers_forget_with_little_loss(tiny, absorbing, positions, without_maps):
    plain = POSITIONS[positions]
    policy = dataclasses.replace(plain, absorb=Absorb())
    whole, found = made(tiny, tiny, plain), made(tiny, absorbing, policy)
    assert torch.equal(found.latents[:, :WARM], whole.latents[:, :WARM])  # maps of zeros, bit for bit
    assert found.absorption.converted == (0, 3)
    assert not found.absorption.verdicts[1].converted and found.absorption.verdicts[1].left > 0.5
    assert psnr(found.latents, whole.latents) >= 45
    assert found.cache.nbytes() < 0.7 * whole.cache.nbytes()
    without_maps()
    assert psnr(made(tiny, absorbing, policy).latents, whole.latents) < 20


def test_few_videos_absorb_as_well(tiny, absorbing):
    whole, found = made(tiny, tiny, PLAIN, 7, 3), made(tiny, absorbing, POLICY, 7, 3)
    assert_same(found.latents[:, :WARM], whole.latents[:, :WARM])
    assert found.absorption.converted == (0, 3) and psnr(found.latents, whole.latents, (5, 7)) >= 40


@pytest.mark.sweep
@pytest.mark.parametrize("settings", [Absorb(form="per_head"), Absorb(form="low_rank", rank=8)], ids=lambda a: a.form)
def test_other_forms_of_the_map(tiny, traced, settings):
    policy = dataclasses.replace(PLAIN, absorb=settings)
    module = run_passes(traced.fork(), (AbsorbCache(policy),)).module
    found = made(tiny, module, policy)
    assert found.absorption.converted == (0, 3)
    assert psnr(found.latents, made(tiny, tiny, PLAIN).latents) >= 45


@pytest.mark.sweep
def test_quantized_layers_and_encoded_caches_absorb_as_well(tiny, quantized):
    plain = made(tiny, quantized, PLAIN)
    found = made(tiny, absorb_cache(quantized, POLICY), POLICY)
    assert torch.equal(found.latents[:, :WARM], plain.latents[:, :WARM])
    assert found.absorption.converted == (0, 3) and psnr(found.latents, plain.latents) >= 45
    fast = absorb_cache(pack_cache(fxq.optimize(quantized), CODED), CODED)
    coded = made(tiny, fast, CODED)
    assert coded.absorption.converted == (0, 3) and psnr(coded.latents, plain.latents) >= 42
    assert coded.cache.nbytes() < found.cache.nbytes() / 3


def test_tokens_may_stand_for_a_history(tiny, traced):
    policy = dataclasses.replace(PLAIN, absorb=Absorb(tokens=48))
    graph = run_passes(traced.fork(), (AbsorbCache(policy),))
    assert convention(graph.module)[0][-1] == FEW
    whole, found = made(tiny, tiny, PLAIN, 7, 3), made(tiny, graph.module, policy, 7, 3)
    assert torch.equal(found.latents[:, :WARM], whole.latents[:, :WARM])
    assert found.absorption.converted == (0, 3) and psnr(found.latents, whole.latents, (5, 7)) >= 45
    assert [few.keys.shape[1] for few in found.absorption.few] == [48, 0, 0, 48]


@pytest.mark.sweep
def test_tokens_stand_for_histories_of_quantized_graphs_that_are_saved_and_optimized(tiny, quantized, tmp_path):
    policy = dataclasses.replace(PLAIN, absorb=Absorb(tokens=48))
    module = absorb_cache(quantized, policy)
    fxq.save(module, tmp_path / "bundle", fingerprint=False)
    whole, want = made(tiny, quantized, PLAIN, 7, 4).latents, made(tiny, module, policy, 7, 4).latents
    loaded = fxq.load(tmp_path / "bundle")
    assert torch.equal(made(tiny, loaded, policy, 7, 4).latents, want)
    assert psnr(want, whole, (5, 7)) >= 42
    assert psnr(made(tiny, fxq.optimize(loaded), policy, 7, 4).latents, whole, (5, 7)) >= 38


def test_a_packed_graph_with_maps_equals_a_dense_one(tiny, traced, absorbing):
    graphs = [run_passes(traced.fork(), passes).module for passes in (_ORDER, _ORDER[::-1])]
    assert convention(graphs[0])[0][-3:] == [*TABLES, MAPS] and convention(graphs[1])[0][-3:] == [MAPS, *TABLES]
    first, second = (made(tiny, graph, CODED, 7, 2).latents for graph in graphs)
    dense = made(tiny, absorbing, CODED, 7, 2).latents
    assert torch.equal(first, second) and psnr(first, dense, (0, 7)) > 100


_ORDER = (PackCache(CODED), AbsorbCache(CODED))


def test_a_new_video_begins_anew(tiny, absorbing):
    rollout = rollout_of(tiny, POLICY, 7, 2)
    with rollout.using(absorbing):
        first, second = (rollout.rollout(*rollout.batches[0]) for _ in range(2))
    assert torch.equal(first, second)


def test_a_fork_before_the_switch_goes_on_alike(tiny, absorbing):
    rollout = rollout_of(tiny, POLICY, 7, 2)
    with rollout.using(absorbing):
        state = rollout.begin(*rollout.batches[0])
        for _ in range(4):
            state = rollout.advance(state)
        kept = rollout.fork(state)
        found = []
        for start in (state, kept):
            after = start
            for _ in range(3):
                after = rollout.advance(after)
            found.append(after.latents)
    assert torch.equal(*found)


def advanced(rollout, module, state, chunks):
    with rollout.using(module):
        for _ in range(chunks):
            state = rollout.advance(state)
    return state


SAVED = {
    "maps": POLICY,
    "codecs": CODED,
    "relative": dataclasses.replace(POLICY, window=21, positions="relative"),
    "tokens": dataclasses.replace(PLAIN, absorb=Absorb(tokens=48)),
}


PLACES = {"maps": (1, 4, 5, 6), "codecs": (4, 6), "relative": (6,), "tokens": (6,)}


@pytest.mark.parametrize("name", PLACES)
def test_a_rollout_goes_on_from_a_file_bit_for_bit(name, tiny, traced, absorbing, tmp_path):
    policy, module, places = SAVED[name], absorbing, PLACES[name]
    if name != "maps":
        passes = _ORDER if name == "codecs" else (AbsorbCache(policy),)
        module = run_passes(traced.fork(), passes).module
    rollout, other = (rollout_of(tiny, policy, 8, 2) for _ in range(2))
    state = rollout.begin(*rollout.batches[0])
    for place in places:
        state = advanced(rollout, module, state, place - state.next_unit)
        save_state(state, tmp_path / str(place))
    want = advanced(rollout, module, state, 8 - places[-1])
    assert want.absorption.converted == (0, 3)
    for place in places:
        got = advanced(other, module, load_state(other, tmp_path / str(place)), 8 - place)
        assert torch.equal(got.latents, want.latents)
        assert got.cache.closed == want.cache.closed and got.absorption.verdicts == want.absorption.verdicts


def test_a_file_of_another_rollout_that_absorbs_is_refused(tiny, absorbing, tmp_path):
    rollout = rollout_of(tiny, POLICY, 7, 2)
    save_state(advanced(rollout, absorbing, rollout.begin(*rollout.batches[0]), 5), tmp_path / "state")
    with safe_open(tmp_path / "state", "pt") as file:
        told = json.loads(file.metadata()["fxq_state"])
    tensors = load_file(tmp_path / "state")
    for change, more, message in (
        ({"closed": [0]}, {}, r"keys\.3\.exact is"),
        ({"closed": [3, 0]}, {}, r"no history of layers \[3, 0\]: expected some of 4 layers"),
        ({"closed": [0, 9]}, {}, "expected some of 4 layers"),
        ({"closed": "all"}, {}, "expected some of 4 layers"),
        ({}, {"absorption.map.1": torch.zeros(1)}, r"holds 'absorption\.map\.1', which no setting"),
    ):
        facts = told | {"cache": told["cache"] | change}
        save_file(tensors | more, tmp_path / "other", metadata={"fxq_state": json.dumps(facts)})
        with pytest.raises(SavedCacheError, match=message):
            load_state(rollout, tmp_path / "other")
    rollout.absorb_priors = tuple(torch.zeros(1, 1, 96, 96) for _ in range(4))
    with pytest.raises(SavedCacheError, match="other priors"):
        load_state(rollout, tmp_path / "state")


@pytest.mark.parametrize("packed", [False, True])
def test_what_maps_are_fitted_to_is_attention_of_both_kinds(tiny, traced, packed):
    passes = _ORDER if packed else (AbsorbCache(POLICY),)
    graph, policy = run_passes(traced.fork(), passes).module, CODED if packed else POLICY
    rollout, hidden, calls = rollout_of(tiny, policy, 4, 2), [], []
    state = rollout.begin(*rollout.batches[0])
    with rollout.using(graph):
        for _ in range(3):
            state = rollout.advance(state)

    def kept(module, args, output):
        hidden.append(args[0])

    def dense(*args):
        calls.append(args)
        return tiny(*args)

    hooks = [block.self_attn.q.register_forward_hook(kept) for block in tiny.blocks]
    rollout.sampler = dataclasses.replace(rollout.sampler, cache=dataclasses.replace(policy, absorb=None))
    with rollout.using(dense):
        rollout.advance(dataclasses.replace(rollout.fork(state), absorption=None))
    for hook in hooks:
        hook.remove()
    *head, keys, values, cos, sin = calls[0]
    found = packed_inputs(state.cache)
    maps = list(state.absorption.maps)
    tables = (found.cos, found.sin) if packed else ()
    prefix = (found.keys, found.values) if packed else (keys, values)
    with torch.no_grad():
        pairs = observed(graph, 75)(*head, *prefix, cos, sin, *tables, maps)[-1]
    for i, (local, full) in enumerate(pairs):
        q, k, v = tiny.blocks[i].self_attn.qkv(hidden[i], cos, sin)
        for got, tokens in ((local, 75), (full, keys[i].shape[1])):
            joined = [torch.cat((x[i][:, :tokens], n), 1) for x, n in ((keys, k), (values, v))]
            assert torch.allclose(got, attention(q, *joined), atol=1e-4)


@pytest.mark.sweep
def test_it_is_saved_loaded_and_optimized_as_any_module(tiny, quantized, tmp_path):
    module = absorb_cache(quantized, POLICY)
    names, facts = convention(module)[0], Facts.of(module)
    assert names[-1] == MAPS and list(facts.passes)[-1] == ["AbsorbCache", 4]
    assert facts.inputs[-4:] == [[None, 1, 96, 96]] * 4 and rules_of(module).names[-1] == "absorb_map_3"
    fxq.save(module, tmp_path / "bundle")
    assert fxq.verify_bundle(tmp_path / "bundle")
    loaded = fxq.load(tmp_path / "bundle")
    want = made(tiny, module, POLICY, 6, 2).latents
    assert torch.equal(made(tiny, loaded, POLICY, 6, 2).latents, want)
    fast = fxq.optimize(loaded)
    assert len(fast.graph.find_nodes(op="call_function", target=absorb.definition)) == 4
    assert psnr(made(tiny, fast, POLICY, 6, 2).latents, want, (0, 6)) > 40


def test_what_cannot_absorb_is_named(tiny, absorbing, quantized, traced):
    with pytest.raises(PassError, match="absorbs nothing: set its absorb"):
        absorb_cache(quantized, PLAIN)
    with pytest.raises(PassError, match="takes maps already"):
        run_passes(traced.fork(), (AbsorbCache(POLICY), AbsorbCache(POLICY)))
    tokens = dataclasses.replace(PLAIN, absorb=Absorb(tokens=4))
    with pytest.raises(PassError, match="do not go with a packed cache; use maps, tokens = 0"):
        run_passes(traced.fork(), (PackCache(CODED), AbsorbCache(tokens)))
    with pytest.raises(ValueError, match="does not take absorb_tokens"):
        made(tiny, absorbing, tokens, 1, 2)
    with pytest.raises(PassError, match="no input is joined with new keys"):
        run_passes(trace(torch.nn.Linear(4, 4), (torch.randn(2, 4),)), (AbsorbCache(POLICY),))
    with pytest.raises(PassError, match="run AbsorbCache before"):
        observed(traced.module, 75)
    with pytest.raises(ValueError, match=r"does not take absorb_maps: make one that does, fxq\.passes\.absorb_cache"):
        made(tiny, tiny, POLICY, 1, 2)
    with pytest.raises(
        ValueError, match="the module takes absorb_maps and the cache policy gives none: set its absorb"
    ):
        made(tiny, absorbing, PLAIN, 1, 2)


@pytest.mark.sweep
def test_a_prior_helps_where_a_video_says_little(tiny, absorbing):
    """Maps are drawn to the one of other videos; with a ridge that leaves nothing else, layers still are absorbed."""
    policy = dataclasses.replace(PLAIN, absorb=Absorb(alpha=1e6))
    rollout = rollout_of(tiny, policy, 5, 8)
    maps = [found.mean(0, keepdim=True) for found in made(tiny, absorbing, POLICY, 5, 8).absorption.maps]
    left = []
    for priors in ((), maps):
        rollout = rollout_of(tiny, policy, 5, 8)
        rollout.absorb_priors = tuple(priors)
        state = rollout.begin(*rollout.batches[0])
        with rollout.using(absorbing):
            for _ in range(5):
                state = rollout.advance(state)
        left.append(state.absorption.verdicts[0].left)
    assert left[0] > 0.9 and left[1] < 0.5
