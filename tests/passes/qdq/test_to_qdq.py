import collections
import dataclasses

import pytest
import torch
from torch import nn

import fxq
from fxq import numerics
from fxq.capture.trace import trace
from fxq.core.ir import QuantGraph, Stage, get_tensor, put_tensor
from fxq.core.pipeline import PassError, run_passes
from fxq.passes.fusions.fold_permutations import FoldPermutations
from fxq.passes.fusions.merge_linears import MergeLinears
from fxq.passes.qdq.qdq_layers import halves, may_saturate, parts_of
from fxq.passes.qdq.to_qdq import ToQdq
from tests.passes.test_share_inputs import model as siblings
from tests.toys import recipe, relative_error, rows, toy, wan_rollout

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
X = rows(2, 21, 96)


def quantized(bits=8, input_bits=8, x=X, **options):
    return fxq.quantize(toy(**options), [x], recipe(bits, input_bits), progress=False)


def lowered(module):
    return run_passes(QuantGraph(module, Stage.FROZEN).fork(), (ToQdq(),))


def kinds(graph):
    return collections.Counter(str(n.target) for n in graph.module.graph.nodes if n.op == "call_function")


def integers(graph, x):
    """What each quantize node of a lowered graph stores, minus the shift of 8-bit inputs to uint8."""
    found = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if node.target == QUANTIZE:
                found.append(value.to(torch.int16) - 128)
            return value

    Watch(graph.module).run(x)
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("bits", "input_bits"), [(8, 8), (4, 8), (4, 6), (8, 4)])
def test_the_lowered_graph_computes_what_the_frozen_one_does(bits, input_bits, bias):
    q = quantized(bits, input_bits, bias=bias)
    graph = lowered(q)
    assert relative_error(q, graph.module, X) < 1e-6
    assert not any(name.startswith("fxq.") for name in kinds(graph))
    assert graph.remarks["blocks.0.up"] == ["lowered to quantize, dequantize and matmul"]
    assert graph.log[-1][:2] == ("ToQdq", 2)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("bits", "input_bits", "products"), [(8, 8, 6), (8, 7, 3), (4, 8, 3)])
def test_in_halves_it_computes_the_same_and_only_layers_that_may_saturate_are(bits, input_bits, products, per_token):
    q = fxq.quantize(toy(), [X], recipe(bits, input_bits, per_token=per_token), progress=False)
    graph = run_passes(QuantGraph(q, Stage.FROZEN).fork(), (ToQdq(in_halves=True),))
    assert relative_error(q, graph.module, X * 2) < 1e-6
    assert kinds(graph)["aten.matmul.default"] == products
    assert set(get_tensor(graph.module, f"blocks.0.up.{n}").dtype for n in ("weight", "outlier_weight")) == {torch.int8}


@pytest.mark.parametrize(("bits", "input_bits"), [(8, 8), (8, 7), (4, 8), (4, 6)])
def test_sums_of_two_products_fit_16_bits_where_no_layer_may_saturate(bits, input_bits):
    q = fxq.quantize(toy(), [X], recipe(bits, input_bits), progress=False)
    graph = run_passes(QuantGraph(q, Stage.FROZEN).fork(), (ToQdq(in_halves=True),))
    largest = 0
    for node in graph.module.graph.find_nodes(op="call_function", target=torch.ops.aten.matmul.default):
        weight = get_tensor(graph.module, str(node.args[1].args[0].args[0].target))
        largest = max(largest, int(weight.abs().max()))
    top = max(int(u.max()) + 128 for u in integers(graph, X * 9))
    assert top == 2**input_bits - 1
    assert 2 * top * largest < 2**15
    assert may_saturate(fxq.Scheme(weight_bits=bits, input_bits=input_bits)) == (bits == input_bits == 8)


def test_halves_add_up_and_have_seven_bits():
    weight = torch.arange(-128, 128).to(torch.int8)
    low, rest = halves(weight)
    assert torch.equal(low.int() + rest.int(), weight.int())
    assert max(int(h.int().abs().max()) for h in (low, rest)) == 64 and 2 * 255 * 64 < 2**15


