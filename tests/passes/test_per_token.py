"""Layers whose input scales are measured per token, from the plan to the optimized graph, without calibration data."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

import fxq
from fxq import numerics
from fxq.capture.trace import trace
from fxq.core.graph import linear_sites
from fxq.core.ir import LayerPlan, QuantGraph, Stage, example_value, get_tensor, plan_of, planned, set_plan
from fxq.core.method import LayerUpdate
from fxq.core.pipeline import run_passes
from fxq.core.verify import RuleError, check
from fxq.kernels import native
from fxq.kernels.gemm.op import ON_CPU
from fxq.passes import Freeze, LoweringError, LowerLinear
from fxq.passes.fusions.merge_linears import MergeLinears
from fxq.passes.qdq.to_qdq import ToQdq
from tests.passes.test_share_inputs import model as siblings
from tests.toys import LEARN, recipe, relative_error, rows, toy, wan_rollout

UP = "blocks.0.up"
QUANTIZE, LINEAR = torch.ops.fxq.quantize_per_token.default, torch.ops.fxq.dual_scale_linear_per_token.default
X = rows(2, 21, 96)
REMARK = "input scales are measured per token: quantize stays apart from what gives its input"


def dynamic(bits=8, **options):
    return recipe(bits, per_token=True, **options)


def quantized(model=None, bits=8, x=X, **options):
    return fxq.quantize(model or toy(), None, dynamic(bits, **options), example_inputs=x, progress=False)


def calls(module, target):
    return module.graph.find_nodes(op="call_function", target=target)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.01), (4, 0.1)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_model_is_quantized_without_data(bits, bound, bias):
    model = toy(bias=bias)
    q = quantized(model, bits)
    assert relative_error(model, q, X) < bound
    assert relative_error(model, q, X * torch.logspace(-3, 3, 21)[:, None]) < bound


@pytest.mark.parametrize("bits", [8, 4])
def test_a_layer_computes_the_simulation_in_floats(bits):
    model = toy()
    q = quantized(model, bits)
    plan = plan_of(calls(q, LINEAR)[0])
    perm, stored, scale = (get_tensor(q, f"{UP}.{name}") for name in ("perm", "weight", "weight_scale"))
    integers = numerics.unpack_int4(stored) if bits == 4 else stored
    weight = numerics.dequantize_weight(integers, scale, plan.split)
    q_x, x_scale = numerics.quantize_per_token(X[..., perm], plan.split, 8)
    want = F.linear(numerics.dequantize_per_token(q_x, x_scale, plan.split), weight, model.blocks[0].up.bias)
    got = LINEAR(q_x, x_scale, stored, scale, get_tensor(q, f"{UP}.offset"), plan.split, bits, torch.float32)
    assert plan.outliers and x_scale.shape == (2, 21, 2)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_stored_has_no_input_scale(bits):
    q = quantized(bits=bits)
    names = {name.removeprefix("blocks.0.") for name, _ in q.named_buffers() if name.startswith("blocks")}
    assert names == {f"{layer}.{n}" for layer in ("up", "down") for n in ("weight", "weight_scale", "offset")} | {
        "up.perm"
    }
    assert get_tensor(q, f"{UP}.weight").dtype == (torch.uint8 if bits == 4 else torch.int8)
    assert torch.equal(get_tensor(q, f"{UP}.offset"), toy().blocks[0].up.bias)


def test_every_new_node_has_its_value_and_the_plan_lies_on_the_product():
    q = quantized()
    for pair in calls(q, QUANTIZE):
        integers, scales = example_value(pair)
        assert integers.dtype == torch.int8 and integers.shape[-1] in (96, 64)
        assert scales.shape[:-1] == integers.shape[:-1]
        assert [example_value(user).dtype for user in pair.users] == [torch.int8, torch.float32]
    assert [plan_of(node).layer for node in calls(q, LINEAR)] == [UP, "blocks.0.down"]


def test_the_summary_says_that_scales_are_per_token():
    row = {r.layer: r for r in fxq.summary(quantized(bits=4)).rows}[UP]
    assert (row.bits, row.output_sqnr, row.outliers) == ("W4A8 per token", None, 32)
    assert row.bytes == 64 * 96 // 2 + 4 * 2 * 64 + 4 * 64 + 4 * 96


def test_data_that_is_there_serves_reconstruction():
    model = toy()
    plain = fxq.quantize(model, [X], dynamic(4), progress=False)
    learned = fxq.quantize(model, [X], dynamic(4, methods=LEARN), progress=False)
    nearest, better = ({r.layer: r.output_sqnr for r in fxq.summary(q).rows}[UP] for q in (plain, learned))
    assert better >= nearest > 10
    assert not torch.equal(get_tensor(plain, f"{UP}.weight"), get_tensor(learned, f"{UP}.weight"))


def lowered_by_hand(width, weight_scale=1.0, outliers=()):
    graph = trace(torch.nn.Sequential(torch.nn.Linear(width, 3, bias=False)).eval(), (rows(2, width),))
    plan = LayerPlan(layer="0", in_features=width, out_features=3, scheme=fxq.Scheme(per_token=True), outliers=outliers)
    set_plan(next(linear_sites(graph.module)).node, plan)
    graph.adopt({})
    groups = 2 if outliers else 1
    scale = torch.ones(groups, 3)
    scale[-1] = weight_scale
    graph.updates["0"] = LayerUpdate(weight=torch.ones(3, width, dtype=torch.int8), weight_scale=scale)
    return run_passes(graph, (LowerLinear(), Freeze()))


def test_no_ratio_of_the_scales_is_too_large():
    graph = lowered_by_hand(5, weight_scale=1e9, outliers=(1, 3))
    x = torch.tensor([[1.0, 127.0, -2.0, 5.0, 127.0], [127.0, -3.0, 4.0, 0.0, -127.0]])
    assert torch.equal(graph.module(x), (x[:, [0, 2, 4]].sum(1) + 1e9 * x[:, [1, 3]].sum(1))[:, None].expand(2, 3))


def test_a_layer_that_could_overflow_is_refused():
    with pytest.raises(LoweringError, match="layer 0: 131072 inputs can overflow the int32 accumulator"):
        lowered_by_hand(2**17)


def damaged(edit):
    graph = QuantGraph(quantized(bits=4), Stage.FROZEN).fork()
    edit(graph, planned(graph.module)[UP][1][0])
    with pytest.raises(RuleError) as caught:
        check(graph, "after the damage")
    return str(caught.value)


def replan(**changes):
    def edit(graph, node):
        plan = plan_of(node)
        set_plan(node, dataclasses.replace(plan, scheme=dataclasses.replace(plan.scheme, **changes)))

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda g, n: n.update_arg(5, 32), "split 32, the plan says 64"),
        (lambda g, n: n.update_arg(6, 8), "weight (64, 48), expected (64, 96)"),
        (lambda g, n: n.update_arg(3, n.args[4]), "scales (64,), expected 2 groups"),
        (lambda g, n: n.update_arg(2, n.args[0]), "does not read stored tensors in the operator's order"),
        (lambda g, n: get_tensor(g.module, f"{UP}.offset").fill_(torch.nan), "a scale or offset is not finite"),
        (replan(per_token=False), "its product is fxq.dual_scale_linear_per_token.default, the plan says W4A8"),
    ],
)
def test_a_damaged_layer_breaks_a_rule(edit, message):
    assert f"{UP}: " in (text := damaged(edit)) and message in text


def test_a_static_product_does_not_serve_a_plan_per_token():
    graph = QuantGraph(fxq.quantize(toy(), [X], recipe(), progress=False), Stage.FROZEN).fork()
    replan(per_token=True)(graph, planned(graph.module)[UP][1][0])
    with pytest.raises(RuleError, match=r"dual_scale_linear.default, the plan says W8A8 per token"):
        check(graph, "after the damage")


def test_linears_on_one_input_get_one_quantize_and_one_gemm():
    model, x = siblings(), rows(11, 96)
    q = quantized(model, 4, x)
    graph = run_passes(QuantGraph(q, Stage.FROZEN).fork(), (MergeLinears(),))
    assert [len(calls(m, QUANTIZE)) for m in (q, graph.module)] == [3, 1]
    (joint,) = calls(graph.module, LINEAR)
    assert get_tensor(graph.module, str(joint.args[2].target)).shape == (64 + 32 + 7, 48)
    assert all(torch.equal(a, b) for a, b in zip(graph.module(x), q(x), strict=True))
    assert graph.remarks["blocks.0.q"] == ["one GEMM with blocks.0.k, blocks.0.v"]


def test_linears_with_other_outliers_keep_their_quantize():
    model, x = siblings(), rows(11, 96)
    alone = dataclasses.replace(dynamic(), share_inputs=False)
    q = fxq.quantize(model, None, alone, example_inputs=x, progress=False)
    graph = run_passes(QuantGraph(q, Stage.FROZEN).fork(), (MergeLinears(),))
    assert len(calls(graph.module, QUANTIZE)) == len(calls(graph.module, LINEAR)) == 3
    assert "the quantized inputs differ" in graph.remarks["blocks.0.q"][0]


@pytest.mark.parametrize("bits", [8, 4])
def test_an_optimized_denoiser_computes_the_same(bits):
    rollout = wan_rollout()
    args, shapes = rollout.example_call()
    chosen = dynamic(bits)
    q = fxq.quantize(rollout.denoiser, None, chosen, example_inputs=args, dynamic_shapes=shapes, progress=False)
    fast = fxq.optimize(q)
    for want, got in zip(*(pytree.tree_leaves(m(*args)) for m in (q, fast)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    fused = (torch.ops.fxq.norm_quantize_per_token.default, torch.ops.fxq.activation_quantize_per_token.default)
    assert [len(calls(fast, op)) for op in (QUANTIZE, *fused)] == [4, 3, 2] and len(calls(q, QUANTIZE)) == 12
    assert len(calls(fast, torch.ops.fxq.dual_scale_linear_per_token_add.default)) == 3
    kernel = native.name() if native.ready() else ON_CPU
    said = (REMARK, "quantize fused into its norm", "gelu fused into its quantize")
    for row in fxq.summary(fast).quantized:
        assert sum(text in row.remarks for text in said) == 1 and row.kernel == kernel


def test_static_and_per_token_layers_live_in_one_model():
    chosen = recipe()
    rule = fxq.Rule("*.down", fxq.Scheme(per_token=True))
    chosen = dataclasses.replace(chosen, rules=(rule, *chosen.rules))
    model = toy()
    q = fxq.quantize(model, [X], chosen, progress=False)
    assert [row.bits for row in fxq.summary(q).quantized] == ["W8A8", "W8A8 per token"]
    assert relative_error(model, q, X) < 0.02
    fast = fxq.optimize(q)
    assert relative_error(q, fast, X) < 1e-5
    remarks = {row.layer: row.remarks for row in fxq.summary(fast).quantized}
    assert "gelu fused into its quantize" in remarks["blocks.0.down"] and REMARK not in remarks[UP]


def lowered(module):
    return run_passes(QuantGraph(module, Stage.FROZEN).fork(), (ToQdq(),))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("input_bits", [8, 5])
def test_plain_operators_compute_the_same(bits, input_bits):
    q = quantized(bits=bits, input_bits=input_bits)
    graph = lowered(q)
    x = X * torch.logspace(-3, 3, 21)[:, None]
    x[0, 4] = 0
    assert not [n for n in graph.module.graph.nodes if str(n.target).startswith("fxq.")]
    torch.testing.assert_close(graph.module(x), q(x), rtol=1e-5, atol=1e-5 * float(q(x).abs().max()))
    assert graph.remarks[UP] == ["lowered to quantize, dequantize and matmul"]


def test_plain_operators_round_to_the_same_integers():
    q = quantized(input_bits=6)
    graph = lowered(q)
    perm = get_tensor(q, f"{UP}.perm").long()
    want, _ = numerics.quantize_per_token(X[..., perm], 64, 6)
    seen = []
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            seen.extend([value] if n.target == quantize else [])
            return value

    Watch(graph.module).run(X)
    shift = 2**5  # of 6 bits
    assert torch.equal((seen[0].int() - shift)[..., perm[:64]], want[..., :64].int())
    assert torch.equal(seen[1].int() - shift, want[..., 64:].int())


def test_values_of_the_plain_operators_are_recorded():
    for node in lowered(quantized()).module.graph.nodes:
        if node.op == "call_function":
            assert isinstance(example_value(node), torch.Tensor), node


def test_a_merged_product_is_left_and_says_so():
    graph = QuantGraph(quantized(siblings(), x=rows(11, 96)), Stage.FROZEN).fork()
    run_passes(graph, (MergeLinears(), ToQdq()))
    wanted = "not lowered: fxq.dual_scale_linear_per_token.default does not read a quantize of its own"
    assert graph.remarks["blocks.0.k"][-1] == wanted
