"""Layers whose inputs have a scale and a zero point per token, from the plan to the optimized graph."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

import fxq
from fxq import numerics
from fxq.bench.layers import layer_case, sites_of
from fxq.capture.trace import trace
from fxq.core.graph import linear_sites
from fxq.core.ir import LayerPlan, QuantGraph, Stage, example_value, get_tensor, plan_of, planned, set_plan
from fxq.core.layer import LayerTensors, QuantizedLayer
from fxq.core.method import LayerUpdate
from fxq.core.pipeline import run_passes
from fxq.core.verify import RuleError, check
from fxq.passes import Freeze, LoweringError, LowerLinear
from fxq.passes.fusions.merge_linears import MergeLinears
from fxq.passes.methods import output_sqnr
from fxq.passes.methods.adaround import AdaRound
from fxq.passes.methods.ranges import RangeSearch
from fxq.passes.qdq.to_qdq import ToQdq
from tests.passes.test_share_inputs import model as siblings
from tests.toys import problem, recipe, relative_error, rows, toy, wan_rollout

UP = "blocks.0.up"
QUANTIZE = torch.ops.fxq.quantize_per_token_asymmetric.default
SYMMETRIC = torch.ops.fxq.quantize_per_token.default
LINEAR = torch.ops.fxq.dual_scale_linear_per_token.default
X = rows(2, 21, 96)


def measured(bits=8, **options):
    return recipe(bits, per_token=True, asymmetric=True, **options)


def quantized(model=None, bits=8, x=X, **options):
    return fxq.quantize(model or toy(), None, measured(bits, **options), example_inputs=x, progress=False)


def calls(module, target):
    return module.graph.find_nodes(op="call_function", target=target)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.01), (4, 0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_quantized_without_data(bits, bound, dtype):
    model = toy().to(dtype)
    x = X.to(dtype)
    q = quantized(model, bits, x)
    assert q(x).dtype == dtype
    assert relative_error(model, q, x) < bound
    assert relative_error(model, q, (X * torch.logspace(-3, 3, 21)[:, None]).to(dtype)) < bound


def test_rows_on_one_side_of_zero_lose_half_of_what_a_symmetric_scale_loses():
    model = torch.nn.Sequential(torch.nn.Linear(96, 64)).eval()
    x = (rows(50, 96).abs() + 1) * torch.logspace(-1, 1, 50)[:, None]
    static = fxq.quantize(model, [x], recipe(8, 5), progress=False)
    symmetric, asymmetric = (
        fxq.quantize(model, None, recipe(8, 5, per_token=True, asymmetric=kind), example_inputs=x, progress=False)
        for kind in (False, True)
    )
    errors = [relative_error(model, q, x) for q in (asymmetric, symmetric, static)]
    assert errors[0] < 0.65 * errors[1] and errors[0] < errors[2]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_layer_computes_the_simulation_in_floats(bits):
    model = toy()
    q = quantized(model, bits)
    plan = plan_of(calls(q, LINEAR)[0])
    perm, stored, scale = (get_tensor(q, f"{UP}.{name}") for name in ("perm", "weight", "weight_scale"))
    weight = numerics.dequantize_weight(numerics.unpacked(stored, bits), scale, plan.split)
    q_x, x_scale = numerics.quantize_per_token(X[..., perm], plan.split, 8, asymmetric=True)
    want = F.linear(numerics.dequantize_per_token(q_x, x_scale, plan.split), weight, model.blocks[0].up.bias)
    got = LINEAR(q_x, x_scale, stored, scale, get_tensor(q, f"{UP}.offset"), plan.split, bits, torch.float32)
    assert plan.outliers and x_scale.shape == (2, 21, 4)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)


def test_nothing_more_is_stored_than_with_symmetric_scales():
    symmetric = fxq.quantize(toy(), None, recipe(4, per_token=True), example_inputs=X, progress=False)
    asymmetric = quantized(bits=4)
    left, right = (dict(q.named_buffers()) for q in (symmetric, asymmetric))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_every_new_node_has_its_value():
    for pair in calls(quantized(), QUANTIZE):
        integers, scales = example_value(pair)
        assert integers.dtype == torch.int8 and scales.shape[:-1] == integers.shape[:-1]
        assert scales.shape[-1] == (4 if integers.shape[-1] == 96 else 2)
        assert [example_value(user).dtype for user in pair.users] == [torch.int8, torch.float32]


def test_the_summary_says_asymmetric():
    row = {r.layer: r for r in fxq.summary(quantized(bits=4)).rows}[UP]
    assert (row.bits, row.output_sqnr) == ("W4A8 per token, asymmetric", None)
    assert "W4A8 per token, asymmetric" in str(fxq.summary(quantized(bits=4)))


def test_a_layer_is_read_by_name():
    q = quantized(bits=4)
    layer = QuantizedLayer.of(calls(q, LINEAR)[0])
    assert layer.per_token and layer.own_quantize is calls(q, QUANTIZE)[0] and layer.input_bits == 8
    assert torch.equal(LayerTensors.of(q, layer.plan).bias(), toy().blocks[0].up.bias.double())


def lowered_by_hand(width):
    graph = trace(torch.nn.Sequential(torch.nn.Linear(width, 3, bias=False)).eval(), (rows(2, width),))
    scheme = fxq.Scheme(per_token=True, asymmetric=True)
    set_plan(
        next(linear_sites(graph.module)).node, LayerPlan(layer="0", in_features=width, out_features=3, scheme=scheme)
    )
    graph.adopt({})
    graph.updates["0"] = LayerUpdate(weight=torch.ones(3, width, dtype=torch.int8), weight_scale=torch.ones(1, 3))
    return run_passes(graph, (LowerLinear(), Freeze()))


def test_a_layer_of_any_width_multiplies_exactly():
    for x in (torch.tensor([[0.0, 255, 17], [-128, 127, 3]]), torch.tensor([[-255.0, 0, -1], [0, 0, 0]])):
        assert torch.equal(lowered_by_hand(3).module(x), x.sum(1, keepdim=True).expand(2, 3))


def test_a_layer_that_could_overflow_is_kept_or_refused():
    wide = torch.nn.Sequential(torch.nn.Linear(2**16 + 32, 2, bias=False)).eval()
    with pytest.warns(UserWarning, match="at most 65536 fit"):
        quantized(wide, x=rows(2, 2**16 + 32), dual_scale=False)
    with pytest.raises(LoweringError, match="layer 0: 65568 inputs can overflow the int32 accumulator"):
        lowered_by_hand(2**16 + 32)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_quantize_of_another_scheme_breaks_a_rule(asymmetric):
    chosen = recipe(4, per_token=True, asymmetric=asymmetric)
    graph = QuantGraph(fxq.quantize(toy(), None, chosen, example_inputs=X, progress=False), Stage.FROZEN).fork()
    node = planned(graph.module)[UP][1][0]
    plan = plan_of(node)
    set_plan(node, dataclasses.replace(plan, scheme=dataclasses.replace(plan.scheme, asymmetric=not asymmetric)))
    with pytest.raises(RuleError, match=f"{UP}: its input is made by .*, the plan says W4A8 per token"):
        check(graph, "after the damage")


def test_linears_on_one_input_get_one_quantize_and_one_gemm():
    model, x = siblings(), rows(11, 96)
    q = quantized(model, 4, x)
    graph = run_passes(QuantGraph(q, Stage.FROZEN).fork(), (MergeLinears(),))
    assert [len(calls(m, QUANTIZE)) for m in (q, graph.module)] == [3, 1]
    (joint,) = calls(graph.module, LINEAR)
    assert get_tensor(graph.module, str(joint.args[2].target)).shape == (64 + 32 + 7, 48)
    assert all(torch.equal(a, b) for a, b in zip(graph.module(x), q(x), strict=True))


def test_symmetric_and_asymmetric_neighbours_stay_apart():
    chosen = measured()
    rule = fxq.Rule("*.k", fxq.Scheme(per_token=True))
    chosen = dataclasses.replace(chosen, rules=(rule, *chosen.rules))
    model, x = siblings(), rows(11, 96)
    q = fxq.quantize(model, None, chosen, example_inputs=x, progress=False)
    graph = run_passes(QuantGraph(q, Stage.FROZEN).fork(), (MergeLinears(),))
    assert [len(calls(graph.module, target)) for target in (QUANTIZE, SYMMETRIC, LINEAR)] == [1, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(graph.module(x), q(x), strict=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_an_optimized_denoiser_computes_the_same(bits):
    rollout = wan_rollout()
    args, shapes = rollout.example_call()
    chosen = measured(bits)
    q = fxq.quantize(rollout.denoiser, None, chosen, example_inputs=args, dynamic_shapes=shapes, progress=False)
    fast = fxq.optimize(q)
    for want, got in zip(*(pytree.tree_leaves(m(*args)) for m in (q, fast)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    fused = [getattr(torch.ops.fxq, f"{kind}_quantize_per_token_asymmetric").default for kind in ("norm", "activation")]
    assert [len(calls(fast, op)) for op in (QUANTIZE, *fused)] == [4, 3, 2] and len(calls(q, QUANTIZE)) == 12
    assert len(calls(fast, torch.ops.fxq.dual_scale_linear_per_token_add.default)) == 3


def test_methods_see_the_zero_points():
    p = problem(per_token=True, asymmetric=True, input_bits=5, bits=4)
    p = dataclasses.replace(p, rows=p.rows.abs(), low=torch.zeros(96))
    symmetric = dataclasses.replace(p, scheme=dataclasses.replace(p.scheme, asymmetric=False))
    update = RangeSearch().apply(p, None)
    assert update.input_scale is None and update.input_zero_point is None
    assert output_sqnr(p, update) > output_sqnr(symmetric, update) + 0.1
    learned = AdaRound(iterations=60, rows=128).apply(p, update)
    assert output_sqnr(p, learned) >= output_sqnr(p, update)


def test_the_bench_of_layers_measures_them():
    rollout = wan_rollout()
    q = fxq.quantize(rollout.denoiser, rollout, measured(8), progress=False)
    site = next(iter(sites_of(q, rollout)))
    case = layer_case(q, [site], "cpu")
    assert "W8A8 per token, asymmetric" in case.name
    ours = next(c for c in case.contestants if c.ours)
    want = case.reference()
    got = ours.build().call()
    assert float((got.double() - want).norm() / want.norm()) < 0.05


def lowered(module, **options):
    return run_passes(QuantGraph(module, Stage.FROZEN).fork(), (ToQdq(**options),))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("input_bits", [8, 5])
@pytest.mark.parametrize("in_halves", [False, True])
def test_plain_operators_compute_the_same(bits, input_bits, in_halves):
    q = quantized(bits=bits, input_bits=input_bits)
    graph = lowered(q, in_halves=in_halves)
    x = X * torch.logspace(-3, 3, 21)[:, None]
    x[0, 4], x[1, 5], x[1, 6] = 0, x[1, 5].abs(), -x[1, 6].abs()
    assert not [n for n in graph.module.graph.nodes if str(n.target).startswith("fxq.")]
    want, got = q(x), graph.module(x)
    size = want.norm(dim=-1, keepdim=True)
    assert float(((got - want).norm(dim=-1, keepdim=True) / size).max()) < 1e-4
    assert all(isinstance(example_value(n), torch.Tensor) for n in graph.module.graph.nodes if n.op == "call_function")


def test_plain_operators_round_to_the_same_integers():
    q = quantized(input_bits=6)
    perm = get_tensor(q, f"{UP}.perm").long()
    want, _ = numerics.quantize_per_token(X[..., perm], 64, 6, asymmetric=True)
    seen = []
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            seen.extend([value] if n.target == quantize else [])
            return value

    Watch(lowered(q).module).run(X)
    shift = 2**5  # of 6 bits
    assert torch.equal((seen[0].int() - shift)[..., perm[:64]], want[..., :64].int())
    assert torch.equal(seen[1].int() - shift, want[..., 64:].int())


def test_a_token_preset_learns_from_data_and_says_so_where_there_are_none():
    model, data = toy(blocks=2), [rows(200, 96, seed=i) for i in range(4)]
    with pytest.warns(UserWarning, match="'w4a8-token' has methods that learn .* there are none"):
        nearest = fxq.quantize(model, None, "w4a8-token", example_inputs=data[0], progress=False)
    learned = fxq.quantize(model, data, "w4a8-token", progress=False)
    held_out = rows(200, 96, seed=9)
    assert relative_error(model, learned, held_out) < 0.95 * relative_error(model, nearest, held_out)
