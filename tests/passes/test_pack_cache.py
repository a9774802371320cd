"""The pass that lets a graph read encoded caches: results, signature, copies, bundles, and what it refuses."""

import copy
import dataclasses
import hashlib
import subprocess
import sys

import pytest
import torch

import fxq
from benchmarks.live_bytes import LiveBytes
from fxq.cache.codecs import Exact, Klt, PerToken, Prq
from fxq.cache.policy import CachePolicy
from fxq.calibration.rollout import Draws
from fxq.calls.captured import convention, rules_of
from fxq.calls.rules import InputError
from fxq.capture.trace import trace
from fxq.core.facts import Facts
from fxq.core.ir import Stage
from fxq.core.pipeline import PassError, run_passes
from fxq.integrations.torch_compile import fxq_backend
from fxq.kernels import attention_packed
from fxq.lab import tiny_rollout
from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.models.self_forcing import SamplerConfig, SelfForcingRollout
from fxq.models.tiny import load_tiny
from fxq.passes import PackCache, pack_cache
from fxq.passes.match.cache_inputs import TABLES, Packing

KLT = Klt(1.0, rank=12)
POLICY = CachePolicy(keys=KLT, values=KLT, span=2)


@pytest.fixture(scope="module")
def tiny():
    return load_tiny()


@pytest.fixture(scope="module")
def traced(tiny):
    rollout, _ = tiny_rollout(tiny, 2, seed=1, unseen=False)
    args, shapes = rollout.example_call()
    return trace(tiny, args, None, shapes)


@pytest.fixture(scope="module")
def quantized(tiny):
    rollout, _ = tiny_rollout(tiny, 2, seed=1, unseen=False)
    return fxq.quantize(tiny, rollout, "w8a8-dynamic", progress=False)


@pytest.fixture(scope="module")
def packed(quantized):
    return pack_cache(quantized, POLICY)


def video(model, module, policy, chunks=5, videos=2):
    rollout, _ = tiny_rollout(model, videos, seed=2, unseen=True)
    sampler = dataclasses.replace(rollout.sampler, cache=policy)
    rollout = SelfForcingRollout(model, rollout.batches, sampler)
    with rollout.using(module):
        return rollout.rollout(*rollout.batches[0], upto=chunks)


def error(got, want):
    return float((got - want).abs().max() / want.abs().max())


POLICIES = {
    "klt": POLICY,
    "some layers": CachePolicy(keys=Exact("float32"), values=KLT, span=1, layers=(0, 2)),
    "values alone": CachePolicy(values=PerToken(8, 32, scale_dtype="bfloat16"), span=1),
    "window": CachePolicy(window=14, sink=1, positions="relative", keys=KLT, values=Exact("float32"), span=1),
}


@pytest.mark.parametrize(
    "name", ["some layers", "window", *(pytest.param(n, marks=pytest.mark.sweep) for n in ("klt", "values alone"))]
)
def test_a_rollout_equals_that_on_the_decoded_cache(tiny, traced, name):
    graph = run_passes(traced.fork(), (PackCache(POLICIES[name]),))
    assert graph.stage == Stage.TRACED
    assert error(video(tiny, graph.module, POLICIES[name]), video(tiny, tiny, POLICIES[name])) < 1e-5


def test_one_call_of_a_quantized_graph_equals_that_on_the_decoded_cache(tiny, quantized, packed):
    """Teacher-forced: rounding moves activations over the borders of integers, and a rollout goes on from there."""
    rollout, _ = tiny_rollout(tiny, 2, seed=2, unseen=True)
    rollout.sampler = dataclasses.replace(rollout.sampler, cache=POLICY)
    state = rollout.begin(*rollout.batches[0])
    for _ in range(4):
        state = rollout.advance(state)
    found = []
    for module in (quantized, packed):
        with rollout.using(module):
            rollout.fork(state)
            outputs = []
            rollout.advance(state, lambda call, output, into=outputs: into.append(output[0]))
            found.append(outputs[0])
    assert error(found[1], found[0]) < 0.02
    assert float((found[1] - found[0]).square().mean() / found[0].square().mean()) < 1e-5


