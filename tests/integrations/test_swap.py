import copy
import warnings

import pytest
import torch
from torch import nn

import fxq
from fxq.core.ir import LAYER_TENSORS
from fxq.integrations.quantized_linear import buffer_name
from fxq.integrations.swap import ApplyError, QuantizedLinear, apply
from tests.features import needs
from tests.toys import recipe, relative_error, rows, toy, wan_rollout

DATA = [rows(6, 96, seed=seed) for seed in range(3)]


def quantized_toy(bits=8, blocks=1, **options):
    model = toy(blocks=blocks, **options)
    return model, fxq.quantize(model, DATA, recipe(bits, weighting="uniform"), progress=False)


@pytest.fixture(scope="module")
def pair():
    return quantized_toy(blocks=2)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_the_swapped_model_computes_what_the_quantized_graph_does(bits, bias, tmp_path):
    model, quantized = quantized_toy(bits, bias=bias)
    folder = fxq.save(quantized, tmp_path / "bundle")
    x = rows(5, 96)
    for bundle in (quantized, folder):
        assert relative_error(quantized, apply(model, bundle), x) < 1e-6
    assert relative_error(quantized, model, x) > 1e-4


def test_a_whole_rollout_is_the_same():
    rollout = wan_rollout()
    quantized = fxq.quantize(rollout.denoiser, rollout, recipe(weighting="uniform"), progress=False)
    videos = []
    for module in (quantized, apply(rollout.denoiser, quantized)):
        with rollout.using(module):
            videos.append(rollout.rollout(*rollout.batches[0]))
    torch.testing.assert_close(videos[1], videos[0], rtol=1e-5, atol=1e-5)


def test_float_weights_are_gone_and_the_model_given_is_not_changed(pair):
    model, quantized = pair
    before = copy.deepcopy(model.state_dict())
    applied = apply(model, quantized)
    assert type(applied) is type(model)
    assert {n for n, p in applied.named_parameters() if p.numel()} == {"head.weight", "head.bias"}
    assert isinstance(applied.blocks[1].down, QuantizedLinear)
    assert "W8A8" in repr(applied.blocks[0].up)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    shared = {t.data_ptr() for t in applied.state_dict().values()} & {t.data_ptr() for t in model.state_dict().values()}
    assert not shared


def test_in_place_the_model_itself_changes(pair):
    model, quantized = copy.deepcopy(pair[0]), pair[1]
    assert apply(model, quantized, in_place=True) is model
    assert isinstance(model.blocks[0].up, QuantizedLinear)
    assert relative_error(quantized, model, rows(5, 96)) < 1e-6


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float64)])
def test_casting_the_model_leaves_codes_and_scales_untouched(pair, cast):
    model, quantized = pair
    applied = apply(model, quantized)
    before = copy.deepcopy({name: getattr(applied.blocks[0].up, buffer_name(name)) for name in LAYER_TENSORS})
    cast(applied)
    assert applied.blocks[0].up.weight.dtype == applied.head.weight.dtype != torch.float32
    for name, tensor in before.items():
        now = getattr(applied.blocks[0].up, buffer_name(name))
        assert now.dtype == tensor.dtype and torch.equal(now, tensor), name


def test_a_model_cast_to_bfloat16_runs_and_returns_bfloat16(pair):
    model, quantized = pair
    x = rows(5, 96)
    low = apply(model, quantized).bfloat16()
    assert low(x.bfloat16()).dtype == torch.bfloat16
    assert relative_error(quantized, lambda x: low(x.bfloat16()), x) < 0.05


def test_moving_the_model_moves_every_buffer(pair):
    applied = apply(*pair).to("meta")
    assert {t.device.type for t in applied.blocks[0].up.buffers()} == {"meta"}
    assert applied.blocks[0].up.panels is None


def test_the_swapped_model_is_captured_whole_by_dynamo(pair):
    model, quantized = pair
    torch._dynamo.reset()
    compiled = torch.compile(apply(model, quantized), backend="eager", fullgraph=True)
    assert relative_error(quantized, compiled, rows(5, 96)) < 1e-6


def test_the_state_loads_into_another_copy(pair):
    model, quantized = pair
    first, second = apply(model, quantized), apply(model, quantized)
    for tensor in second.state_dict().values():
        tensor.zero_()
    second.load_state_dict(first.state_dict())
    assert {f"blocks.0.up.{buffer_name(name)}" for name in LAYER_TENSORS} <= set(first.state_dict())
    assert not any("panels" in name for name in first.state_dict())
    assert relative_error(first, second, rows(5, 96)) == 0


