"""A recipe's cache: quantized weights, encoded keys and values and absorbed layers in one graph that is saved."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest
import torch

import fxq
from fxq.cache.absorb import Absorb
from fxq.cache.codecs import Klt, Prq
from fxq.cache.policy import CachePolicy
from fxq.lab import tiny_rollout
from fxq.models.tiny import load_tiny
from fxq.passes import PassError
from fxq.passes.with_cache import policy_of
from tests.toys import recipe, rows, toy

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
    with rollout.using(quantized):
        want = rollout.rollout(*rollout.batches[0])
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
        (CachePolicy(keys=Klt(1.0, fit="model"), span=2), "fit = 'video'"),
        (CachePolicy(keys=(Klt(1.0),) * 3, span=2), "keys names 3 codecs"),
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
