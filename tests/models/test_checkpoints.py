import collections
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from fxq.models import checkpoints, loading
from fxq.models.causal_wan import CausalWan, CausalWanConfig
from fxq.models.checkpoints import CheckpointError, compact, read_tensors
from fxq.models.families import FAMILIES, Family, read_settings, with_settings
from fxq.models.loading import layout, load_causal_wan
from fxq.models.lora import Update, read_lora

CONFIG = CausalWanConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=3, freq_dim=16, text_dim=20, text_len=5, in_dim=4, out_dim=4
)
FAMILY = Family(name="small", source="a test", config=CONFIG)


def weights(dtype=torch.float32, config=CONFIG):
    return {name: tensor.to(dtype) for name, tensor in CausalWan(config).state_dict().items()}


def prefixed(state, prefix="model."):
    return {prefix + name: tensor for name, tensor in state.items()}


def assert_holds(model, state):
    got = model.state_dict()
    assert got.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(got[name], tensor), name


def refused(path, family=FAMILY, **options):
    with pytest.raises(CheckpointError) as caught:
        load_causal_wan(path, family, **options)
    return str(caught.value)


def resident_bytes():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# Reading


@pytest.mark.parametrize("key", ["generator_ema", "generator", "model", None])
@pytest.mark.parametrize("prefix", ["", "model.", "model._fsdp_wrapped_module.", "generator.model.", "module.model."])
def test_pt_files_are_read_under_every_official_key_and_prefix(tmp_path, key, prefix):
    state = weights()
    content = prefixed(state, prefix)
    torch.save(content if key is None else {key: content, "step": 600}, tmp_path / "file.pt")
    assert_holds(load_causal_wan(tmp_path / "file.pt", FAMILY), state)


def test_parameters_in_a_file_become_tensors_without_gradients(tmp_path):
    state = {name: torch.nn.Parameter(tensor) for name, tensor in weights().items()}
    torch.save({"generator": collections.OrderedDict(state)}, tmp_path / "file.pt")
    torch.save(named(lora_pairs(state), FORMS[-1]), tmp_path / "lora.pt")
    model = load_causal_wan(tmp_path / "file.pt", BASED, lora=tmp_path / "lora.pt")
    assert all(p.is_leaf and not p.requires_grad for p in model.parameters())


def test_wrapper_names_inside_a_name_are_taken_off(tmp_path):
    state = weights()
    wrapped = {f"model.{n}".replace(".self_attn.", "._fsdp_wrapped_module.self_attn."): t for n, t in state.items()}
    torch.save({"generator": wrapped}, tmp_path / "file.pt")
    assert_holds(load_causal_wan(tmp_path / "file.pt", FAMILY), state)