def test_integers_are_those_of_the_reference():
    q, x = quantized(), rows(14, 21, 96, seed=5) * 1.3
    perm, scale, zero = (get_tensor(q, f"blocks.0.up.{name}") for name in ("perm", "input_scale", "input_zero_point"))
    want = numerics.quantize_input(x[..., perm], scale, zero, 64, 8)
    normal, outlier, _ = integers(lowered(q), x)
    assert torch.equal(normal[..., perm[:64]], want[..., :64].short())
    assert torch.equal(outlier, want[..., 64:].short())


def test_only_outlier_channels_are_gathered():
    graph = lowered(quantized())
    assert kinds(graph)["aten.index_select.default"] == 1
    outliers = get_tensor(graph.module, "blocks.0.up.outliers")
    assert outliers.tolist() == list(graph.plans["blocks.0.up"].outliers)
    weight = get_tensor(graph.module, "blocks.0.up.weight")
    assert weight.shape == (64, 96)
    assert not weight[:, outliers].any()
    assert weight.any(0).sum() == 64


@pytest.mark.parametrize(("permuted", "split"), [(True, 64), (False, 64), (False, 96), (True, 96)])
def test_parts_hold_every_weight_once(permuted, split):
    weight = torch.randint(-127, 128, (5, 96), dtype=torch.int8)
    groups = 1 if split == 96 else 2
    perm = torch.randperm(96).int() if permuted else None
    scales = torch.rand(groups, 5)
    parts = parts_of(weight, scales, perm, split)
    ordered = weight if perm is None else torch.empty_like(weight).index_copy_(1, perm.long(), weight)
    total = torch.zeros_like(weight)
    for part in parts:
        total[:, slice(None) if part.channels is None else part.channels] += part.weight
    assert torch.equal(total, ordered)
    assert torch.equal(torch.stack([part.weight_scale for part in parts]), scales)
    for part in parts:
        assert part.own is None or torch.equal(part.own == 0, (part.weight == 0).all(0))


def test_channels_in_order_are_sliced():
    q = quantized()
    x = X[..., get_tensor(q, "blocks.0.up.perm")]
    graph = QuantGraph(q, Stage.FROZEN).fork()
    for node in graph.module.graph.find_nodes(op="call_function", target=torch.ops.fxq.quantize_act.default):
        node.update_arg(1, None)
    for node in graph.module.graph.find_nodes(op="get_attr", target="blocks.0.up.perm"):
        graph.module.graph.erase_node(node)
    graph.module.get_submodule("blocks.0.up").__delattr__("perm")
    graph.module.recompile()
    found = lowered(graph.module)
    assert kinds(found)["aten.slice.Tensor"] == 2
    assert relative_error(graph.module, found.module, x) < 1e-6


