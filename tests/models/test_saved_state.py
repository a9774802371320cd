"""A killed rollout goes on from a file."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fxq.cache.codecs import Klt, Prq
from fxq.cache.policy import CachePolicy
from fxq.cache.saved import SavedCacheError
from fxq.lab import tiny_rollout
from fxq.models.saved_state import load_state, save_state
from fxq.models.tiny import load_tiny
from tests.features import assert_same

POLICIES = {
    "growing": CachePolicy(),
    "window": CachePolicy(window=9, sink=1),
    "relative": CachePolicy(window=9, sink=2, positions="relative"),
    "klt": CachePolicy(window=15, sink=3, positions="relative", keys=Klt(1.0), values=Klt(1.0), span=1),
    "prq": CachePolicy(keys=Prq(2, 16, block=16, iterations=3), span=2, layers=(0, 2)),
}


@pytest.fixture(scope="module")
def model():
    return load_tiny()


def rollout_of(model, policy, seed=4):
    rollout, _ = tiny_rollout(model, 2, seed=seed, unseen=True)
    rollout.sampler = dataclasses.replace(rollout.sampler, cache=policy)
    return rollout


def advanced(rollout, state, chunks):
    for _ in range(chunks):
        state = rollout.advance(state)
    return state


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("at", [0, 1, pytest.param(5, marks=pytest.mark.sweep)])
def test_the_rest_is_bit_for_bit_the_same(model, name, at, tmp_path):
    rollout = rollout_of(model, POLICIES[name])
    state = advanced(rollout, rollout.begin(*rollout.batches[0]), at)
    save_state(state, tmp_path / "state.safetensors")
    want = advanced(rollout, rollout.fork(state), 7 - at)
    other = rollout_of(model, POLICIES[name])
    got = advanced(other, load_state(other, tmp_path / "state.safetensors"), 7 - at)
    assert torch.equal(got.latents, want.latents)
    assert got.cache.nbytes("packed") == want.cache.nbytes("packed")
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.fixture
def saved(model, tmp_path):
    rollout = rollout_of(model, POLICIES["klt"])
    save_state(advanced(rollout, rollout.begin(*rollout.batches[0]), 4), tmp_path / "s")
    return rollout, tmp_path / "s"


def changed(path, tensors=None, drop=None, **facts):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["fxq_state"])
    for key, value in facts.items():
        (told if key in told else told["cache"])[key] = value
    found = {name: tensor for name, tensor in load_file(path).items() if name != drop} | (tensors or {})
    save_file(found, path, metadata={"fxq_state": json.dumps(told)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "latents"}, "latents is missing"),
        ({"drop": "keys.1.record.planes"}, r"keys\.1\.record\.planes is missing: expected torch.uint8"),
        ({"tensors": {"keys.0.exact": torch.zeros(2, 1, 3, 32)}}, r"keys\.0\.exact is torch.float32 \(2, 1, 3, 32\)"),
        ({"tensors": {"keys.9.exact": torch.zeros(1)}}, r"holds 'keys\.9\.exact', which no setting"),
        ({"frames": 7}, "expected|do not follow|finished chunks"),
        ({"frames": -1}, "counts"),
        ({"packed": 4}, "do not follow each other"),
        ({"layers": 3}, "in 3 layers"),
        ({"next_unit": "x"}, "facts are damaged"),
        ({"next_unit": 2}, "latents is"),
        ({"policy": {"window": 3, "codec": 1}}, "unknown setting 'codec'"),
        ({"policy": {"window": 9}}, "of another policy"),
        ({"video": {}}, "other prompts, noise or sizes"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(saved, change, message):
    rollout, path = saved
    changed(path, **change)
    with pytest.raises(SavedCacheError, match=message):
        load_state(rollout, path)


def test_a_truncated_or_foreign_file_is_refused(saved, tmp_path):
    rollout, path = saved
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SavedCacheError, match="no saved state"):
        load_state(rollout, path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(SavedCacheError, match="no saved state"):
        load_state(rollout, path)
    with pytest.raises(FileNotFoundError):
        load_state(rollout, tmp_path / "none")


def test_other_prompts_are_refused(saved, model):
    _, path = saved
    with pytest.raises(SavedCacheError, match="other prompts"):
        load_state(rollout_of(model, POLICIES["klt"], seed=5), path)


def test_a_state_goes_on_with_the_tables_it_was_made_with(model, tmp_path):
    codec = Klt(1.0, fit="model")
    policy = CachePolicy(keys=codec, span=1, layers=(1,))
    x = torch.randn(96, 3, 32, generator=torch.Generator().manual_seed(1))
    first, second = ([codec.learned(y)] * 4 for y in (x, x + 1))
    rollout = rollout_of(model, policy)
    rollout.cache_tables = first, [{}] * 4
    save_state(advanced(rollout, rollout.begin(*rollout.batches[0]), 3), tmp_path / "s")
    want = advanced(rollout, rollout.begin(*rollout.batches[0]), 4).latents
    got = advanced(rollout, load_state(rollout, tmp_path / "s"), 1).latents
    assert_same(got, want)
    rollout.cache_tables = second, [{}] * 4
    with pytest.raises(SavedCacheError, match=r"keys\.1: the saved cache was made with other tables"):
        load_state(rollout, tmp_path / "s")
