"""FP8 bundles in the formats of other runtimes: what is written, and what it is to them where they are installed."""

import dataclasses
import functools
import json

import pytest
import torch

import fxq
from fxq.core.method import FLOAT8
from fxq.export.interop import FLOAT8 as TARGETS
from fxq.export.interop import InteropError, Options, _activations, _notes, export_bundle, find_target
from fxq.export.interop.layers import (
    PER_TENSOR,
    read_model,
    refuse_mixed,
    round_to_float8,
    sqnr,
    to_float8_tensor,
    to_single,
)
from fxq.export.interop.names import DIFFUSERS, ORIGINAL
from fxq.export.interop.original import with_originals
from fxq.export.interop.vllm_omni import _static
from fxq.kernels import float8
from tests.export.interop_toys import CLOSE, COMPRESSED, expected_weights, needs, original_weights, run_apart
from tests.toys import recipe, wan_rollout

E4M3 = "float8_e4m3fn"


def make(path, **scheme):
    rollout = wan_rollout(seeds=(1,), frames=2)
    chosen = recipe(format=FLOAT8, **scheme)
    return fxq.save(fxq.quantize(rollout.denoiser, rollout, chosen, progress=False), path, fingerprint=False)


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    return make(tmp_path_factory.mktemp("b") / "static", dual_scale=False)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    return make(tmp_path_factory.mktemp("b") / "dynamic", dual_scale=False, per_token=True)


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    return make(tmp_path_factory.mktemp("b") / "dual")


read = functools.cache(read_model)


@dataclasses.dataclass
class Written:
    """What a target makes of a bundle, and what the report says of it."""

    tensors: dict
    metadata: dict
    documents: dict
    layers: list
    activations: str
    notes: tuple


def build(bundle, target, **options):
    model, chosen = read(bundle), Options(**options)
    output = find_target(target)(with_originals(model, chosen.original), chosen)
    ((tensors, metadata),) = output.tensors.values()
    told = _activations(model, output), _notes(model, chosen, output)
    return Written(tensors, metadata, output.documents, output.records, *told)


def quantized_layers(bundle, style):
    model = read(bundle)
    return {model.naming.rename(name, style): layer for name, layer in model.layers.items()}


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_compressed_tensors_holds_the_numbers_of_the_bundle(kind, request):
    bundle = request.getfixturevalue(kind)
    report = build(bundle, "compressed-tensors")
    tensors = report.tensors
    layers = quantized_layers(bundle, DIFFUSERS)
    assert all(record.weight_sqnr_db is None for record in report.layers)
    assert report.activations.endswith("as in the bundle")
    for name, layer in layers.items():
        values, scale = layer.single_scale()
        assert torch.equal(tensors[f"{name}.weight"].view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(tensors[f"{name}.weight_scale"], scale)
        given = tensors.get(f"{name}.input_scale")
        assert torch.equal(given, layer.input_scale) if kind == "static" else given is None
    config = report.documents["config.json"]["quantization_config"]
    assert config["format"] == "float-quantized"
    (group,) = config["config_groups"].values()
    assert group["weights"] == {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False,
    }  # fmt: skip
    inputs = {"static": {"strategy": "tensor", "dynamic": False}, "dynamic": {"strategy": "token", "dynamic": True}}
    assert group["input_activations"] == {"num_bits": 8, "type": "float", "symmetric": True, **inputs[kind]}


@pytest.mark.parametrize("original", [True, False])
def test_comfy_has_one_scale_per_tensor_and_says_what_that_costs(static, original):
    given = original_weights() if original else None
    report = build(static, "comfy", original=given)
    tensors = report.tensors
    layers = quantized_layers(static, ORIGINAL)
    markers = json.loads(report.metadata["_quantization_metadata"])["layers"]
    assert markers == {name: {"format": E4M3} for name in layers}
    for name, layer in layers.items():
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        assert weight.dtype == float8.E4M3 and scale.shape == () and scale.dtype == torch.float32
        assert torch.equal(tensors[f"{name}.input_scale"], layer.input_scale[0])
        want = given[f"{name}.weight"] if original else layer.weight()
        assert sqnr(want, weight.float() * scale) > 28
    noted = [PER_TENSOR in record.note for record in report.layers if record.form == "fp8"]
    assert all(noted) != original and any("rounded a second time" in note for note in report.notes) != original
    assert "static scale per tensor, as in the bundle" in report.activations


def test_comfy_without_a_static_scale_says_so(dynamic):
    report = build(dynamic, "comfy")
    assert (
        not any(name.endswith("input_scale") for name in report.tensors) and "no scale per token" in report.activations
    )


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_vllm_omni_has_one_scale_per_tensor_for_the_blocks(kind, request):
    bundle = request.getfixturevalue(kind)
    report = build(bundle, "vllm-omni")
    tensors, config = report.tensors, report.documents["config.json"]["quantization_config"]
    assert (config["quant_method"], config["activation_scheme"]) == ("fp8", kind)
    layers = {n: s for n, s in quantized_layers(bundle, DIFFUSERS).items() if n.startswith("blocks.")}
    assert len(layers) == 10
    for name, layer in layers.items():
        assert tensors[f"{name}.weight"].dtype == float8.E4M3 and tensors[f"{name}.weight_scale"].shape == ()
        assert (f"{name}.input_scale" in tensors) == (kind == "static")
        assert sqnr(layer.weight(), tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]) > 28
    text = "condition_embedder.text_embedder.linear_1.weight"
    assert tensors[text].dtype == torch.float32 and text.removesuffix(".weight") in config["ignored_layers"]