def test_the_signature_says_what_a_call_takes(quantized, packed):
    names, spec = convention(packed)
    assert names == [*convention(quantized)[0], *TABLES]
    prefix = spec.child(0).child(5).child(0)
    assert prefix.context == ["sink", "packed", "recent"]
    assert prefix.child(1).context == ["planes", "mean", "basis", "step", "width"]
    facts, rules = Facts.of(packed), rules_of(packed)
    assert list(rules.sizes) == list(facts.inputs) and len(rules.names) == len(facts.inputs)
    assert facts.inputs[rules.names.index("packed_cos")] == [None, 16]
    assert facts.inputs[rules.names.index("prefix_k_0_planes")] == [None, None, 96, 19]
    assert facts.passes[-1] == ["PackCache", 4]
    assert Packing.of(packed) == Packing.for_cache(POLICY, 4, 75)


def test_the_module_it_came_from_is_unchanged(tiny, quantized, packed):
    assert TABLES[0] not in convention(quantized)[0]
    assert not quantized.graph.find_nodes(op="call_function", target=attention_packed.definition)
    assert video(tiny, quantized, CachePolicy(), 2).isfinite().all()


def test_a_call_of_another_form_is_refused(packed):
    rollout, _ = tiny_rollout(load_tiny(), 2, seed=1, unseen=False)
    args, _ = rollout.example_call()
    with pytest.raises(InputError, match="packed_cos"):
        packed(*args)
    with pytest.raises(InputError, match="nested in another way"):
        packed(*args, *args[-2:])


def test_a_copy_computes_the_same(tiny, packed):
    assert torch.equal(video(tiny, copy.deepcopy(packed), POLICY, 4), video(tiny, packed, POLICY, 4))


def test_a_rollout_with_another_policy_is_refused(tiny, packed):
    with pytest.raises(ValueError, match="packed for a cache"):
        video(tiny, packed, CachePolicy())
    with pytest.raises(ValueError, match="pack it with the cache policy of the sampler"):
        video(tiny, packed, dataclasses.replace(POLICY, span=1))


_FRESH = """
import sys, hashlib, torch, fxq
from tests.passes.test_pack_cache import POLICY, load_tiny, video
module = fxq.load(sys.argv[1])
print(hashlib.sha256(video(load_tiny(), module, POLICY, 4).numpy().tobytes()).hexdigest())
"""