def test_the_averaged_generator_is_preferred_and_the_family_can_choose_otherwise(tmp_path):
    average, last, critic = weights(), weights(), weights()
    torch.save({"critic": critic, "generator": last, "generator_ema": average}, tmp_path / "file.pt")
    assert_holds(load_causal_wan(tmp_path / "file.pt", FAMILY), average)
    other = dataclasses.replace(FAMILY, keys=FAMILIES["longlive"].keys)
    assert_holds(load_causal_wan(tmp_path / "file.pt", other), last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_model_keeps_the_dtype_of_its_file(tmp_path, dtype, suffix):
    path, state = tmp_path / f"file{suffix}", weights(dtype)
    save_file(state, path) if suffix == ".safetensors" else torch.save({"model": state}, path)
    model = load_causal_wan(path, FAMILY)
    assert_holds(model, state)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_the_dtype_can_be_chosen_and_mixed_files_get_the_dtype_of_most_elements(tmp_path):
    state = weights(torch.bfloat16) | {"head.modulation": torch.ones(1, 2, 24)}
    save_file(state, tmp_path / "file.safetensors")
    mixed = load_causal_wan(tmp_path / "file.safetensors", FAMILY)
    assert {p.dtype for p in mixed.parameters()} == {torch.bfloat16}
    chosen = load_causal_wan(tmp_path / "file.safetensors", FAMILY, dtype=torch.float32)
    assert_holds(chosen, {name: tensor.float() for name, tensor in state.items()})


def write_shards(folder, state, count=3):
    names = sorted(state)
    files = {name: f"part-{i % count}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: state[n] for n in names if files[n] == file}, folder / file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index


def test_sharded_folders_are_read_by_their_index(tmp_path):
    state = weights()
    write_shards(tmp_path, prefixed(state))
    assert_holds(load_causal_wan(tmp_path, FAMILY), state)


def test_a_folder_with_one_file_needs_no_index(tmp_path):
    state = weights()
    save_file(state, tmp_path / "only.safetensors")
    assert_holds(load_causal_wan(tmp_path, FAMILY), state)


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path, weights())
    (tmp_path / "part-1.safetensors").unlink()
    assert "1 of 3 shards are missing: part-1.safetensors" in refused(tmp_path)


def test_a_tensor_that_only_the_index_knows_is_named(tmp_path):
    index = write_shards(tmp_path, weights())
    content = json.loads(index.read_text())
    content["weight_map"]["blocks.7.ffn.0.weight"] = "part-0.safetensors"
    index.write_text(json.dumps(content))
    assert "no shard holds: blocks.[7].ffn.0.weight" in refused(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": [1]}'])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "m.safetensors.index.json").write_text(content)
    assert "is no index" in refused(tmp_path)


def test_an_index_cannot_point_outside_its_folder(tmp_path):
    (tmp_path / "m.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    assert "points outside its folder: ../secret.safetensors" in refused(tmp_path)


@pytest.mark.parametrize("count", [0, 2])
def test_a_folder_without_an_index_must_hold_one_file(tmp_path, count):
    for i in range(count):
        save_file({"a": torch.ones(1)}, tmp_path / f"{i}.safetensors")
    assert f"{count} .safetensors files and 0 indices" in refused(tmp_path)


@pytest.mark.parametrize("beside", [True, False])
def test_fused_projections_are_dropped_beside_their_parts_and_split_without_them(tmp_path, beside):
    state = weights()
    content = dict(state)
    for i in range(CONFIG.num_layers):
        for kind in ("weight", "bias"):
            parts = [f"blocks.{i}.self_attn.{part}.{kind}" for part in "qkv"]
            content[f"blocks.{i}.self_attn.to_qkv.{kind}"] = torch.cat([state[part] for part in parts])
            for part in () if beside else parts:
                del content[part]
    save_file(prefixed(content), tmp_path / "krea.safetensors")
    assert_holds(load_causal_wan(tmp_path / "krea.safetensors", FAMILY), state)


# Files that are no model


def test_code_in_a_pt_file_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"generator": weights(), "extra": Evil()}, tmp_path / "file.pt")
    message = refused(tmp_path / "file.pt")
    assert re.search(r"refused: it holds the object (posix|nt)\.system, and reading that could run code", message)
    assert not (tmp_path / "ran").exists()


def test_a_pickled_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(3, 3), tmp_path / "file.pt")
    assert "torch.nn.modules.linear.Linear" in refused(tmp_path / "file.pt")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_files_are_named_as_such(tmp_path, suffix, share):
    path = tmp_path / f"file{suffix}"
    save_file(weights(), path) if suffix == ".safetensors" else torch.save(weights(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    message = refused(path)
    assert "truncated" in message or "no zip-format torch file" in message
    assert f"It has {int(share * len(data))} bytes" in message


def test_a_file_of_the_old_torch_format_is_refused(tmp_path):
    torch.save(weights(), tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    assert "no zip-format torch file" in refused(tmp_path / "file.pt")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            {"critic": {"a": torch.ones(1)}, "step": 3},
            r"no state dict under any of .*; .* critic \(dict\), step \(int\)",
        ),
        ({"generator": {"a": 3}}, "no state dict under any of"),
        ([1, 2], "holds a list"),
    ],
)
def test_a_pt_without_a_state_dict_says_what_it_holds(tmp_path, content, reason):
    torch.save(content, tmp_path / "file.pt")
    assert re.search(reason, refused(tmp_path / "file.pt"))


