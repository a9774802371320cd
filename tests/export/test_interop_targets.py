"""Names, dtypes, shapes and metadata of each target, as its convention is written."""

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file

import fxq
from fxq.export.interop import Options, export_bundle
from fxq.export.interop.layers import read_model, sqnr
from fxq.export.interop.rotation import quantize_rotated, rotate, rotation_size
from fxq.export.receipt import HEADER_KEY
from tests.export.interop_toys import WAN_CONFIG, forms, make_bundle, original_weights, read_json
from tests.toys import recipe, rows, wan_rollout

BLOCK = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v")
BLOCK = {**{f"blocks.0.{name}": (64, 64) for name in (*BLOCK, "cross_attn.o")}, "blocks.0.ffn.0": (96, 64)}
BLOCK["blocks.0.ffn.2"] = (64, 96)
TEXT = {"text_embedding.0": (64, 32), "text_embedding.2": (64, 64)}
DIFFUSERS_BLOCK = {
    **{f"blocks.0.attn{i}.{part}": (64, 64) for i in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")},
    "blocks.0.ffn.net.0.proj": (96, 64),
    "blocks.0.ffn.net.2": (64, 96),
    "condition_embedder.text_embedder.linear_1": (64, 32),
    "condition_embedder.text_embedder.linear_2": (64, 64),
}
DIFFUSERS_FLOAT = {
    "blocks.0.attn1.norm_k.weight": (64,),
    "blocks.0.attn1.norm_q.weight": (64,),
    "blocks.0.attn2.norm_k.weight": (64,),
    "blocks.0.attn2.norm_q.weight": (64,),
    "blocks.0.norm2.bias": (64,),
    "blocks.0.norm2.weight": (64,),
    "blocks.0.scale_shift_table": (1, 6, 64),
    "condition_embedder.time_embedder.linear_1.bias": (64,),
    "condition_embedder.time_embedder.linear_1.weight": (64, 16),
    "condition_embedder.time_embedder.linear_2.bias": (64,),
    "condition_embedder.time_embedder.linear_2.weight": (64, 64),
    "condition_embedder.time_proj.bias": (384,),
    "condition_embedder.time_proj.weight": (384, 64),
    "patch_embedding.bias": (64,),
    "patch_embedding.weight": (64, 3, 1, 2, 2),
    "proj_out.bias": (12,),
    "proj_out.weight": (12, 64),
    "scale_shift_table": (1, 2, 64),
}
DIFFUSERS_KEPT = [
    "condition_embedder.time_embedder.linear_1",
    "condition_embedder.time_embedder.linear_2",
    "condition_embedder.time_proj",
    "proj_out",
]
EMBEDDER = [f"condition_embedder.text_embedder.linear_{number}" for number in (1, 2)]
LEAVES = ("weight", "bias")
ORIGINAL_FLOAT = {
    "blocks.0.cross_attn.norm_k.weight": (64,),
    "blocks.0.cross_attn.norm_q.weight": (64,),
    "blocks.0.modulation": (1, 6, 64),
    "blocks.0.norm3.bias": (64,),
    "blocks.0.norm3.weight": (64,),
    "blocks.0.self_attn.norm_k.weight": (64,),
    "blocks.0.self_attn.norm_q.weight": (64,),
    "head.head.bias": (12,),
    "head.head.weight": (12, 64),
    "head.modulation": (1, 2, 64),
    "patch_embedding.bias": (64,),
    "patch_embedding.weight": (64, 3, 1, 2, 2),
    "time_embedding.0.bias": (64,),
    "time_embedding.0.weight": (64, 16),
    "time_embedding.2.bias": (64,),
    "time_embedding.2.weight": (64, 64),
    "time_projection.1.bias": (384,),
    "time_projection.1.weight": (384, 64),
}


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("b") / "wan8", 8)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("b") / "wan4", 4)


def floats(shapes, dtype="float32"):
    return {name: (dtype, shape) for name, shape in shapes.items()}


