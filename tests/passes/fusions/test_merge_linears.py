import operator
from collections import Counter

import pytest
import torch
from torch import nn

import fxq
from fxq import kernels
from fxq.core.ir import QuantGraph, Stage, get_tensor, plan_of, put_tensor
from fxq.core.pipeline import run_passes
from fxq.passes.fusions.merge_linears import MergeLinears, joint_name
from fxq.passes.match.blocks import block_of
from tests.toys import recipe, rows, wan_rollout

QUANTIZE, LINEAR = kernels.quantize_act.definition, kernels.dual_scale_linear.definition
SINGLE = {"dual_scale": False}
INPUTS = "the quantized inputs differ in scales or outliers, or by a write in between"


class Siblings(nn.Module):
    """Three linears on one input in a block; ``how`` says what happens around them."""

    def __init__(self, how=""):
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList([nn.ModuleDict({n: nn.Linear(64, w) for n, w in (("q", 64), ("k", 32), ("v", 7))})])

    def forward(self, x):
        q, k, v = (self.blocks[0][name] for name in "qkv")
        if self.how == "write between":
            x = x.clone()
            a = q(x)
            x[:, 3:].mul_(0.5)
            return a, k(x), v(x)
        if self.how == "write elsewhere":
            x, y = x.clone(), x.clone()
            a = q(x)
            y[:, 3:].mul_(0.5)
            return a, k(x), v(x), y
        if self.how == "twice":
            return q(x), q(torch.tanh(x)), k(x), v(x)
        if self.how == "views":
            a = torch.ops.aten.transpose.int(q(x), 1, 2)
            b = torch.ops.aten.view.default(k(x), [x.shape[0], 9 * 32])
            return torch.ops.aten.contiguous.default(a).sum(), b, v(x).transpose(0, 1)
        return q(x), k(x), v(x)


def frozen(how="", bits=8, **options):
    """A quantized module, its frozen graph in a fork, and inputs."""
    torch.manual_seed(1)
    x = rows(2, 9, 64)
    module = fxq.quantize(Siblings(how).eval(), [x], recipe(bits, **{**SINGLE, **options}), progress=False)
    return module, QuantGraph(module, Stage.FROZEN).fork(), x


def merged(graph, times=1):
    return run_passes(graph, (MergeLinears(),) * times)


def count(module):
    return Counter(node.target for node in module.graph.nodes)


def rescale(graph, layer, factor=1.5):
    name = f"blocks.0.{layer}.input_scale"
    put_tensor(graph.module, name, get_tensor(graph.module, name) * factor)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("times", [1, 2])
def test_three_linears_become_one_with_the_same_results(bits, times):
    module, graph, x = frozen(bits=bits)
    merged(graph, times)
    assert count(graph.module)[LINEAR] == count(graph.module)[QUANTIZE] == 1
    for batch in (x, rows(5, 9, 64, seed=3), x[:1]):
        for want, got in zip(module(batch), graph.module(batch), strict=True):
            assert torch.equal(want, got) and got.is_contiguous()
    assert sorted(name for name, _ in graph.module.named_buffers()) == [
        "blocks.0.q.input_scale",
        "blocks.0.q.input_zero_point",
        "blocks.0.q_k_v.offset",
        "blocks.0.q_k_v.weight",
        "blocks.0.q_k_v.weight_scale",
    ]


def test_a_plan_lies_on_the_part_with_a_remark():
    module, graph, _ = frozen()
    plans = QuantGraph(module).plans
    merged(graph)
    parts = {plan_of(n).layer: n for n in graph.module.graph.nodes if plan_of(n) is not None}
    assert graph.plans == plans and all(node.target is operator.getitem for node in parts.values())
    assert parts["blocks.0.k"].meta["val"].shape[-1] == 32
    assert graph.remarks == {
        "blocks.0.q": ["one GEMM with blocks.0.k, blocks.0.v"],
        "blocks.0.k": ["one GEMM with blocks.0.q, blocks.0.v"],
        "blocks.0.v": ["one GEMM with blocks.0.q, blocks.0.k"],
    }


def test_a_linear_with_another_input_scale_stays_apart():
    _, graph, x = frozen()
    rescale(graph, "k")
    want = graph.module(x)
    merged(graph)
    assert count(graph.module)[LINEAR] == count(graph.module)[QUANTIZE] == 2
    assert all(map(torch.equal, want, graph.module(x)))
    assert graph.remarks["blocks.0.q"] == ["one GEMM with blocks.0.v"]
    assert graph.remarks["blocks.0.k"] == [f"not one GEMM with blocks.0.q, blocks.0.v: {INPUTS}"]


