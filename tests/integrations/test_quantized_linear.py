import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fxq
from fxq.integrations.swap import ApplyError, QuantizedLinear, apply
from tests.toys import recipe, relative_error, rows, toy

DATA = [rows(6, 96, seed=seed) for seed in range(2)]


def applied(bits=8, **scheme):
    model = toy(blocks=2)
    return apply(model, fxq.quantize(model, DATA, recipe(bits, **scheme), progress=False))


@pytest.fixture
def model():
    return applied()


def test_the_weight_has_the_dtype_device_and_shape_of_the_float_weight(model):
    layer = model.blocks[0].up
    for cast, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16), ("double", torch.float64)):
        getattr(model, cast)()
        assert layer.weight.dtype == layer.bias.dtype == next(layer.parameters()).dtype == dtype
    assert layer.weight.shape == (64, 96) and layer.bias.shape == (64,)
    model.to("meta")
    assert layer.weight.device == layer.bias.device == next(layer.parameters()).device == torch.device("meta")


def test_a_layer_without_bias_has_none():
    model = toy(bias=False)
    layer = apply(model, fxq.quantize(model, DATA, recipe(), progress=False)).blocks[0].up
    assert layer.bias is None
    x = rows(5, 96)
    assert torch.equal(nn.functional.linear(x, layer.weight), layer(x))


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(
    "value", [nn.Parameter(torch.ones(64)), torch.ones(64), None], ids=["parameter", "tensor", "no"]
)
def test_weight_and_bias_cannot_be_set(model, name, value):
    with pytest.raises(
        ApplyError, match=rf"layer blocks\.0\.up is quantized, its float {name} is gone: setting {name}"
    ):
        setattr(model.blocks[0].up, name, value)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (
            lambda: toy(blocks=2).state_dict(),
            "layer blocks.0.up is quantized: the state dict has a float weight",
        ),
        (
            lambda: {"blocks.0.up.bias": torch.ones(64)},
            "float weight or bias for it; load that into the float model",
        ),
        (lambda: applied(4).state_dict(), r"integers is torch\.uint8, expected torch\.int8"),
        (lambda: applied(per_token=True, dual_scale=False).state_dict() | plain(), "which this layer lacks"),
    ],
    ids=["float", "bias", "bits", "scales"],
)
def test_a_state_of_another_kind_is_refused_whatever_strict_says(model, state, reason, strict):
    layers = model if "lacks" not in reason else applied(per_token=True, dual_scale=False)
    before = copy.deepcopy(layers.state_dict())
    with pytest.raises(RuntimeError, match=reason):
        layers.load_state_dict(state(), strict=strict)
    after = layers.state_dict()
    quantized = [name for name in before if name.startswith("blocks.0.up")]
    assert all(torch.equal(before[name], after[name]) for name in quantized)


def plain():
    return {"blocks.0.up.input_scale": torch.ones(1), "blocks.0.up.perm": torch.arange(96, dtype=torch.int32)}


@pytest.mark.parametrize("names", [".integers", ".weight"], ids=["own names", "names of the bundle"])
def test_a_state_without_the_form_of_the_floats_loads(model, names):
    state = {name: t for name, t in model.state_dict().items() if not name.endswith(".like")}
    state = {name.replace(".integers", names): tensor for name, tensor in state.items()}
    assert state[f"blocks.0.up{names}"].dtype == torch.int8
    other = applied()
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(state, strict=True)
    assert relative_error(model, other, rows(5, 96)) == 0
    del state[f"blocks.0.up{names}"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"blocks\.0\.up\.integers"'):
        other.load_state_dict(state)


def test_a_state_is_assigned_to_a_module_without_values(model):
    empty = copy.deepcopy(model).to("meta")
    empty.load_state_dict(model.state_dict(), assign=True)
    assert empty.blocks[0].up.weight.device.type == "cpu"
    assert relative_error(model, empty, rows(5, 96)) == 0


def test_a_state_dict_survives_a_safe_file(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = applied()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert relative_error(model, other, rows(5, 96)) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_and_pickles_compute_the_same(model, copied):
    other = copied(model)
    assert isinstance(other.blocks[0].up, QuantizedLinear)
    assert other.blocks[0].up.integers.data_ptr() != model.blocks[0].up.integers.data_ptr()
    assert relative_error(model, other, rows(5, 96)) == 0


def test_what_training_code_does_to_a_model_changes_nothing(model):
    want = model(rows(5, 96))
    model.share_memory()
    model.requires_grad_(True).requires_grad_(False)
    model.to(memory_format=torch.channels_last).train().eval().zero_grad()
    torch.optim.AdamW(model.parameters(), 0.1).step()
    assert torch.equal(model(rows(5, 96)), want)


def test_the_bias_in_the_offset_is_the_float_one():
    model = toy()
    layer = apply(model, fxq.quantize(model, DATA, recipe(), progress=False)).blocks[0].up
    bias = model.blocks[0].up.bias
    torch.testing.assert_close(layer.float_bias(), bias.double(), rtol=1e-4, atol=1e-5)
    assert layer.has_values_of(bias) and layer.has_values_of(bias.bfloat16()) and layer.has_values_of(bias.half())
    assert not layer.has_values_of(None) and not layer.has_values_of(bias + 1e-2) and not layer.has_values_of(bias[:3])


accelerate = pytest.importorskip("accelerate")


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("disk", [False, True])
def test_sequential_offload_of_an_applied_model_works(model, buffers, disk, tmp_path):
    want = model(rows(5, 96))
    options = {"execution_device": torch.device("cpu"), "offload_buffers": buffers}
    offload = accelerate.disk_offload if disk else accelerate.cpu_offload
    offloaded = offload(model, *([tmp_path] if disk else []), **options)
    assert offloaded.blocks[0].up.integers.is_meta == buffers
    for _ in range(2):
        assert torch.equal(offloaded(rows(5, 96)), want)


@pytest.mark.parametrize("per_token", [False, True])
def test_a_model_in_float64_computes_its_quantized_linears_in_float32(per_token):
    model = toy(blocks=1)
    quantized = fxq.quantize(model, None if per_token else DATA, recipe(8, per_token=per_token), example_inputs=DATA[0])
    single, double = fxq.apply(model, quantized), fxq.apply(model, quantized).double()
    with torch.no_grad():
        got = double(DATA[0].double())
        assert got.dtype == torch.float64
        assert float((got - single(DATA[0])).abs().max() / got.abs().max()) < 1e-4