@pytest.mark.parametrize("zero", [-3000, -129, -128, 127, 128, 70000])
@pytest.mark.parametrize("input_bits", [8, 6])
def test_zero_points_beyond_a_byte_are_exact(zero, input_bits):
    q = quantized(input_bits=input_bits)
    layer = "blocks.0.down"
    scale = get_tensor(q, f"{layer}.input_scale")
    put_tensor(q, f"{layer}.input_zero_point", torch.tensor([zero], dtype=torch.int32))
    seen = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, node):
            if node.target == torch.ops.fxq.quantize_act.default and str(node.args[3].target).startswith(layer):
                shifted = self.env[node.args[0]] - zero * scale
                self.env[node.args[0]] = shifted
                seen.append(numerics.quantize_input(shifted, scale, torch.tensor([zero]), 64, input_bits))
            return super().run_node(node)

    want = Watch(q).run(X)
    assert len(seen[0].unique()) > 20

    class Shifted(torch.fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            return value - zero * scale if "gelu" in node.name else value

    graph = lowered(q)
    shift = 2 ** (input_bits - 1)
    assert (str(torch.ops.aten.round.default) in kinds(graph)) == (not -shift <= zero <= 255 - shift)
    torch.testing.assert_close(Shifted(graph.module).run(X), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_keeps_its_dtype(dtype):
    model, x = toy().to(dtype), X.to(dtype)
    q = fxq.quantize(model, [x], recipe(), progress=False)
    graph = lowered(q)
    got = graph.module(x)
    assert got.dtype == dtype
    assert relative_error(q, graph.module, x) < 2**-7
    graph.module.graph.lint()


def test_every_new_node_has_its_recorded_value():
    rollout = wan_rollout()
    graph = lowered(fxq.quantize(rollout.denoiser, rollout, recipe(4), progress=False))
    args, _ = rollout.example_call()
    flat = iter(torch.utils._pytree.tree_leaves(args))

    class Compare(torch.fx.Interpreter):
        compared = 0

        def run_node(self, node):
            value = super().run_node(node)
            recorded = fxq.core.ir.example_value(node)
            if node.op == "call_function" and isinstance(value, torch.Tensor):
                assert (recorded.dtype, recorded.ndim) == (value.dtype, value.ndim), node.name
                for want, size in zip(recorded.shape, value.shape, strict=True):
                    assert not isinstance(want, int) or want == size, node.name
                self.compared += 1
            return value

    watch = Compare(graph.module)
    watch.run(*flat)
    assert watch.compared > 100


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        return self.linear(torch.tanh(self.linear(x)))


def test_a_layer_called_twice_is_stored_once():
    x = rows(9, 64)
    chosen = dataclasses.replace(recipe(), rules=(fxq.Rule("*", fxq.Scheme(weight_bits=8, dual_scale=False)),))
    q = fxq.quantize(Twice().eval(), [x], chosen, progress=False)
    graph = lowered(q)
    assert relative_error(q, graph.module, x) < 1e-6
    assert {name for name, _ in graph.module.named_buffers()} == {
        f"linear.{n}" for n in ("weight", "weight_scale", "offset")
    }
    assert graph.log[-1][:2] == ("ToQdq", 2)


def test_a_fused_product_is_left_and_says_so():
    q = quantized()
    node = q.graph.find_nodes(op="call_function", target=torch.ops.fxq.dual_scale_linear.default)[0]
    graph = QuantGraph(q, Stage.FROZEN).fork()
    (node,) = (n for n in graph.module.graph.nodes if n.name == node.name)
    with graph.module.graph.inserting_before(node):
        clone = graph.module.graph.call_function(torch.ops.aten.clone.default, (node.args[0],))
    fxq.core.ir.inherit_meta(clone, node, fxq.core.ir.example_value(node.args[0]))
    node.update_arg(0, clone)
    run_passes(graph, (ToQdq(),))
    assert graph.remarks["blocks.0.up"] == [
        "not lowered: fxq.dual_scale_linear.default does not read a quantize of its own"
    ]


def test_a_merged_product_is_left_and_says_so():
    q = fxq.quantize(siblings("").eval(), [rows(40, 96)], recipe(), progress=False)
    graph = run_passes(QuantGraph(q, Stage.FROZEN).fork(), (MergeLinears(), ToQdq()))
    wanted = "not lowered: fxq.dual_scale_linear.default does not read a quantize of its own"
    assert graph.remarks["blocks.0.q"][-1] == wanted


def test_layers_whose_order_was_folded_gather_nothing():
    x = rows(40, 96)
    chosen = dataclasses.replace(recipe(), rules=(fxq.Rule("*", fxq.Scheme(weight_bits=8)),))
    q = fxq.quantize(Chain().eval(), [x], chosen, progress=False)
    graph = run_passes(QuantGraph(q, Stage.FROZEN).fork(), (FoldPermutations(), ToQdq()))
    assert relative_error(q, graph.module, x) < 1e-5
    assert kinds(graph)["aten.index_select.default"] == 1
    assert kinds(graph)["aten.slice.Tensor"] == 2


class Chain(nn.Module):
    """Two linears with a GELU between; both have outlier channels, those of the second can be folded into the first."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 9))])
        with torch.no_grad():
            for linear in (self.blocks[0][0], self.blocks[0][2]):
                linear.weight[:, 5:90:11] *= 8

    def forward(self, x):
        return self.blocks[0](x)


def test_the_frozen_graph_is_not_changed_and_lowering_twice_changes_nothing():
    q = quantized()
    before = str(q.graph), q(X)
    graph = lowered(q)
    assert str(q.graph) == before[0]
    assert torch.equal(q(X), before[1])
    once, remarks = str(graph.module.graph), dict(graph.remarks)
    run_passes(graph, (ToQdq(),))
    assert (str(graph.module.graph), graph.remarks) == (once, remarks)
    assert graph.log[-1][:2] == ("ToQdq", 0)


def test_only_a_frozen_graph_is_lowered():
    with pytest.raises(PassError, match="ToQdq needs a FROZEN graph, this one is TRACED"):
        run_passes(trace(toy(), (X,)), (ToQdq(),))
