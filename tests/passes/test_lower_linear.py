import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq import numerics
from fxq.capture.trace import trace
from fxq.core.config import Scheme
from fxq.core.graph import graph_text, linear_sites
from fxq.core.ir import LayerPlan, Stage, get_tensor, plan_of, set_plan, stored_names
from fxq.core.method import LayerStatistics, LayerUpdate
from fxq.core.pipeline import run_passes
from fxq.job import Job
from fxq.passes import LoweringError, LowerLinear
from fxq.runtime.progress import Progress
from tests.core.test_verify import at
from tests.toys import recipe, relative_error, rows, toy


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_a_dual_scale_layer_computes_the_unpermuted_float_simulation(bits, bias):
    model, x = toy(bias=bias), rows(40, 96)
    q = fxq.quantize(model, [x], recipe(bits))
    row = {r.layer: r for r in fxq.summary(q).rows}["blocks.0.up"]
    assert row.outliers == 32
    layer = "blocks.0.up"
    perm = get_tensor(q, f"{layer}.perm").long()
    stored = get_tensor(q, f"{layer}.weight")
    integers = numerics.unpack_int4(stored) if bits == 4 else stored
    scale, x_scale, zero = (get_tensor(q, f"{layer}.{n}") for n in ("weight_scale", "input_scale", "input_zero_point"))
    weight = numerics.dequantize_weight(integers, scale, 64)[:, perm.argsort()]
    x_hat = numerics.dequantize_input(numerics.quantize_input(x[:, perm], x_scale, zero, 64, 8), x_scale, zero, 64)
    simulated = F.linear(x_hat[:, perm.argsort()], weight, model.blocks[0].up.bias)
    integer = fxq.kernels.quantize_act(x, perm.int(), x_scale, zero, 64, 8)
    offset = get_tensor(q, f"{layer}.offset")
    got = fxq.kernels.dual_scale_linear(integer, stored, scale, x_scale, offset, 64, bits, torch.float32)
    torch.testing.assert_close(got, simulated, atol=1e-4, rtol=1e-5)


def with_update(weight, zero=0):
    """A traced graph of one linear whose integers are given."""
    outputs, width = weight.shape
    graph = trace(nn.Sequential(nn.Linear(width, outputs, bias=False)).eval(), (rows(2, width),))
    plan = LayerPlan(layer="0", in_features=width, out_features=outputs, scheme=Scheme())
    set_plan(next(linear_sites(graph.module)).node, plan)
    ends = torch.zeros(width)
    seen = torch.zeros(1, width)
    graph.adopt({"0": LayerStatistics(low=ends, high=ends, rows=seen, chunks=torch.zeros(1), seen=1)})
    graph.updates["0"] = LayerUpdate(
        weight=weight,
        weight_scale=torch.ones(1, outputs),
        input_scale=torch.ones(1),
        input_zero_point=torch.tensor([zero], dtype=torch.int32),
    )
    return graph


def test_given_integers_are_what_runs():
    weight = torch.tensor([[1, -2, 3], [0, 5, -7]], dtype=torch.int8)
    graph = run_passes(with_update(weight, zero=11), (LowerLinear(),))
    x = torch.tensor([[1.0, 2.0, -3.0], [7.0, 0.0, 1.0]])
    assert torch.equal(graph.module(x), x @ weight.float().T)


def test_a_layer_that_could_overflow_is_refused():
    graph = with_update(torch.zeros(1, 2**17, dtype=torch.int8))
    with pytest.raises(LoweringError, match="layer 0: 131072 inputs can overflow the int32 accumulator"):
        run_passes(graph, (LowerLinear(),))


@pytest.mark.parametrize(("weight_scale", "fits"), [(1.0, True), (100.0, True), (1e6, False), (torch.nan, False)])
def test_outlier_scales_far_from_the_normal_ones_are_refused(weight_scale, fits):
    graph = with_update(torch.zeros(2, 96, dtype=torch.int8))
    (node,) = (site.node for site in linear_sites(graph.module))
    set_plan(node, dataclasses.replace(plan_of(node), outliers=tuple(range(32))))
    graph.updates["0"] = dataclasses.replace(
        graph.updates["0"],
        weight_scale=torch.tensor([[1.0, 1.0], [1.0, weight_scale]]),
        input_scale=torch.ones(2),
        input_zero_point=torch.zeros(2, dtype=torch.int32),
    )
    if fits:
        assert torch.equal(run_passes(graph, (LowerLinear(),)).module(rows(2, 96)), torch.zeros(2, 2))
    else:
        with pytest.raises(LoweringError, match=r"layer 0: outlier scales are .* at most .* set dual_scale to false"):
            LowerLinear().run(graph)


