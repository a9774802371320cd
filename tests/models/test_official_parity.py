"""Replays dumps of the official Self-Forcing code, and of its form for settings that no dump here has.

Official files lie in the folder named by FXQ_GOLDEN, or else in ``../shared/golden`` beside the repository root.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from tests.models.golden import replay
from tests.models.golden_file import Golden, GoldenError, difference
from tests.models.official_form import ARGS, SETTINGS, read, rewrite, write

ROOT = pathlib.Path(__file__).resolve().parents[2]


def assert_equal(path):
    golden, errors = Golden(path), replay(path)
    assert {"call", "out"} <= {name.split(".")[0] for name in errors}
    share = {name: error / golden.tolerance(name) for name, error in errors.items()}
    worst = max(share, key=share.get)
    assert share[worst] <= 1, (
        f"{path.name}: {worst} differs by {errors[worst]:.2e}, allowed {golden.tolerance(worst):.2e} in "
        f"{golden.dtype}; {sum(s > 1 for s in share.values())} of {len(share)} tensors differ by more"
    )
    return errors


def test_every_call_cache_and_latent_equals_the_official_code(golden_path, record_property):
    errors = assert_equal(golden_path)
    record_property("largest_difference_of_latents", errors["out.latents"])


@pytest.fixture
def dumped(tmp_path, request):
    write(tmp_path / "dump.safetensors", **SETTINGS.get(getattr(request, "param", ""), {}))
    return tmp_path / "dump.safetensors"


@pytest.mark.parametrize("dumped", SETTINGS, indirect=True)
def test_the_reader_takes_every_setting_from_the_file(dumped):
    errors = assert_equal(dumped)
    names = {re.sub(r"\d+", "N", name) for name in errors}
    assert {"call.N.x", "call.N.t", "call.N.flow", "call.N.xN", "cache.N.N.k", "cross.N.v", "out.latents"} <= names


@pytest.mark.sweep
def test_a_folder_named_by_fxq_golden_gives_one_test_per_file(tmp_path):
    names = ("window_sink", "framewise", "initial", "bfloat16")
    for name in names:
        write(tmp_path / f"{name}.safetensors", **SETTINGS[name])
    this = "tests/models/test_official_parity.py::test_every_call_cache_and_latent_equals_the_official_code"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", this]
    environment = os.environ | {"FXQ_GOLDEN": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout
    passed = re.findall(r"official_code\[(\w+)\] PASSED", done.stdout)
    assert sorted(passed) == sorted(names)


def test_the_generated_form_is_the_official_one(golden_path, tmp_path):
    golden = Golden(golden_path)
    plain = {"initial_chunks": 0, "first_chunk_steps": None, "local_attn_size": -1, "no_warp": False}
    if golden.args.keys() != ARGS.keys() or any(golden.args[name] != value for name, value in plain.items()):
        pytest.skip("the form is compared on a file of the known tool with its default settings")
    write(tmp_path / "own", **golden.args)
    ours, metadata = read(tmp_path / "own")
    official = {name: (tensor.dtype, tensor.shape) for name, tensor in golden.tensors.items()}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in ours.items()}.items() <= official.items()
    assert {name.split(".")[0] for name in ours} == {name.split(".")[0] for name in official}
    assert metadata.keys() <= golden.metadata.keys()
    assert Golden(tmp_path / "own").calls == golden.calls


def drop_settings(tensors, metadata):
    for name in (
        "frames_per_chunk",
        "steps",
        "local_attn_size",
        "sink_size",
        "initial_chunks",
        "heads",
        "dim",
        "text_len",
    ):
        del metadata["args"][name]
    metadata["config"] = {"model_type": "t2v"}


def drop_metadata(tensors, metadata):
    metadata.clear()


def add_settings(tensors, metadata):
    metadata["args"] |= {"causal_extra": [1, 2], "teacher": None, "compile": True}
    metadata["config"]["window_size"] = [-1, -1]
    metadata["notes"] = "another tool"
    tensors["extra.attention"] = torch.ones(3)


def use_official_names(tensors, metadata):
    args = metadata["args"]
    args["num_frame_per_block"], args["denoising_step_list"] = args.pop("frames_per_chunk"), args.pop("steps")
    args["warp_denoising_step"], args["timestep_shift"] = not args.pop("no_warp"), args.pop("shift")


def drop_prefix(tensors, metadata):
    for name in [n for n in tensors if n.startswith("generator.")]:
        tensors[name.removeprefix("generator.model.")] = tensors.pop(name)


def drop_what_only_checks(tensors, metadata):
    for name in [n for n in tensors if re.match(r"schedule|cache|cross|renoise\.\d+\.(out|t)|call\.\d+\.x0", n)]:
        del tensors[name]
    for call in metadata["calls"]:
        del call["local_end"], call["kind"]


@pytest.mark.parametrize(
    "change",
    [drop_settings, drop_metadata, add_settings, use_official_names, drop_prefix, drop_what_only_checks],
    ids=lambda change: change.__name__,
)
def test_missing_additional_and_other_names_are_tolerated(dumped, change):
    rewrite(dumped, change)
    assert_equal(dumped)


def lose_weights(tensors, metadata):
    del tensors["generator.model.patch_embedding.weight"]


def lose_one_weight(tensors, metadata):
    del tensors["generator.model.blocks.1.ffn.2.bias"]


def lose_window(tensors, metadata):
    del metadata["args"]["local_attn_size"]


def lose_draws(tensors, metadata):
    del tensors["renoise.004.noise"]


def add_late_cache(tensors, metadata):
    tensors["cache.09.00.k"] = tensors["cache.00.00.k"].clone()


def lose_heads(tensors, metadata):
    del metadata["args"]["heads"], metadata["config"]["num_heads"]
    for name in [n for n in tensors if n.startswith(("cache", "cross"))]:
        del tensors[name]


@pytest.mark.parametrize("dumped", ["window"], indirect=True)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lose_weights, r"expected one tensor \.\.\.patch_embedding\.weight, found \[\]"),
        (lose_one_weight, r"blocks\.1\.ffn\.2\.bias"),
        (lose_window, r"its cache was rolled .* and args has no local_attn_size"),
        (lose_draws, r"11 renoise draws, expected 12 for 4 chunks of 3 frames with steps \(1000, 750, 500, 250\)"),
        (lose_heads, r"neither args nor config has num_heads"),
        (add_late_cache, r"cache\.09\.00\.k is of a chunk that no call names, 4 ran"),
        (lambda tensors, metadata: tensors.pop("in.noise"), r"has no tensor in\.noise; it has .*call\.N\.flow"),
        (lambda tensors, metadata: metadata.update(calls={}), r"metadata 'calls' is a dict, expected \[\]"),
        (lambda tensors, metadata: metadata["calls"].pop(), r"20 calls replayed, expected 19 \(calls in the metadata"),
        (
            lambda tensors, metadata: metadata["calls"][7].update(kind="context"),
            r"call 7: kind is denoise, expected context",
        ),
    ],
)
def test_a_file_that_cannot_be_replayed_says_why(dumped, change, reason):
    rewrite(dumped, change)
    with pytest.raises(AssertionError, match=reason):
        replay(dumped)


def test_a_file_that_is_no_dump_is_named(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(GoldenError, match=r"broken\.safetensors is no safetensors file"):
        Golden(tmp_path / "broken.safetensors")


@pytest.mark.parametrize("dumped", ["float64", "bfloat16", ""], indirect=True)
def test_the_tolerance_is_that_of_the_dtype_and_a_disturbed_tensor_exceeds_it(dumped):
    size = 0.5 if Golden(dumped).dtype == torch.bfloat16 else 1e-3

    def disturb(tensors, metadata):
        tensors["out.latents"] += size * tensors["out.latents"].abs().max()

    before = Golden(dumped).tensors["out.latents"]
    rewrite(dumped, disturb)
    assert difference(Golden(dumped).tensors["out.latents"], before) > 0
    with pytest.raises(AssertionError, match=r"out\.latents differs by .* allowed .* in torch"):
        assert_equal(dumped)