def int8(shapes, scale="float32"):
    found = {f"{name}.weight": ("int8", shape) for name, shape in shapes.items()}
    found |= {f"{name}.weight_scale": (scale, (shape[0], 1)) for name, shape in shapes.items()}
    return found | {f"{name}.bias": ("float32", (shape[0],)) for name, shape in shapes.items()}


def export(bundle, target, tmp_path, **options):
    report = export_bundle(bundle, target, tmp_path / "out", Options(**options))
    (file,) = (tmp_path / "out").glob("*.safetensors")
    found, metadata = forms(file)
    metadata.pop(HEADER_KEY)
    return report, file, found, metadata


def test_lightx2v(eight, tmp_path):
    report, file, found, metadata = export(eight, "lightx2v", tmp_path)
    text = {f"{name}.{leaf}": s for name, shape in TEXT.items() for leaf, s in (("weight", shape), ("bias", shape[:1]))}
    assert file.name == "model.safetensors" and metadata == {"format": "pt"}
    assert found == {f"model.{name}": form for name, form in (int8(BLOCK) | floats(ORIGINAL_FLOAT | text)).items()}
    assert read_json(tmp_path / "out" / "lightx2v.json") == {
        "dit_quantized": True,
        "dit_quant_scheme": "int8-vllm",
        "dit_quantized_ckpt": "model.safetensors",
    }
    notes = {r.layer: (r.form, r.note) for r in report.layers if r.layer in TEXT}
    assert notes == {name: ("float", "the runtime keeps it in floating point") for name in TEXT}


def test_lightx2v_rounds_linears_of_a_block_that_the_recipe_kept(tmp_path):
    rollout = wan_rollout(seeds=(1,), frames=2)
    chosen = recipe(8)
    rule = dataclasses.replace(chosen.rules[0], pattern="*ffn.2", reason="a test keeps it", optional=False)
    chosen = dataclasses.replace(chosen, rules=(rule, *chosen.rules))
    path = fxq.save(fxq.quantize(rollout.denoiser, rollout, chosen, progress=False), tmp_path / "b")
    report, file, found, _ = export(path, "lightx2v", tmp_path)
    record = next(r for r in report.layers if r.layer == "blocks.0.ffn.2")
    assert (
        record.form == "int8" and record.note.startswith("kept by the recipe; rounded") and record.weight_sqnr_db > 35
    )
    assert found["model.blocks.0.ffn.2.weight"] == ("int8", (64, 96))
    tensors = load_file(file)
    got = tensors["model.blocks.0.ffn.2.weight"].float() * tensors["model.blocks.0.ffn.2.weight_scale"]
    assert sqnr(rollout.denoiser.blocks[0].ffn[2].weight, got) == record.weight_sqnr_db


def test_vllm_omni(eight, tmp_path):
    _, file, found, metadata = export(eight, "vllm-omni", tmp_path, base_config=WAN_CONFIG)
    assert file.name == "diffusion_pytorch_model.safetensors" and metadata == {"format": "pt"}
    blocks = {name: shape for name, shape in DIFFUSERS_BLOCK.items() if name.startswith("blocks.")}
    text = {f"{name}.{leaf}": DIFFUSERS_BLOCK[name][: 2 - i] for name in EMBEDDER for i, leaf in enumerate(LEAVES)}
    assert found == int8(blocks) | floats(DIFFUSERS_FLOAT | text)
    assert read_json(tmp_path / "out" / "config.json") == {
        **WAN_CONFIG,
        "quantization_config": {
            "quant_method": "int8",
            "is_checkpoint_int8_serialized": True,
            "activation_scheme": "dynamic",
            "ignored_layers": [*DIFFUSERS_KEPT, *EMBEDDER],
        },
    }


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_compressed_tensors(eight, tmp_path, dtype):
    report, file, found, metadata = export(eight, "compressed-tensors", tmp_path, float_dtype=dtype)
    name = "float32" if dtype is None else "bfloat16"
    want = int8(DIFFUSERS_BLOCK, name) | floats(DIFFUSERS_FLOAT)
    assert file.name == "model.safetensors" and metadata == {"format": "pt"}
    assert found == {k: (name if d == "float32" else d, s) for k, (d, s) in want.items()}
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"] == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "token",
                    "dynamic": True,
                },
                "output_activations": None,
            }
        },
        "ignore": DIFFUSERS_KEPT,
        "kv_cache_scheme": None,
    }
    costs = {r.layer: r.weight_sqnr_db for r in report.layers if r.form == "int8"}
    assert (costs["blocks.0.ffn.0"] is None) == (dtype is None), "a scale in bfloat16 costs something"
    assert any("merge it into the model's own" in note for note in report.notes)


