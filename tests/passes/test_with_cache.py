"""A recipe's cache: quantized weights, encoded keys and values and absorbed layers in one graph that is saved."""

import copy
import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest
import torch

import fxq
from fxq.cache.absorb import Absorb
from fxq.cache.codecs import Klt, PerToken, Prq
from fxq.cache.codecs.klt import FIT_TOKENS
from fxq.cache.policy import CachePolicy
from fxq.cache.tables import learned, same_tables
from fxq.lab import tiny_rollout
from fxq.models.tiny import load_tiny
from fxq.passes import PassError, pack_cache
from fxq.passes.match.cache_inputs import held_tables
from fxq.passes.with_cache import policy_of
from tests.metrics.test_latents import doubling
from tests.toys import recipe, rows, toy, wan_rollout

CODECS = {"keys": Klt(1.0), "values": Prq(1, 16, 2, 32), "span": 2}
POLICY = CachePolicy(window=21, sink=3, positions="relative", absorb=Absorb(warmup=4), **CODECS)
CHUNKS = 8

ELSEWHERE = """
import dataclasses, sys, torch, fxq
from fxq.lab import tiny_rollout
from fxq.models.tiny import load_tiny
from fxq.passes.with_cache import policy_of
torch.set_num_threads(1)
module = fxq.load(sys.argv[1])
rollout, _ = tiny_rollout(load_tiny(), 1, seed=2, unseen=True)
rollout.sampler = dataclasses.replace(rollout.sampler, cache=policy_of(module))
with rollout.using(module):
    torch.save(rollout.rollout(*rollout.batches[0]), sys.argv[2])
"""


def rollout_of(policy):
    rollout, _ = tiny_rollout(load_tiny(), 1, seed=2, unseen=True)
    rollout.sampler = dataclasses.replace(rollout.sampler, cache=policy)
    return rollout


@pytest.fixture(scope="module")
def quantized():
    rollout, _ = tiny_rollout(load_tiny(), 2, seed=1, unseen=False)
    chosen = dataclasses.replace(recipe(4), cache=POLICY)
    return fxq.quantize(rollout.denoiser, rollout, chosen, progress=False)


def test_the_graph_takes_what_the_recipe_keeps(quantized):
    assert policy_of(quantized) == POLICY
    names = {str(node.target) for node in quantized.graph.nodes}
    assert {"fxq.attention_packed.default", "fxq.absorb.default"} <= names
    assert fxq.summary(quantized).quantized


@pytest.mark.slow
def test_weights_cache_and_maps_are_loaded_elsewhere_with_the_same_bytes(quantized, tmp_path):
    folder = fxq.save(quantized, tmp_path / "bundle")
    rollout = rollout_of(POLICY)
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-c", ELSEWHERE, str(folder), str(tmp_path / "video.pt")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with rollout.using(quantized):
            want = rollout.rollout(*rollout.batches[0])
    finally:
        torch.set_num_threads(threads)
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "video.pt", weights_only=True), want)
    plain = rollout_of(CachePolicy(window=21, sink=3, positions="relative"))
    float_video = plain.rollout(*plain.batches[0])
    assert float((want - float_video).pow(2).mean()) < 0.01


@pytest.mark.sweep
def test_a_recipe_without_codecs_changes_no_graph():
    policy = CachePolicy(window=21, sink=3)
    rollout, _ = tiny_rollout(load_tiny(), 1, seed=1, unseen=False)
    dynamic = dataclasses.replace(fxq.PRESETS["w8a8-dynamic"], cache=policy)
    q = fxq.quantize(rollout.denoiser, rollout, dynamic, progress=False)
    assert policy_of(q) == policy and "packed" not in str(q.graph)
    assert json.loads(json.dumps(fxq.summary(q).to_json()))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (CachePolicy(keys=(Klt(1.0),) * 3, span=2), "keys names 3 codecs"),
        (CachePolicy(keys=PerToken(2, 64), span=2), "not whole blocks"),
    ],
)
def test_a_cache_that_cannot_be_is_refused_before_the_work(policy, message):
    rollout, _ = tiny_rollout(load_tiny(), 1, seed=1, unseen=False)
    chosen = dataclasses.replace(fxq.PRESETS["w4a8"], cache=policy)
    with pytest.raises(PassError, match=message):
        fxq.quantize(rollout.denoiser, rollout, chosen, progress=False)


def test_a_model_without_a_cache_is_refused():
    chosen = dataclasses.replace(recipe(), cache=CachePolicy(keys=Klt(1.0)))
    with pytest.raises(PassError, match="no input is joined with new keys and values"):
        fxq.quantize(toy(), [rows(32, 96)], chosen, progress=False)


LEARNED = CachePolicy(keys=Klt(1.0, fit="model"), values=Klt(2.0, joint=True, fit="model"), span=1)


def learning(policy=LEARNED):
    rollout = wan_rollout(frames=10)
    rollout.sampler = dataclasses.replace(rollout.sampler, cache=policy)
    return rollout


def quantized_with(policy, rollout, **options):
    chosen = dataclasses.replace(fxq.PRESETS["w8a8-dynamic"], cache=policy)
    return fxq.quantize(rollout.denoiser, rollout, chosen, progress=False, **options)