def test_lightx2v_has_a_scale_per_output_channel(dynamic):
    report = build(dynamic, "lightx2v")
    tensors = report.tensors
    assert report.documents["lightx2v.json"]["dit_quant_scheme"] == "fp8-vllm"
    name = "model.blocks.0.ffn.0"
    layer = quantized_layers(dynamic, ORIGINAL)["blocks.0.ffn.0"]
    assert torch.equal(tensors[f"{name}.weight"].view(torch.uint8), layer.integers.view(torch.uint8))
    assert tensors[f"{name}.weight_scale"].shape == (96, 1) and "float8 per token" in report.activations


def test_torchao_has_no_zero_point_and_scales_inputs_per_token(static):
    report = build(static, "diffusers-torchao")
    tensors = report.tensors
    name = "blocks.0.attn1.to_q"
    assert tensors[f"{name}._weight_qdata"].dtype == float8.E4M3 and f"{name}._weight_zero_point" not in tensors
    assert json.loads(report.metadata[f"{name}.weight"])["_type"] == "Float8Tensor"
    config = report.documents["config.json"]["quantization_config"]["quant_type"]["default"]
    assert config["_type"] == "Float8DynamicActivationFloat8WeightConfig"
    assert "static input scales and zero points of the bundle are not used" in report.activations


