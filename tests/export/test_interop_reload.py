"""Each export read by the library it is for, in a fresh process without fxq; skipped where that is not installed."""

import json

import pytest
import torch
from safetensors.torch import save_file

import fxq
from fxq.export.interop import Options, export_bundle
from fxq.export.interop.names import DIFFUSERS, ORIGINAL
from fxq.models.causal_wan import rope_tables
from tests.export.interop_toys import (
    CLOSE,
    COMPRESSED,
    WAN_CONFIG,
    expected_weights,
    make_bundle,
    needs,
    original_weights,
    run_apart,
)

pytestmark = pytest.mark.slow

TORCHAO = (
    CLOSE
    + """
from diffusers import WanTransformer3DModel
from torchao.quantization import Int8Tensor
folder, expected = sys.argv[1], load_file(sys.argv[2])
model, info = WanTransformer3DModel.from_pretrained(folder, output_loading_info=True, torch_dtype=torch.float32)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
state = model.state_dict()
assert set(state) == set(expected), set(state) ^ set(expected)
integers = [name for name, tensor in state.items() if isinstance(tensor, Int8Tensor)]
for name, tensor in state.items():
    close(expected[name], tensor.dequantize() if name in integers else tensor)
call = load_file(sys.argv[3])
with torch.no_grad():
    out = model(call["x"], torch.tensor([500]), call["text"], return_dict=False)[0]
close(call["out"], out, 10 ** (-30 / 20))
x = torch.randn(7, 64)
layer = model.blocks[0].attn1.to_q
with torch.no_grad():
    close(torch.nn.functional.linear(x, expected["blocks.0.attn1.to_q.weight"], layer.bias), layer(x))
print(json.dumps(integers))
"""
)

TORCHAO_WRITER = """
import json, sys, torch
from safetensors import safe_open
from torch import nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from torchao.core.config import config_to_dict
model = nn.ModuleDict({"ffn": nn.Linear(64, 96)})
quantize_(model["ffn"], Int8DynamicActivationInt8WeightConfig(version=2))
state = {k: v.data if k.endswith("bias") else v for k, v in model.state_dict().items()}
tensors, metadata = flatten_tensor_state_dict(state)
with safe_open(sys.argv[1], "pt") as file:
    ours = file.metadata()
    for suffix in ("_weight_qdata", "_weight_scale", "_weight_zero_point"):
        mine, theirs = file.get_tensor("blocks.0.ffn.net.0.proj." + suffix), tensors["ffn." + suffix]
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), suffix
assert json.loads(ours["blocks.0.ffn.net.0.proj.weight"]) == json.loads(metadata["ffn.weight"])
assert json.loads(ours["blocks.0.ffn.net.0.proj.bias"]) == json.loads(metadata["ffn.bias"])
config = json.load(open(sys.argv[2]))["quantization_config"]["quant_type"]["default"]
theirs = config_to_dict(Int8DynamicActivationInt8WeightConfig(version=2))
assert config["_type"] == theirs["_type"] and config["_version"] == theirs["_version"]
assert set(config["_data"]) <= set(theirs["_data"])
assert all(theirs["_data"][key] == value for key, value in config["_data"].items()), theirs
"""

COMFY = (
    CLOSE
    + """
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class
from safetensors import safe_open
tensors, expected = load_file(sys.argv[1]), load_file(sys.argv[2])
most = float(sys.argv[3])
with safe_open(sys.argv[1], "pt") as file:
    layers = json.loads(file.metadata()["_quantization_metadata"])["layers"]
for name, marker in layers.items():
    assert json.loads(bytes(tensors[name + ".comfy_quant"].tolist())) == marker
    want = expected[name + ".weight"]
    common = {"orig_dtype": torch.float32, "orig_shape": tuple(want.shape)}
    if marker["format"] == "int8_tensorwise":
        layout = "TensorWiseINT8Layout"
        params = {key: value for key, value in marker.items() if key.startswith("convrot")}
        params["scale"] = tensors[name + ".weight_scale"]
    else:
        layout = "AsymW4A8Int8Layout"
        params = {
            "scale": tensors[name + ".weight_s_rel"],
            "s_channel": tensors[name + ".weight_s_channel"],
            "codebook": tensors[name + ".weight_codebook"],
            "group_size": marker["group_size"],
            "convrot_groupsize": marker["convrot_groupsize"],
        }
    params = get_layout_class(layout).Params(**common, **params)
    weight = QuantizedTensor(tensors[name + ".weight"], layout, params)
    close(want, weight.dequantize(), most)
    x = torch.randn(5, want.shape[1])
    close(torch.nn.functional.linear(x, want), torch.nn.functional.linear(x, weight), most + 0.02)
print(json.dumps(sorted(layers)))
"""
)