@needs("native")
def test_with_native_kernels_the_panels_follow_a_loaded_weight(pair):
    layer, other = (apply(*pair).blocks[0].up for _ in range(2))
    with torch.no_grad():
        other.integers.neg_()
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.codes(), other.integers)
    other.lay_out()
    assert torch.equal(layer.panels, other.panels)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(96, 32), nn.Linear(96, 32)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x):
        return self.first(x) + self.second(x.sin())


def test_two_linears_with_one_weight_are_both_swapped():
    model = Tied().eval()
    quantized = fxq.quantize(model, DATA, recipe(weighting="uniform"), progress=False)
    applied = apply(model, quantized)
    assert isinstance(applied.first, QuantizedLinear) and applied.first.integers is applied.second.integers
    assert relative_error(quantized, applied, rows(5, 96)) < 1e-6


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 96) / 10)

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


class OwnLinear(nn.Linear):
    pass


def other_values(model):
    with torch.no_grad():
        model.blocks[0].up.weight.copy_(torch.randn(64, 96) / 10)


def scaled_channels(model):
    with torch.no_grad():
        model.blocks[0].up.weight[:, ::2] *= 1.5


def other_bias(model):
    with torch.no_grad():
        model.blocks[0].up.bias += 1


def no_bias(model):
    model.blocks[0].up.bias = None


def other_shape(model):
    model.blocks[0].up = nn.Linear(96, 48)


def other_name(model):
    model.layers = model.blocks
    del model.blocks


def subclass(model):
    up = OwnLinear(96, 64)
    up.load_state_dict(model.blocks[0].up.state_dict())
    model.blocks[0].up = up


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_values, r"blocks\.0\.up: the model's weight is .* steps from the bundle's integers"),
        (scaled_channels, r"the recipe changed them before rounding"),
        (other_shape, r"blocks\.0\.up of the bundle is \(64, 96\), the model's weight \(48, 96\)"),
        (other_name, r"no parameter for 4 of 4 layers of the bundle: blocks\.0\.up"),
        (other_bias, r"blocks\.0\.up: the model has another bias than the quantized layer"),
        (no_bias, r"blocks\.0\.up: the model has no bias, the quantized layer has one"),
        (subclass, r"blocks\.0\.up is OwnLinear, expected nn\.Linear"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_that_does_not_fit_is_refused_and_left_alone(pair, change, reason, in_place):
    model = copy.deepcopy(pair[0])
    change(model)
    with pytest.raises(ApplyError, match=reason):
        apply(model, pair[1], in_place=in_place)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_a_weight_that_other_code_reads_cannot_be_swapped():
    model = Functional().eval()
    quantized = fxq.quantize(model, DATA, recipe(weighting="uniform"), progress=False)
    with pytest.raises(ApplyError, match=r"a parameter that other code reads, expected nn\.Linear"):
        apply(model, quantized)


def test_a_model_that_is_one_linear_is_swapped_too():
    model = nn.Linear(96, 8).eval()
    quantized = fxq.quantize(model, DATA, recipe(weighting="uniform"), progress=False)
    copied = apply(model, quantized)
    assert isinstance(copied, QuantizedLinear) and type(model) is nn.Linear
    assert apply(model, quantized, in_place=True) is model and isinstance(model, QuantizedLinear)
    for applied in (copied, model):
        assert relative_error(quantized, applied, rows(5, 96)) < 1e-6


def test_linears_that_the_bundle_does_not_know_are_listed(pair):
    model = copy.deepcopy(pair[0])
    model.extra = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match="does not know 1 linears, they stay in model dtype: extra"):
        applied = apply(model, pair[1])
    assert type(applied.extra) is nn.Linear
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(*pair)


def test_a_module_that_fxq_did_not_make_is_refused(pair):
    with pytest.raises(ApplyError, match=r"not made by fxq\.quantize.*give the folder"):
        apply(pair[0], torch.fx.symbolic_trace(nn.Linear(2, 2)))


def test_an_optimized_module_with_fused_layers_is_refused(pair):
    model, quantized = pair
    fused = copy.deepcopy(quantized)
    for node in fused.graph.nodes:
        if node.target == torch.ops.fxq.dual_scale_linear.default:
            node.target = torch.ops.fxq.dual_scale_linear_add.default
    with pytest.raises(ApplyError, match="give the module it was made from"):
        apply(model, fused)