def test_diffusers_torchao(eight, tmp_path):
    _, file, found, metadata = export(eight, "diffusers-torchao", tmp_path)
    want = floats(DIFFUSERS_FLOAT)
    for name, shape in DIFFUSERS_BLOCK.items():
        want[f"{name}._weight_qdata"] = ("int8", shape)
        want[f"{name}._weight_scale"] = ("float32", (shape[0], 1))
        want[f"{name}._weight_zero_point"] = ("int8", (shape[0], 1))
        want[f"{name}.bias"] = ("float32", shape[:1])
    assert file.name == "diffusion_pytorch_model.safetensors" and found == want
    names = json.loads(metadata["tensor_names"])
    assert names == sorted([*DIFFUSERS_FLOAT, *(f"{n}.{leaf}" for n in DIFFUSERS_BLOCK for leaf in ("weight", "bias"))])
    assert set(metadata) == {"format", "tensor_names", *names}
    assert json.loads(metadata["blocks.0.attn1.to_q.bias"]) == {"_type": "Tensor"}
    entry = json.loads(metadata["blocks.0.ffn.net.2.weight"])
    assert entry["_type"] == "Int8Tensor" and entry["_tensor_data_names"] == ["zero_point", "qdata", "scale"]
    assert entry["_data"]["block_size"] == [1, 96] and entry["_data"]["dtype"]["_data"] == "float32"
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert config["quant_method"] == "torchao" and config["modules_to_not_convert"] == DIFFUSERS_KEPT
    assert config["quant_type"]["default"]["_type"] == "Int8DynamicActivationInt8WeightConfig"


def test_comfy_with_eight_bits(eight, tmp_path):
    _, file, found, metadata = export(eight, "comfy", tmp_path)
    layers = BLOCK | TEXT
    marker = b'{"format": "int8_tensorwise"}'
    want = int8(layers) | floats(ORIGINAL_FLOAT)
    want |= {f"{name}.comfy_quant": ("uint8", (len(marker),)) for name in layers}
    assert found == want
    assert json.loads(metadata["_quantization_metadata"]) == {
        "format_version": "1.0",
        "layers": {name: {"format": "int8_tensorwise"} for name in layers},
    }
    assert json.loads(metadata["config"]) == {"transformer": {"causal_ar": True}}
    assert bytes(load_file(file)["blocks.0.ffn.0.comfy_quant"].tolist()) == marker