def test_missing_files_and_unknown_kinds_are_refused(tmp_path):
    assert "does not exist" in refused(tmp_path / "none.pt")
    (tmp_path / "file.gguf").write_text("")
    assert "unknown kind of file" in refused(tmp_path / "file.gguf")


def test_two_models_in_one_state_dict_are_refused(tmp_path):
    state = weights()
    torch.save({"generator": prefixed(state) | state}, tmp_path / "file.pt")
    assert "two tensors mean" in refused(tmp_path / "file.pt")


# Files of another model


def test_every_missing_and_unexpected_tensor_is_listed(tmp_path):
    state = weights()
    for i in (0, 2):
        del state[f"blocks.{i}.ffn.0.weight"]
    del state["head.head.bias"]
    state["img_emb.proj.weight"] = torch.ones(2)
    save_file(state, tmp_path / "file.safetensors")
    message = refused(tmp_path / "file.safetensors")
    assert "does not hold small: of 96 tensors 3 missing, 1 unexpected. " in message
    assert "missing: blocks.[0,2].ffn.0.weight, head.head.bias" in message
    assert "unexpected: img_emb.proj.weight" in message


def test_tensors_of_another_size_are_listed_with_both_shapes(tmp_path):
    config = dataclasses.replace(CONFIG, ffn_dim=48)
    save_file(weights(config=config), tmp_path / "file.safetensors")
    message = refused(tmp_path / "file.safetensors")
    assert "of another shape: blocks.[0-2].ffn.0.weight, blocks.[0-2].ffn.0.bias, blocks.[0-2].ffn.2.weight" in message
    assert "blocks.0.ffn.0.weight is [48, 24], expected [40, 24]" in message


def sparse_safetensors(path, config, dtype="BF16"):
    """A file of true size whose weights are holes: it takes no disk."""
    header, offset = {}, 0
    for name, shape in layout(config).items():
        size = 2 * shape.numel()
        header[f"model.{name}"] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return offset


@pytest.mark.parametrize("name", ["self-forcing", "krea-14b"])
def test_a_file_of_true_size_loads_without_its_weights_in_memory(tmp_path, name):
    size = sparse_safetensors(tmp_path / "file.safetensors", FAMILIES[name].config)
    before = resident_bytes()
    model = load_causal_wan(tmp_path / "file.safetensors", FAMILIES[name])
    assert sum(p.numel() for p in model.parameters()) * 2 == size > 2.8e9
    assert resident_bytes() - before < 200e6


@pytest.mark.parametrize(("held", "asked"), [("krea-14b", "self-forcing"), ("causal-forcing", "krea-14b")])
def test_the_closest_family_is_named(tmp_path, held, asked):
    sparse_safetensors(tmp_path / "file.safetensors", FAMILIES[held].config)
    count = len(layout(FAMILIES[held].config))
    message = refused(tmp_path / "file.safetensors", FAMILIES[asked])
    assert re.search(rf"The closest family is .*{held}.*: {count} of its {count} tensors fit", message)


def test_a_file_of_a_size_nobody_published_is_sent_to_causal_wan(tmp_path):
    save_file({"blocks.0.ffn.0.weight": torch.ones(3, 3)}, tmp_path / "file.safetensors")
    assert "read as causal-wan, with --set num_heads=N or a config.json" in refused(tmp_path / "file.safetensors")


def test_a_part_of_a_file_with_the_names_of_diffusers_is_listed_by_wans_own(tmp_path):
    save_file({"blocks.0.attn1.to_q.weight": torch.ones(24, 24)}, tmp_path / "file.safetensors")
    message = refused(tmp_path / "file.safetensors")
    assert "missing: " in message and "unexpected" not in message and "attn1" not in message