def test_linears_of_other_bits_share_the_quantize_only():
    torch.manual_seed(1)
    x, chosen = rows(2, 9, 64), recipe(8, **SINGLE)
    scheme = fxq.Scheme(weight_bits=4, dual_scale=False)
    chosen = fxq.Recipe(
        name="mixed", rules=(fxq.Rule("*.q", scheme), *chosen.rules), methods=chosen.methods, weighting="uniform"
    )
    module = fxq.quantize(Siblings().eval(), [x], chosen, progress=False)
    graph = merged(QuantGraph(module, Stage.FROZEN).fork())
    assert (count(graph.module)[QUANTIZE], count(graph.module)[LINEAR]) == (1, 2)
    assert all(map(torch.equal, module(x), graph.module(x)))
    assert graph.remarks["blocks.0.q"] == ["not one GEMM with blocks.0.k, blocks.0.v: bits or dtype differ"]


@pytest.mark.parametrize(
    ("how", "quantizes", "linears", "remark"),
    [
        ("write between", 2, 2, ""),  # the capture has made two values of what is written
        ("write elsewhere", 1, 1, "one GEMM with blocks.0.k, blocks.0.v"),
        ("twice", 2, 3, "not one GEMM with blocks.0.k, blocks.0.v: its weight is used at several places"),
    ],
)
def test_what_happens_around_linears_is_respected(how, quantizes, linears, remark):
    module, graph, x = frozen(how)
    for name in ("input_scale", "input_zero_point"):
        for layer in "kv":
            get_tensor(module, f"blocks.0.{layer}.{name}").copy_(get_tensor(module, f"blocks.0.q.{name}"))
    merged(graph)
    assert (count(graph.module)[QUANTIZE], count(graph.module)[LINEAR]) == (quantizes, linears)
    assert all(map(torch.equal, module(x), graph.module(x)))
    assert graph.remarks.get("blocks.0.q", [""]) == [remark]
    assert graph.remarks["blocks.0.v"] == [f"one GEMM with blocks.0.{'q, blocks.0.k' if linears == 1 else 'k'}"]


def test_a_model_that_reads_memory_by_strides_is_refused_before_the_work():
    class Strided(Siblings):
        def forward(self, x):
            return torch.as_strided(self.blocks[0]["q"](x), (3, 2), (2, 1)).clone()

    with pytest.raises(fxq.TraceError, match=r"could not be saved: .*as_strided"):
        fxq.quantize(Strided("").eval(), [rows(2, 9, 64)], recipe(8), progress=False)


def test_readers_that_need_dense_memory_still_run():
    module, graph, x = frozen("views")
    assert count(module)[torch.ops.aten.view.default] == 1
    merged(graph)
    assert count(graph.module)[torch.ops.aten.view.default] == 0
    for want, got in zip(module(x), graph.module(x), strict=True):
        assert torch.equal(want, got) and want.stride() == got.stride()
        assert got.untyped_storage().nbytes() == got.nbytes, "a part that is returned keeps its neighbours in memory"
    nodes = list(graph.module.graph.nodes)
    copies = [n for n in nodes if n.target is torch.ops.aten.clone.default and nodes[-1] in n.users]
    assert copies and all(nodes.index(n) == nodes.index(n.args[0]) + 1 for n in copies), "copied at the end of the call"


@pytest.mark.parametrize(
    ("layers", "name"),
    [
        (["a.0.q", "a.0.k"], "a.0.q_k"),
        (["a.0.to_q", "a.0.add.to_k"], "a.0.to_q_add_to_k"),
        (["w1", "w2"], "w1_w2"),
        (["a.taken", "a.x"], "a.taken_x_"),
        (["b.0", "b.0.y"], "b.0_0_y"),
    ],
)
def test_the_joint_name_is_readable_and_free(layers, name):
    root = nn.Module()
    graph = torch.fx.Graph()
    put_tensor(root, "a.taken_x.weight", torch.ones(1))
    graph.output(graph.get_attr("a.taken_x.weight"))
    assert joint_name(torch.fx.GraphModule(root, graph), layers) == name


@pytest.mark.parametrize(
    ("layer", "block"),
    [("blocks.3.ffn.0", "blocks.3"), ("a.b.12.q", "a.b.12"), ("0.q", "0"), ("text.2", ""), ("head.head", "")],
)
def test_the_block_of_a_layer(layer, block):
    assert block_of(layer) == block


def calls(rollout, module):
    """Results of a short rollout: prefixes grow, the text is empty after the first call."""
    with torch.no_grad(), rollout.using(module):
        return torch.cat([rollout.rollout(condition, draws) for condition, draws in rollout.batches])


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.float32), (8, torch.bfloat16)])
def test_a_rollout_of_the_merged_model_is_bit_equal(bits, dtype):
    rollout = wan_rollout(seeds=(1,))
    rollout.denoiser.to(dtype)
    module = fxq.quantize(rollout.denoiser, rollout, recipe(bits, **SINGLE), progress=False)
    graph = merged(QuantGraph(module, Stage.FROZEN).fork())
    assert (count(graph.module)[QUANTIZE], count(graph.module)[LINEAR]) == (9, 9)
    assert graph.remarks["blocks.0.cross_attn.k"] == ["one GEMM with blocks.0.cross_attn.v"]
    assert torch.equal(calls(rollout, module), calls(rollout, graph.module))