def test_comfy_with_four_bits_is_rotated(four, tmp_path):
    report, file, found, metadata = export(four, "comfy", tmp_path, original=original_weights())
    want = floats(ORIGINAL_FLOAT)
    markers = {}
    for name, (outputs, width) in (BLOCK | TEXT).items():
        size = {64: 64, 32: 16, 96: 16}[width]
        markers[name] = {"format": "asym_w4a8_int8", "group_size": 16, "convrot": True, "convrot_groupsize": size}
        want[f"{name}.weight"] = ("int8", (outputs, width // 2))
        want[f"{name}.weight_s_rel"] = ("float8_e4m3fn", (outputs, width // 16))
        want[f"{name}.weight_s_channel"] = ("float32", (outputs,))
        want[f"{name}.weight_codebook"] = ("float32", (16,))
        want[f"{name}.bias"] = ("float32", (outputs,))
        want[f"{name}.comfy_quant"] = ("uint8", (len(json.dumps(markers[name])),))
    assert found == want
    assert json.loads(metadata["_quantization_metadata"]) == {"format_version": "1.0", "layers": markers}
    tensors, layers, original = load_file(file), read_model(four).layers, original_weights()
    for record in report.layers:
        if record.form == "int4 rotated":
            assert 20 < record.original_sqnr_db < 30 and re.search("rotation of (64|16) channels", record.note)
            marker = json.loads(bytes(tensors[f"{record.name}.comfy_quant"].tolist()))
            got = decode(tensors, record.name, marker["convrot_groupsize"])
            assert sqnr(layers[record.layer].weight(), got) == pytest.approx(record.weight_sqnr_db, abs=0.02)
            want = original[f"{record.layer}.weight"]
            assert sqnr(want, got) == pytest.approx(record.original_sqnr_db, abs=0.02)
            twice = quantize_rotated(layers[record.layer].weight(), marker["convrot_groupsize"]).weight()
            assert sqnr(want, got) > sqnr(want, twice) + 1, "rounding the bundle's integers again is worse"


def decode(tensors, name, rotation):
    """A packed weight read as the convention says, written apart from the code that writes it."""
    bytes_ = tensors[f"{name}.weight"].view(torch.uint8).int()
    codes = torch.stack((bytes_ % 16, bytes_ // 16), dim=2).flatten(1)
    scale = tensors[f"{name}.weight_s_rel"].float().repeat_interleave(16, dim=1)
    levels = (tensors[f"{name}.weight_codebook"][codes] * scale).round().clamp(-127, 127)
    h4 = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    h = h4
    while len(h) < rotation:
        h = torch.kron(h, h4)
    rotated = levels * tensors[f"{name}.weight_s_channel"][:, None]
    return torch.cat([part @ h for part in rotated.split(rotation, dim=1)], dim=1)


def test_comfy_stores_four_bits_in_a_byte_where_no_rotation_fits(tmp_path, monkeypatch, four):
    monkeypatch.setattr("fxq.export.interop.comfy.rotation_size", lambda width: None)
    report, _, found, _ = export(four, "comfy", tmp_path, original=original_weights())
    assert found["blocks.0.ffn.0.weight"] == ("int8", (96, 64))
    assert all("int4 in a byte" in r.note for r in report.layers if r.form == "int8")


@pytest.mark.parametrize(("width", "size"), [(1536, 256), (8960, 256), (192, 64), (96, 16), (40, None), (16, 16)])
def test_the_rotation_is_the_largest_that_divides_the_width(width, size):
    assert rotation_size(width) == size


@pytest.mark.parametrize("size", [16, 64, 256])
def test_a_rotation_undoes_itself_and_keeps_lengths(size):
    weight = rows(3, 512)
    turned = rotate(weight, size)
    assert torch.allclose(rotate(turned, size), weight, atol=1e-5)
    assert torch.allclose(turned.norm(dim=1), weight.norm(dim=1))
    assert not torch.allclose(turned, weight, atol=0.1)


def test_rotated_rounding_beats_plain_rounding_where_one_channel_stands_out():
    weight = rows(70, 256)
    weight[:, 7] *= 30
    found = quantize_rotated(weight, 256)
    scale = weight.abs().amax(dim=1, keepdim=True) / 7
    plain = (weight / scale).round().clamp(-8, 7) * scale
    assert sqnr(weight, found.weight()) > sqnr(weight, plain) + 3
    assert found.codes.max() <= 15 and bool((found.codebook.diff() >= 0).all())


@pytest.mark.parametrize("weight", [torch.zeros(2, 16), torch.full((3, 32), 0.5)])
def test_constant_weights_survive_the_rotation(weight):
    found = quantize_rotated(weight, 16)
    assert bool(found.weight().isfinite().all()) and torch.allclose(found.weight(), weight, atol=0.02)