def test_a_quantized_file_is_refused(tmp_path):
    state = weights()
    state["blocks.1.ffn.0.weight"] = torch.ones(40, 24).to(torch.float8_e4m3fn)
    state["blocks.1.ffn.0.weight_scale"] = torch.ones(40, 1)
    save_file(state, tmp_path / "file.safetensors")
    assert re.search(r"blocks\.\[1\]\.ffn\.0\.weight is F8_E4M3.*already", refused(tmp_path / "file.safetensors"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_reading_maps_the_file_instead_of_copying_it(tmp_path, suffix):
    path, state = tmp_path / f"file{suffix}", {"a": torch.ones(16 << 20)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    del state
    before = resident_bytes()
    tensors = read_tensors(path)
    assert tensors["a"].numel() == 16 << 20
    assert resident_bytes() - before < 16e6


def test_pieces_of_a_file_hold_every_tensor_and_writes_stay_out_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_PIECE", 5000)
    state = weights() | {"none": torch.empty(0, 3), "one": torch.tensor(3.0), "flag": torch.tensor([True])}
    save_file(state, tmp_path / "file.safetensors")
    tensors = read_tensors(tmp_path / "file.safetensors")
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)
    data = (tmp_path / "file.safetensors").read_bytes()
    for tensor in tensors.values():
        tensor.zero_()
    assert (tmp_path / "file.safetensors").read_bytes() == data


def test_damaged_bytes_in_a_pt_file_never_give_another_error(tmp_path):
    torch.save({"generator": {"blocks.0.ffn.0.bias": torch.ones(40)}}, tmp_path / "file.pt")
    data = (tmp_path / "file.pt").read_bytes()
    outcomes = []
    for at in range(0, len(data), 7):
        (tmp_path / "file.pt").write_bytes(data[:at] + bytes([data[at] ^ 0x5A]) + data[at + 1 :])
        try:
            outcomes.append(len(read_tensors(tmp_path / "file.pt")))
        except CheckpointError:
            outcomes.append(0)
    assert 0 in outcomes and 1 in outcomes


# Low-rank updates

LAYERS = ("blocks.0.self_attn.q", "blocks.2.ffn.0", "blocks.1.cross_attn.o")
BASED = dataclasses.replace(FAMILY, lora=True)


def lora_pairs(state, rank=5):
    return {
        layer: (
            torch.randn(rank, state[f"{layer}.weight"].shape[1]),
            torch.randn(state[f"{layer}.weight"].shape[0], rank),
        )
        for layer in LAYERS
    }


def named(pairs, form):
    prefix, down, up = form
    return {
        f"{prefix}{layer}.{name}.weight": t
        for layer, pair in pairs.items()
        for name, t in ((down, pair[0]), (up, pair[1]))
    }


FORMS = [
    ("base_model.model.", "lora_A", "lora_B"),
    ("base_model.model.", "lora_A.default", "lora_B.default"),
    ("base_model.model.model.", "lora_A", "lora_B"),
    ("diffusion_model.", "lora_down", "lora_up"),
    ("", "lora_A", "lora_B"),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form[0]}{form[1]}")
@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (10.0, 2.0), (0.0, 0.0)])
def test_a_merged_lora_is_the_weight_plus_scale_times_up_times_down(tmp_path, form, alpha, scale):
    state = weights()
    pairs = lora_pairs(state)
    torch.save({"generator": prefixed(state)}, tmp_path / "base.pt")
    torch.save({"generator_lora": named(pairs, form)}, tmp_path / "lora.pt")
    model = load_causal_wan(tmp_path / "base.pt", BASED, lora=tmp_path / "lora.pt", lora_alpha=alpha)
    for layer, (down, up) in pairs.items():
        state[f"{layer}.weight"] = state[f"{layer}.weight"] + scale * (up @ down)
    assert_holds(model, state)


def test_merging_computes_in_float32_and_rounds_once():
    weight, down, up = torch.randn(7, 9).bfloat16(), torch.randn(3, 9).bfloat16(), torch.randn(7, 3).bfloat16()
    exact = weight.float() + 0.5 * (up.float() @ down.float())
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(Update(down, up, 0.5).merged(weight, dtype), exact.to(dtype))


