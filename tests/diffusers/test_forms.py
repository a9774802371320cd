"""Forms in which a model and its calls come: dtypes, modes, wrappers, outputs, constants, shared and sliced weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.metrics.outputs import output_sqnr
from fxq.passes.methods.ranges import MinMax
from tests.diffusers.configs import CAPTURED
from tests.toys import recipe, rows

pytest.importorskip("diffusers")

WAN, FLUX = (
    next(case for case in CAPTURED if case.name == name) for name in ("WanTransformer3DModel", "FluxTransformer2DModel")
)
EIGHT = recipe(methods=(MinMax(),))


def quantize(model, *batches):
    return fxq.quantize(model, batches, EIGHT, progress=False)


def bfloat16(batch):
    return {n: t.bfloat16() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in batch.items()}


@pytest.mark.sweep
def test_a_bfloat16_model_stays_one():
    model = WAN.build().bfloat16()
    q = quantize(model, bfloat16(WAN.batch(1)))
    assert q(**bfloat16(WAN.batch(9)))[0].dtype == torch.bfloat16
    assert output_sqnr(model, q, [bfloat16(WAN.batch(9))]) > 25


def test_training_mode_is_no_obstacle_where_it_changes_nothing():
    model = WAN.build().train()
    assert output_sqnr(model, quantize(model, WAN.batch(1)), [WAN.batch(9)]) > 25
    assert model.training


def compiled_blocks(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")
    return model


def program(model):
    return torch.export.export(model, (), WAN.batch(1))


@pytest.mark.parametrize(
    "wrap",
    [compiled_blocks, pytest.param(program, marks=pytest.mark.sweep), lambda m: program(m).module()],
    ids=["blocks", "program", "graph"],
)
def test_compiled_blocks_programs_and_graph_modules_are_models(wrap):
    model = WAN.build()
    q = quantize(wrap(WAN.build()), WAN.batch(1), WAN.batch(2))
    assert len(fxq.summary(q).quantized) == 22 and not [r for r in fxq.summary(q).kept if "never" in r.reason]
    assert output_sqnr(model, q, [WAN.batch(9)]) > 30


def test_an_output_of_a_class_of_diffusers_survives_saving(tmp_path):
    model = WAN.build()
    batches = [{n: v for n, v in WAN.batch(seed).items() if n != "return_dict"} for seed in (1, 9)]
    q = quantize(model, batches[0])
    loaded = fxq.load(fxq.save(q, tmp_path / "bundle"))
    want, got = q(**batches[1]), loaded(**batches[1])
    assert type(got) is type(want) is type(model(**batches[1]))
    assert torch.equal(got.sample, want.sample)


def test_fused_projections_are_quantized_and_the_ones_they_replace_are_never_called():
    model = FLUX.build()
    for module in list(model.modules()):
        if hasattr(module, "fuse_projections"):
            module.fuse_projections()
    q = quantize(model, FLUX.batch(1))
    summary = fxq.summary(q)
    assert {"transformer_blocks.0.attn.to_qkv", "single_transformer_blocks.0.attn.to_qkv"} <= {
        r.layer for r in summary.quantized
    }
    never = {row.layer for row in summary.kept if row.reason == "never called in the captured graph"}
    assert never == {
        f"{block}.0.attn.{name}"
        for block, names in {
            "transformer_blocks": ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"),
            "single_transformer_blocks": ("to_q", "to_k", "to_v"),
        }.items()
        for name in names
    }
    assert output_sqnr(model, q, [FLUX.batch(9)]) > 25


class Shared(nn.Module):
    """Two layers of an odd size, with one weight if asked, under a forward given as a function of (self, x)."""

    def __init__(self, forward, bias=True, same_weight=True, same_bias=False):
        super().__init__()
        self.a, self.b = nn.Linear(35, 35, bias=bias), nn.Linear(35, 35, bias=bias)
        if same_weight:
            self.b.weight = self.a.weight
        if same_bias:
            self.b.bias = self.a.bias
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def twice(self, x):
    return self.a(F.gelu(self.a(x)))


def both(self, x):
    return self.a(x) + self.b(F.gelu(x) * 3)


def sliced(self, x):
    q, k = (F.linear(x, part) for part in self.a.weight.split((20, 15)))
    return torch.cat((q, k), -1) + self.a(x)


def toy_case(forward, **options):
    torch.manual_seed(3)
    model = Shared(forward, **options).eval()
    q = quantize(model, rows(9, 35), rows(9, 35, seed=5))
    return model, q, fxq.summary(q)


@pytest.mark.parametrize(
    "options",
    [{"forward": twice}, {"forward": both, "bias": False}, {"forward": both, "same_bias": True}],
    ids=["one module", "no bias", "one bias"],
)
def test_one_weight_used_twice_is_one_layer(options):
    model, q, summary = toy_case(**options)
    assert len(summary.quantized) == 1
    assert 20 < output_sqnr(model, q, [rows(9, 35, seed=6)]) < 70


def test_one_weight_with_two_biases_is_kept_with_the_reason():
    model, q, summary = toy_case(both)
    assert [row.reason for row in summary.rows] == ["its weight is shared by linears with different biases"]
    assert torch.equal(q(rows(9, 35)), model(rows(9, 35)))


def test_slices_of_a_weight_are_kept_with_the_reason():
    model, q, summary = toy_case(sliced, same_weight=False)
    reasons = {row.layer: row.reason for row in summary.rows}
    assert reasons.pop("a").startswith("its weight is also read by split")
    assert set(reasons.values()) - {"never called in the captured graph"} == {
        "its weight or bias is computed in the graph, not a parameter"
    }
    assert torch.equal(q(rows(9, 35)), model(rows(9, 35)))


@pytest.mark.parametrize(("width", "per_token"), [(1, True), (6, True), (33, True), (33, False)])
def test_modulation_of_one_row_and_any_width_is_quantized(width, per_token):
    torch.manual_seed(4)
    model = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
    calls = [rows(1, width), rows(1, width, seed=5)]
    q = fxq.quantize(model, calls, recipe(8, per_token=per_token), progress=False)
    (row,) = fxq.summary(q).rows
    assert row.quantized and row.shape == (6 * width, width)
    assert output_sqnr(model, q, [rows(1, width)]) > 30


@pytest.mark.parametrize("width", [1, 6, 15])
def test_narrow_layers_keep_floats_where_scales_are_static(width):
    model = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
    with pytest.warns(UserWarning, match="quantizes no linear"):
        q = quantize(model, rows(1, width))
    (row,) = fxq.summary(q).rows
    assert row.reason == "fewer than 16 input channels: its integers cannot show what is not finite"
    assert torch.equal(q(rows(1, width)), model(rows(1, width)))