@pytest.mark.sweep
def test_a_saved_module_gives_the_same_bytes_in_another_process(tiny, packed, tmp_path):
    fxq.save(packed, tmp_path / "bundle")
    command = [sys.executable, "-c", _FRESH, str(tmp_path / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    want = hashlib.sha256(video(tiny, packed, POLICY, 4).numpy().tobytes()).hexdigest()
    assert done.stdout.split()[-1] == want


@pytest.mark.sweep
def test_a_bundle_from_before_gains_codecs_and_optimizing_commutes(tiny, quantized, packed, tmp_path):
    fxq.save(quantized, tmp_path / "bundle", fingerprint=False)
    later = pack_cache(fxq.load(tmp_path / "bundle"), POLICY)
    want = video(tiny, packed, POLICY, 4)
    assert torch.equal(video(tiny, later, POLICY, 4), want)
    first, second = fxq.optimize(later), pack_cache(fxq.optimize(quantized), POLICY)
    assert Facts.of(second).optimized and Facts.of(second).notes
    got = video(tiny, first, POLICY, 4)
    assert torch.equal(video(tiny, second, POLICY, 4), got)
    assert error(got, want) < 0.1


def test_bytes_of_a_call_stay_below_those_of_the_decoded_cache(tiny, traced):
    policy = CachePolicy(keys=Prq(1, 16, block=32), values=PerToken(2, 32, scale_dtype="bfloat16"), span=1)
    module = run_passes(traced.fork(), (PackCache(policy),)).module
    rollout, _ = tiny_rollout(tiny, 2, seed=2, unseen=True)
    longer = Draws(rollout.batches[0][1].seeds, (45, 3, 20, 20))
    sampler = dataclasses.replace(rollout.sampler, cache=policy)
    rollout = SelfForcingRollout(tiny, [(rollout.batches[0][0], longer)], sampler)
    state = rollout.begin(*rollout.batches[0])
    for _ in range(14):
        state = rollout.advance(state)
    args = call_of(rollout, state, module)
    with LiveBytes() as packed, torch.no_grad():
        module(*args)
    with LiveBytes() as dense:
        prefix = state.cache.evict().prefix()
    del prefix
    span = 4 * 2 * 75 * 3 * 32
    hidden = 4 * 2 * 75 * 384  # of the largest layer, no part of the cache
    assert packed.largest <= max(4 * span, hidden) < dense.largest == 14 * span
    assert dense.peak >= 8 * 13 * span and packed.peak < dense.peak / 4
    assert state.cache.nbytes("packed") < 8 * 13 * span / 4


def call_of(rollout, state, module):
    """Arguments of the first call that a rollout makes of a module."""
    taken = []

    def keep(*args):
        taken.append(args)
        return module(*args)

    keep._orig_mod = module
    with rollout.using(keep):
        rollout.advance(rollout.fork(state))
    return taken[0]


@pytest.mark.sweep
def test_a_packed_graph_compiles(tiny):
    config = CausalWanConfig(
        dim=48, ffn_dim=64, num_heads=3, num_layers=1, freq_dim=16, text_dim=8, text_len=4, in_dim=3, out_dim=3
    )
    torch.manual_seed(0)
    model, policy = (
        CausalWan(config).eval(),
        CachePolicy(keys=KLT, values=PerToken(8, 16, scale_dtype="bfloat16"), span=1),
    )
    draws = Draws([1, 2], (9, 3, 4, 4))
    sampler = SamplerConfig(steps=(1000, 500), cache=policy)
    rollout = SelfForcingRollout(model, [({"prompt_embeds": torch.randn(2, 4, 8)}, draws)], sampler)
    args, shapes = rollout.example_call()
    graph = run_passes(trace(model, args, None, shapes), (PackCache(policy),)).module
    integers = fxq.quantize(model, rollout, "w8a8-dynamic", progress=False)
    state = rollout.begin(*rollout.batches[0])
    for _ in range(2):
        state = rollout.advance(state)
    args = call_of(rollout, state, graph)
    compiled = torch.compile(graph, backend=fxq_backend, options={"fxq.recipe": integers})
    with torch.no_grad():
        got, want = compiled(*args)[0], pack_cache(integers, policy)(*args)[0]
    assert error(got, want) < 0.02


def test_what_cannot_be_packed_is_named(tiny, quantized, packed, traced):
    with pytest.raises(PassError, match="has no codec: set its keys or values"):
        pack_cache(quantized, CachePolicy())
    with pytest.raises(PassError, match="packed cache already"):
        pack_cache(packed, POLICY)
    with pytest.raises(PassError, match=r"cache layers \[9\]: the model has layers 0 to 3"):
        pack_cache(quantized, dataclasses.replace(POLICY, layers=(9,)))
    with pytest.raises(PassError, match="encodes none of its 4 layers"):
        pack_cache(quantized, dataclasses.replace(POLICY, layers=()))
    with pytest.raises(PassError, match="256 centroids for spans of 75"):
        pack_cache(quantized, CachePolicy(keys=Prq(block=32), span=1))
    linear = trace(torch.nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(PassError, match="no input is joined with new keys and values"):
        run_passes(linear, (PackCache(POLICY),))
    with pytest.raises(ValueError, match="not made by fxq"):
        pack_cache(torch.fx.symbolic_trace(torch.nn.Linear(4, 4)), POLICY)


@pytest.mark.sweep
def test_graphs_for_frames_of_any_size_are_refused(tiny):
    rollout, _ = tiny_rollout(tiny, 2, seed=1, unseen=False)
    rollout.any_size = True
    args, shapes = rollout.example_call()
    with pytest.raises(PassError, match="tokens of a call varies: capture the model for frames of one size"):
        run_passes(trace(tiny, args, None, shapes), (PackCache(POLICY),))