@pytest.fixture(scope="module")
def holding():
    return quantized_with(LEARNED, wan_rollout(frames=10))


def video(rollout, module):
    with rollout.using(module):
        return rollout.rollout(*rollout.batches[0])


def test_a_module_holds_what_its_codecs_learned(holding):
    names = [name for name, _ in holding.named_buffers() if name.startswith("cache_tables.")]
    assert len(names) == 8 and "cache_tables.values.0.basis" in names
    held = held_tables(holding, LEARNED, 1, (2, 32))
    assert all(t.is_contiguous() for kind in held for memory in kind for t in memory.values())  # as a file gives them
    source = wan_rollout(frames=10)
    assert same_tables(held, learned(LEARNED, [source.cached_tokens(*source.batches[0], LEARNED, FIT_TOKENS)], 1))
    taken = [str(node.target) for node in holding.graph.find_nodes(op="placeholder")]
    assert "prefix_k_0_planes" in taken and "prefix_k_0_basis" not in taken


def test_held_tables_do_what_those_of_a_rollout_do(holding):
    bare = pack_cache(quantized_with(None, wan_rollout(frames=10)), LEARNED)
    given = learning()
    given.cache_tables = held_tables(holding, LEARNED, 1, (2, 32))
    want = video(given, bare)
    assert torch.equal(video(learning(), holding), want) and torch.equal(video(given, holding), want)
    assert torch.equal(video(learning(), copy.deepcopy(holding)), want)
    exact = learning(CachePolicy())
    off = float((want - exact.rollout(*exact.batches[0])).square().mean())
    assert 0 < off < 0.1


def test_another_module_s_tables_are_refused(holding):
    other = learning()
    tables = held_tables(holding, LEARNED, 1, (2, 32))
    other.cache_tables = ([{**tables[0][0], "mean": tables[0][0]["mean"] + 1}], tables[1])
    with pytest.raises(ValueError, match="the module holds other tables of its codecs than cache_tables"):
        video(other, holding)
    state = other.begin(*other.batches[0])
    other.cache_tables = None
    with other.using(holding), pytest.raises(ValueError, match="layer 0, keys: the cache was begun with other tables"):
        other.advance(state)


def test_a_bundle_brings_its_tables_and_verify_looks_at_them(holding, tmp_path):
    folder = fxq.save(holding, tmp_path / "bundle")
    loaded = fxq.load(folder)
    assert policy_of(loaded) == LEARNED
    assert torch.equal(video(learning(), loaded), video(learning(), holding))
    assert [(c.name, c.status) for c in fxq.export.verify_bundle(folder).checks][-1] == (
        "one call against the fingerprint",
        "passed",
    )
    optimized = fxq.optimize(loaded)
    assert float((video(learning(), optimized) - video(learning(), holding)).abs().max()) < 0.2


def test_codecs_learn_from_rollouts_alone():
    source = wan_rollout()
    args, shapes = source.example_call()
    chosen = dataclasses.replace(fxq.PRESETS["w8a8-dynamic"], cache=LEARNED)
    for loader in (None, [args]):
        with pytest.raises(fxq.CalibrationError, match=r"which learn from rollouts: give a fxq\.Rollout"):
            fxq.quantize(source.denoiser, loader, chosen, example_inputs=args, dynamic_shapes=shapes, progress=False)
    with pytest.raises(NotImplementedError, match="Doubling keeps no fxq cache"):
        other = doubling()
        other.cached_tokens(*other.batches[0], LEARNED, 8)


@pytest.mark.sweep
def test_a_killed_run_does_not_look_at_the_videos_again(holding, tmp_path, monkeypatch):
    quantized_with(LEARNED, wan_rollout(frames=10), checkpoint_dir=tmp_path)
    assert "cache-0.safetensors" in {file.name for file in tmp_path.iterdir()}
    monkeypatch.setattr("fxq.models.self_forcing.SelfForcingRollout.cached_tokens", None)
    again = quantized_with(LEARNED, wan_rollout(frames=10), checkpoint_dir=tmp_path)
    assert same_tables(*(held_tables(module, LEARNED, 1, (2, 32)) for module in (again, holding)))


def test_tables_that_do_not_fit_are_named(holding):
    with pytest.raises(PassError, match=r"layers: expected keys and values of 1"):
        pack_cache(quantized_with(None, wan_rollout()), LEARNED, ([{}, {}], [{}, {}]))
    with pytest.raises(PassError, match="layer 0, keys: codec klt: mean is missing"):
        pack_cache(quantized_with(None, wan_rollout()), LEARNED, ([{}], [{}]))


@pytest.mark.sweep
def test_a_fresh_process_makes_the_same_bytes_with_the_tables_of_the_bundle(tmp_path):
    policy = CachePolicy(keys=Klt(1.0, fit="model"), values=Klt(1.0, fit="model"), span=2)
    rollout, _ = tiny_rollout(load_tiny(), 2, seed=1, unseen=False)
    module = quantized_with(policy, rollout)
    folder = fxq.save(module, tmp_path / "bundle")
    command = [sys.executable, "-c", ELSEWHERE, str(folder), str(tmp_path / "video.pt")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        want = video(rollout_of(policy), module)
    finally:
        torch.set_num_threads(threads)
    done = subprocess.run(command, cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "video.pt", weights_only=True), want)