def test_targets_of_integers_refuse(static, tmp_path):
    assert set(TARGETS) == {"comfy", "compressed-tensors", "diffusers-torchao", "lightx2v", "vllm-omni"}
    with pytest.raises(InteropError, match=r"12 layers are FP8 .*, and the target sglang writes integers: take one of"):
        export_bundle(static, "sglang", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_formats_are_not_mixed_in_one_file(static, dynamic):
    model, other = read(static), read(dynamic)
    assert refuse_mixed(model, "x")
    (first, layer), *_ = model.layers.items()
    scheme = dataclasses.replace(layer.plan.quantization, format="int")
    changed = dataclasses.replace(layer, plan=dataclasses.replace(layer.plan, scheme=scheme))
    with pytest.raises(InteropError, match=r"has FP8 layers .* and layers of integers .* the target comfy"):
        refuse_mixed(dataclasses.replace(model, layers={**model.layers, first: changed}), "x")
    inside = next(name for name in model.layers if name.startswith("blocks."))
    mixed = dataclasses.replace(model, layers={**model.layers, inside: other.layers[inside]})
    with pytest.raises(InteropError, match=r"has a static input scale and .* has one per token"):
        _static(mixed)


def test_layers_of_two_scales_are_rounded_once_more_or_from_the_original(dual):
    layers = read(dual).layers
    two = next(layer for layer in layers.values() if len(layer.weight_scale) == 2)
    for make_one in (lambda layer: to_single(layer, "x", torch.float32), lambda layer: to_float8_tensor(layer, "x")):
        values, scale, record = make_one(two)
        assert values.dtype == float8.E4M3 and record.form == "fp8" and record.weight_sqnr_db > 25
        assert sqnr(two.weight(), values.float() * scale) == record.weight_sqnr_db


def test_rounding_takes_the_largest_value_of_each_channel():
    weight = torch.randn(5, 33) * torch.logspace(-4, 4, 5)[:, None]
    weight[2] = 0
    values, scale = round_to_float8(weight)
    assert values.dtype == float8.E4M3 and scale.shape == (5, 1) and scale[2] == 1
    assert (values.float().abs().amax(1) == 448).tolist() == [True, True, False, True, True]
    assert bool(((values.float() * scale - weight).abs() <= weight.abs() / 16 + scale * 2.0**-10).all())


COMFY = (
    CLOSE
    + """
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class
tensors, expected = load_file(sys.argv[1]), load_file(sys.argv[2])
names = [name.removesuffix(".comfy_quant") for name in tensors if name.endswith(".comfy_quant")]
for name in names:
    want, scale = expected[name + ".weight"], tensors[name + ".weight_scale"]
    params = get_layout_class("TensorCoreFP8Layout").Params(
        scale=scale, orig_dtype=torch.float32, orig_shape=tuple(want.shape)
    )
    weight = QuantizedTensor(tensors[name + ".weight"], "TensorCoreFP8Layout", params)
    close(want, weight.dequantize(), 0.04)
    x = torch.randn(5, want.shape[1])
    close(torch.nn.functional.linear(x, want), torch.nn.functional.linear(x, weight), 0.06)
print(json.dumps(names))
"""
)

TORCHAO = (
    CLOSE
    + """
from safetensors import safe_open
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
from torchao.quantization import Float8Tensor, PerRow
tensors, expected = load_file(sys.argv[1]), load_file(sys.argv[2])
with safe_open(sys.argv[1], "pt") as file:
    metadata = file.metadata()
tensors = {name: tensor for name, tensor in tensors.items() if "._weight_" in name}
quantized = [name for name, text in metadata.items() if "Float8Tensor" in text]
metadata["tensor_names"] = json.dumps(quantized)
state, rest = unflatten_tensor_state_dict(tensors, metadata)
assert not rest, rest
names = [name for name, tensor in state.items() if isinstance(tensor, Float8Tensor)]
for name in names:
    close(expected[name], state[name].dequantize(), 1e-5)
again, described = flatten_tensor_state_dict({name: state[name] for name in names})
for name in names:
    assert json.loads(described[name]) == json.loads(metadata[name]), name
print(json.dumps(names))
"""
)


@pytest.mark.parametrize(
    ("target", "library", "program", "style", "count"),
    [
        ("compressed-tensors", "compressed_tensors", COMPRESSED, DIFFUSERS, 16),
        ("comfy", "comfy_kitchen", COMFY, ORIGINAL, 12),
        ("diffusers-torchao", "torchao", TORCHAO, DIFFUSERS, 12),
    ],
)
def test_the_code_of_the_runtime_reads_it(target, library, program, style, count, static, tmp_path):
    needs(library)
    folder = tmp_path / target
    export_bundle(static, target, folder)
    (file,) = folder.glob("*.safetensors")
    expected_weights(static, style, tmp_path / "expected.safetensors")
    given = folder if target == "compressed-tensors" else file
    out = run_apart(tmp_path, program, given, tmp_path / "expected.safetensors", 1e-5)
    assert len(json.loads(out.splitlines()[-1])) == count
