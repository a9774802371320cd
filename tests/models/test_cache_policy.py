"""The functional cache against the official in-place rule: fixed slots, two end indices, eviction by moving left."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fxq.models.causal_wan import CausalWan, CausalWanConfig
from tests.models.golden import replay
from tests.models.inplace import Cache, dump

CONFIG = CausalWanConfig(
    dim=24,
    ffn_dim=40,
    num_heads=2,
    num_layers=2,
    freq_dim=16,
    text_dim=10,
    text_len=5,
    in_dim=3,
    out_dim=3,
)
SETTINGS = {
    "batch": 1,
    "frames_per_chunk": 3,
    "chunks": 4,
    "initial_chunks": 0,
    "steps": [1000, 500],
    "first_chunk_steps": None,
    "no_warp": False,
    "shift": 5.0,
    "context_noise": 0,
    "local_attn_size": -1,
    "sink_size": 0,
    "height": 4,
    "width": 6,
    "text_tokens": 5,
}


def small_model(dtype=torch.float32):
    torch.manual_seed(3)
    return CausalWan(CONFIG).to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"local_attn_size": 6},
        {"local_attn_size": 6, "sink_size": 3},
        {"local_attn_size": 7, "sink_size": 1, "chunks": 5},
        {"local_attn_size": 5, "sink_size": 1, "frames_per_chunk": 2, "chunks": 6},
        {"local_attn_size": 3, "sink_size": 0, "chunks": 3},
        {"local_attn_size": 4, "sink_size": 3},
        {"local_attn_size": 6, "sink_size": 3, "initial_chunks": 1, "batch": 2},
        {"local_attn_size": 3, "sink_size": 1, "frames_per_chunk": 1, "chunks": 6, "initial_chunks": 2},
        {"frames_per_chunk": 1, "initial_chunks": 1, "batch": 2, "first_chunk_steps": [1000, 750, 500, 250]},
        {"frames_per_chunk": 1, "steps": [1000], "first_chunk_steps": [1000, 750, 250]},
        {"no_warp": True, "steps": [1000, 757, 522], "shift": 8.0, "context_noise": 40},
        {"context_noise": 0.5, "shift": 3.0, "text_tokens": 2, "batch": 3, "height": 6},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()) or "full-cache",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_functional_cache_equals_the_in_place_rule(tmp_path, changes, dtype):
    path = tmp_path / "dump.safetensors"
    dump(path, small_model(dtype), args={**SETTINGS, **changes})
    errors = replay(path)
    assert {"cache", "cross", "call", "out", "schedule"} <= {name.split(".")[0] for name in errors}
    worst = max(errors, key=errors.get)
    assert errors[worst] < 2e-5, worst


def test_bfloat16_rollouts_agree_within_rounding(tmp_path):
    dump(tmp_path / "dump.safetensors", small_model(torch.bfloat16), args={**SETTINGS, "local_attn_size": 6})
    errors = replay(tmp_path / "dump.safetensors")
    assert errors["out.latents"] < 0.25
    assert errors["call.000.flow"] < 0.05


@pytest.mark.parametrize("tensor", ["call.004.flow", "cache.02.00.k", "out.latents", "call.003.t"])
def test_the_replay_reports_a_disturbed_tensor(tmp_path, tensor):
    path = tmp_path / "dump.safetensors"
    dump(path, small_model(), args={**SETTINGS, "local_attn_size": 6})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[tensor] = tensors[tensor] + 0.01
    save_file(tensors, path, metadata=metadata)
    assert replay(path)[tensor] > 5e-3


def test_a_wrong_window_is_noticed(tmp_path):
    path = tmp_path / "dump.safetensors"
    dump(path, small_model(), args={**SETTINGS, "local_attn_size": 6})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["args"] = json.dumps(json.loads(metadata["args"]) | {"local_attn_size": 7})
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(AssertionError, match="local_end"):
        replay(path)


def test_the_in_place_cache_keeps_sink_and_newest_tokens():
    cache = Cache(1, 6, 1, 1, torch.float32)
    for start in range(0, 16, 2):
        for _ in range(3):
            new = torch.arange(start, start + 2.0).reshape(1, 2, 1, 1)
            seen, _ = cache.write(new, new, start, 2, 6, True)
    assert seen.flatten().tolist() == [0, 1, 12, 13, 14, 15]


@pytest.mark.parametrize("first_label", [0, -1])
@pytest.mark.parametrize("latents_named", [True, False])
def test_the_replay_finds_given_latents_however_they_are_stored(tmp_path, first_label, latents_named):
    path = tmp_path / "dump.safetensors"
    dump(path, small_model(), args={**SETTINGS, "frames_per_chunk": 1, "initial_chunks": 1, "batch": 2})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    calls, tensors = json.loads(metadata["calls"]), load_file(path)
    for call in calls:
        call["chunk"] += first_label
    if first_label:
        tensors = {re.sub(r"^cache\.(\d+)", lambda m: f"cache.{int(m[1]) - 1:02d}", k): v for k, v in tensors.items()}
        tensors = {k: v for k, v in tensors.items() if not k.startswith("cache.-1")}
    given = tensors.pop("in.initial_latent")
    if latents_named:
        tensors["in.initial"] = given
    else:
        tensors["in.noise"] = torch.cat((given, tensors["in.noise"]), dim=1)
        tensors["out.latents"] = tensors["out.latents"][:, 1:].contiguous()
    save_file(tensors, path, metadata={**metadata, "calls": json.dumps(calls)})
    errors = replay(path)
    assert max(errors.values()) < 2e-5
    assert sum(name.startswith("cache.") for name in errors) == (5 if first_label == 0 else 4) * 4