def lowered(model, x, chosen):
    graph, job = trace(model, (x,)), Job(chosen, Progress(False))
    job.plan(graph)
    job.calibrate(graph, [(x,)])
    job.choose_integers(graph)
    return run_passes(graph, (LowerLinear(),))


def test_a_linear_in_float64_computes_in_float32_between_casts():
    graph = lowered(nn.Sequential(nn.Linear(64, 3)).double().eval(), rows(9, 64).double(), recipe())
    called = [(str(n.target), n.meta["val"].dtype) for n in graph.module.graph.nodes if n.op == "call_function"]
    assert called == [
        ("aten.to.dtype", torch.float32),
        ("fxq.quantize_act.default", torch.int8),
        ("fxq.dual_scale_linear.default", torch.float32),
        ("aten.to.dtype", torch.float64),
    ]
    (carrier,) = (node for node in graph.module.graph.nodes if plan_of(node))
    assert carrier.target == fxq.kernels.dual_scale_linear.definition


@pytest.mark.parametrize("per_token", [False, True])
def test_a_layer_stores_what_its_scheme_asks_for_and_no_float_weight_is_read(per_token):
    graph = lowered(toy(), rows(9, 96), recipe(per_token=per_token))
    read = {str(node.target) for node in graph.module.graph.nodes if node.op == "get_attr"}
    stored = {"weight_int" if name == "weight" else name for name in stored_names(graph.plans["blocks.0.up"])}
    assert {name.removeprefix("blocks.0.up.") for name in read if name.startswith("blocks.0.up.")} == stored
    assert {name for name in read if name.startswith("head")} == {"head.weight", "head.bias"}
    if per_token:
        assert torch.equal(get_tensor(graph.module, "blocks.0.up.offset"), toy().blocks[0].up.bias)


def test_a_layer_of_two_calls_is_stored_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x):
            return self.fc(torch.tanh(self.fc(x)))

    q = fxq.quantize(Twice().eval(), [rows(9, 64)], recipe(), progress=False)
    products = [n for n in q.graph.nodes if n.target == fxq.kernels.dual_scale_linear.definition]
    assert len(products) == 2 and products[0].args[1].target == products[1].args[1].target == "fc.weight"
    assert products[0].meta["custom"] == products[1].meta["custom"]


def test_plans_move_to_the_gemm_and_its_notes_stay():
    graph = at(Stage.LOWERED)
    nodes = [node for node in graph.module.graph.nodes if plan_of(node)]
    assert [(plan_of(n).layer, str(n.target)) for n in nodes] == [
        ("blocks.0.up", "fxq.dual_scale_linear.default"),
        ("blocks.0.down", "fxq.dual_scale_linear.default"),
        ("head", "aten.linear.default"),
    ]
    assert nodes[0].meta["val"].shape == (40, 64) and nodes[0].meta["nn_module_stack"]


class Raw(nn.Module):
    """Weights that are parameters of their own, one through a cast."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(32, 64) / 8)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.cast = nn.Linear(32, 48)

    def forward(self, x):
        y = F.linear(x, self.w1)
        y = self.attention(y, y, y, need_weights=False)[0]
        return F.linear(y, self.cast.weight.to(y.dtype), self.cast.bias.to(y.dtype))


def test_weights_that_are_no_linear_module_are_quantized(tmp_path):
    model, x = Raw().eval(), rows(2, 9, 64)
    model.cast.to(torch.bfloat16)
    q = fxq.quantize(model, [x], recipe())
    layers = [row.layer for row in fxq.summary(q).rows if row.quantized]
    assert layers == ["w1", "attention.in_proj_weight", "attention.out_proj", "cast"]
    assert relative_error(model, q, x) < 0.05
    assert "aten.to.dtype" not in graph_text(q)
    assert torch.equal(fxq.load(fxq.save(q, tmp_path / "b"))(x), q(x))


def test_a_bare_linear_is_a_model():
    model, x = nn.Linear(64, 33).eval(), rows(5, 64)
    q = fxq.quantize(model, [x], recipe())
    assert relative_error(model, q, x) < 0.02 and fxq.summary(q).facts["never_called"] == []