def test_alphas_come_from_the_file_or_from_the_adapter_configuration(tmp_path):
    pairs = lora_pairs(weights())
    content = named(pairs, FORMS[-1]) | {f"{LAYERS[0]}.alpha": torch.tensor(15.0)}
    save_file(content, tmp_path / "lora.safetensors")
    assert [read_lora(tmp_path / "lora.safetensors")[layer].scale for layer in LAYERS] == [3.0, 1.0, 1.0]
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 10, "r": 5}')
    assert [read_lora(tmp_path / "lora.safetensors")[layer].scale for layer in LAYERS] == [3.0, 2.0, 2.0]
    assert [read_lora(tmp_path / "lora.safetensors", 20)[layer].scale for layer in LAYERS] == [4.0, 4.0, 4.0]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_lora_and_another_dtype_are_applied_piece_by_piece(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(loading, "_PIECE", 3000)
    state = weights()
    pairs = lora_pairs(state)
    path = tmp_path / f"base{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    torch.save(named(pairs, FORMS[0]), tmp_path / "lora.pt")
    for layer, (down, up) in pairs.items():
        state[f"{layer}.weight"] = state[f"{layer}.weight"] + up @ down
    for dtype in (torch.float32, torch.bfloat16):
        model = load_causal_wan(path, BASED, lora=tmp_path / "lora.pt", dtype=dtype)
        assert_holds(model, {name: tensor.to(dtype) for name, tensor in state.items()})


PEAK = """
import resource, sys, torch
from fxq.models import loading
from fxq.models.families import Family
from fxq.models.causal_wan import CausalWanConfig
loading._PIECE = 16 << 20
config = CausalWanConfig(dim=1024, ffn_dim=8192, num_heads=8, num_layers=2, text_dim=64, freq_dim=64)
family = Family(name="small", source="a test", config=config)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = loading.load_causal_wan(sys.argv[1], family, dtype=torch.bfloat16)
size = sum(p.nbytes for p in model.parameters())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / size)
"""


@pytest.mark.sweep
def test_a_change_of_dtype_needs_little_more_memory_than_its_result(tmp_path):
    config = CausalWanConfig(dim=1024, ffn_dim=8192, num_heads=8, num_layers=2, text_dim=64, freq_dim=64)
    torch.save({"generator_ema": weights(config=config)}, tmp_path / "file.pt")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "file.pt")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.6, "the file alone is twice the size of the model"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop(f"{LAYERS[0]}.lora_B.weight"), r"half of a pair is missing for .*self_attn\.q \(only down\)"),
        (lambda t: t.update({"head.bias": torch.ones(1)}), r"1 other tensors: head\.bias"),
        (lambda t: t.clear() or t.update(a=torch.ones(1)), "0 updates"),
        (
            lambda t: t.update(named({"blocks.9.ffn.0": (torch.ones(5, 24), torch.ones(40, 5))}, FORMS[-1])),
            r"does not have: blocks\.\[9\]\.ffn\.0",
        ),
        (
            lambda t: t.update({f"{LAYERS[0]}.lora_A.weight": torch.ones(5, 25)}),
            r"self_attn\.q as \[24, 25\].* is \[24, 24\].*another size",
        ),
        (lambda t: t.update({f"{LAYERS[0]}.lora_A.weight": torch.ones(4, 24)}), r"down \[4, 24\] and up \[24, 5\]"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_by_layer(tmp_path, change, reason):
    state = weights()
    content = named(lora_pairs(state), FORMS[-1])
    change(content)
    torch.save(state, tmp_path / "base.pt")
    torch.save(content, tmp_path / "lora.pt")
    assert re.search(reason, refused(tmp_path / "base.pt", lora=tmp_path / "lora.pt"))


def test_a_base_that_needs_its_lora_is_refused_without_it(tmp_path):
    torch.save(weights(), tmp_path / "base.pt")
    assert "a base and a LoRA" in refused(tmp_path / "base.pt", BASED)


# Families


def test_families_sample_as_published():
    chunk_wise = FAMILIES["self-forcing"].sampler.timesteps(False)
    assert chunk_wise == pytest.approx((1000, 937.5, 833.333, 625), abs=1e-2)
    two, one = FAMILIES["causal-forcing-2step"].sampler, FAMILIES["causal-forcing-1step"].sampler
    assert two.timesteps(True) == one.timesteps(True) == chunk_wise
    assert (len(two.timesteps(False)), len(one.timesteps(False))) == (2, 1)
    assert FAMILIES["causal-forcing-framewise"].sampler.frames_per_chunk == 1
    assert (FAMILIES["longlive"].sampler.cache.window, FAMILIES["longlive"].sampler.cache.sink) == (12, 3)
    assert all(family.frames % family.sampler.frames_per_chunk == 0 for family in FAMILIES.values())


def test_layouts_are_the_published_ones():
    small, large = layout(FAMILIES["self-forcing"].config), layout(FAMILIES["krea-14b"].config)
    assert (len(small), len(large)) == (825, 1095)
    assert small["blocks.29.ffn.2.weight"] == (1536, 8960)
    assert sum(shape.numel() for shape in small.values()) == pytest.approx(1.419e9, rel=1e-3)
    assert sum(shape.numel() for shape in large.values()) == pytest.approx(14.29e9, rel=1e-3)


OFFICIAL_CONFIG = {
    "_class_name": "CausalWanModel", "_diffusers_version": "0.30.0", "dim": 24, "eps": 1e-6, "ffn_dim": 40,
    "freq_dim": 16, "in_dim": 4, "model_type": "t2v", "num_heads": 2, "num_layers": 3, "out_dim": 4, "text_len": 5,
    "text_dim": 20, "local_attn_size": 6, "sink_size": 1, "num_frame_per_block": 3,
    "denoising_step_list": [1000, 500], "timestep_shift": 8.0,
}  # fmt: skip


def test_a_config_file_gives_sizes_and_loop(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL_CONFIG))
    settings = read_settings(tmp_path / "weights.safetensors")
    assert settings == read_settings(tmp_path) == read_settings(tmp_path / "config.json")
    family = with_settings(FAMILIES["causal-wan"], settings)
    assert family.config == CONFIG
    assert (family.sampler.cache.window, family.sampler.cache.sink, family.sampler.steps) == (6, 1, (1000, 500))
    assert family.sampler.schedule.shift == 8.0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"dim": 25}, "must split into 12 heads"),
        ({"dim": "wide"}, "setting dim is 'wide', expected a whole number"),
        ({"num_layers": 10**9}, "setting num_layers is 1000000000, expected a whole number, 1000 at most"),
        ({"ffn_dim": 10**9}, "setting ffn_dim is 1000000000, expected a whole number, 1048576 at most"),
        ({"hidden": 3}, "unknown settings hidden; known are .*dim, .*sink_size"),
        ({"model_type": "i2v"}, "model_type 'i2v'"),
        ({"num_heads": 0}, "do not fit"),
        ({"local_attn_size": 2}, "window of 2 frames"),
        ({"denoising_step_list": 4}, "do not fit"),
        ({"timestep_shift": "big"}, "do not fit"),
    ],
)
def test_impossible_settings_are_refused(settings, reason):
    with pytest.raises(CheckpointError, match=reason):
        with_settings(FAMILIES["causal-wan"], settings)


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "no readable JSON"), ("{", "no readable JSON"), ("[]", "a list")]
)
def test_a_config_file_that_is_none_is_refused(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=reason):
        read_settings(tmp_path)


def test_lists_of_names_are_short():
    names = [f"blocks.{i}.ffn.0.weight" for i in (0, 1, 2, 5, 7, 8)] + ["head.head.bias"]
    assert compact(names) == "blocks.[0-2,5,7-8].ffn.0.weight, head.head.bias"
    assert compact([f"x{i}" for i in range(43)]).endswith("x39 and 3 more")