@pytest.fixture(scope="module", params=[8, 4])
def bundle(request, tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("b") / f"wan{request.param}", request.param)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("b") / "wan", 8)


def first_chunk(bundle, path):
    """A call that both the causal model and the one of diffusers take, and what the bundle makes of it."""
    torch.manual_seed(3)
    x, text, none = torch.randn(1, 3, 2, 4, 6), torch.randn(1, 5, 32), [torch.zeros(1, 0, 2, 32)]
    cos, sin = rope_tables(32, 2, 2, 3, 0)
    frames = x.transpose(1, 2).contiguous()
    out = fxq.load(bundle)(frames, torch.full((1, 2), 500.0), text, none, none, none, none, cos, sin)[0]
    save_file({"x": x, "text": text, "out": out.detach().transpose(1, 2).contiguous()}, path)
    return path


def test_diffusers_builds_the_model_from_the_torchao_export_and_computes_what_the_bundle_does(eight, tmp_path):
    needs("diffusers", "torchao", "accelerate")
    export_bundle(eight, "diffusers-torchao", tmp_path / "out", Options(base_config=WAN_CONFIG))
    expected = expected_weights(eight, DIFFUSERS, tmp_path / "expected.safetensors")
    arguments = tmp_path / "expected.safetensors", first_chunk(eight, tmp_path / "call.safetensors")
    out = run_apart(tmp_path, TORCHAO, tmp_path / "out", *arguments)
    quantized = json.loads(out.splitlines()[-1])
    assert len(quantized) == 12 and set(quantized) <= set(expected)


def test_the_torchao_export_is_what_torchao_writes(eight, tmp_path):
    needs("torchao")
    export_bundle(eight, "diffusers-torchao", tmp_path / "out")
    files = tmp_path / "out" / "diffusion_pytorch_model.safetensors", tmp_path / "out" / "config.json"
    run_apart(tmp_path, TORCHAO_WRITER, *files)


def test_compressed_tensors_decompresses_the_export(eight, tmp_path):
    needs("compressed_tensors")
    export_bundle(eight, "compressed-tensors", tmp_path / "out")
    expected_weights(eight, DIFFUSERS, tmp_path / "expected.safetensors")
    arguments = tmp_path / "out", tmp_path / "expected.safetensors", 0.02
    out = run_apart(tmp_path, COMPRESSED, *arguments)
    assert len(json.loads(out.splitlines()[-1])) == 16


@pytest.mark.parametrize("original", [True, pytest.param(False, marks=pytest.mark.sweep)])
def test_comfy_kitchen_reads_and_multiplies_the_export(bundle, original, tmp_path):
    needs("comfy_kitchen")
    given = original_weights() if original else None
    report = export_bundle(bundle, "comfy", tmp_path / "out", Options(original=given, widen=not original))
    expected_weights(bundle, ORIGINAL, tmp_path / "expected.safetensors")
    four = any(record.form == "int4 rotated" for record in report.layers)
    arguments = tmp_path / "out" / "model.safetensors", tmp_path / "expected.safetensors", 0.15 if four else 0.02
    out = run_apart(tmp_path, COMFY, *arguments)
    assert len(json.loads(out.splitlines()[-1])) == 12
