"""In-place writes: every reader gets the value of its moment, in every form of the module."""

import dataclasses

import pytest
import torch
from torch import nn

import fxq
from fxq.capture.trace import TraceError, trace
from fxq.core import aliasing
from fxq.core.graph import linear_sites
from fxq.core.ir import QuantGraph, Stage
from fxq.core.verify import RuleError, check
from fxq.passes import share_inputs
from fxq.passes.methods.ranges import MinMax

RECIPE = fxq.Recipe(name="r", rules=(fxq.Rule("*", fxq.Scheme()),), methods=(MinMax(),), weighting="uniform")


class Block(nn.Module):
    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.ModuleDict({name: nn.Linear(64, 64) for name in ("q", "k", "v")})])
        self.run = run

    def forward(self, x):
        return self.run(self.blocks[0]["q"], self.blocks[0]["k"], self.blocks[0]["v"], x)


def base_behind_a_view(q, k, v, x):
    x = x + 0
    tokens = x.view(-1, 64)
    first = q(tokens)
    x.mul_(20)
    return first, k(tokens), v(tokens)


def view_of_a_base(q, k, v, x):
    x = x + 0
    first = q(x)
    x.view(-1, 64)[:, 3:9].mul_(20)
    return first, k(x), v(x)


def items(q, k, v, x):
    hidden = q(x)
    first = k(hidden)
    hidden[..., ::2] = 0
    return first, v(hidden)


def copied_over(q, k, v, x):
    hidden = q(x)
    first = k(hidden)
    hidden.copy_(x * 9)
    return first, v(hidden)


def indexed(q, k, v, x):
    hidden = x + 0
    first = q(hidden)
    hidden.index_put_((torch.tensor([0]),), torch.full((64,), 30.0))
    return first, k(hidden)


def masked(q, k, v, x):
    hidden = x + 0
    first = q(hidden)
    hidden.masked_fill_(hidden > 0, 15.0)
    return first, k(hidden)


def out_argument(q, k, v, x):
    hidden = x + 0
    first = q(hidden)
    torch.mul(hidden, 25, out=hidden)
    return first, k(hidden)


def residual(q, k, v, x):
    x = x * 1
    x += q(x)
    x += k(x)
    return x, v(x)


def part_of_a_merged_product(q, k, v, x):
    first, second = q(x), k(x)
    first.view(-1, 64)[:, 5:].mul_(-3)
    return first, second, v(first)


def own_chain(q, k, v, x):
    return q(x).relu_(), k(torch.nn.functional.silu(v(x), inplace=True))


def its_input(q, k, v, x):
    first = q(x)
    x.mul_(3)
    return first, k(x)


def its_input_through_a_view(q, k, v, x):
    first = q(x)
    x[1:].add_(4)
    return first, k(x), x


WRITES = [
    base_behind_a_view,
    view_of_a_base,
    items,
    copied_over,
    indexed,
    masked,
    out_argument,
    residual,
    part_of_a_merged_product,
    own_chain,
    its_input,
    its_input_through_a_view,
]


@pytest.mark.parametrize("run", WRITES)
@pytest.mark.parametrize("per_token", [False, True], ids=["static", "per_token"])
def test_each_reader_gets_the_value_of_its_moment(run, per_token, tmp_path):
    model = Block(run).eval()
    recipe = dataclasses.replace(RECIPE, rules=(fxq.Rule("*", fxq.Scheme(per_token=per_token)),))
    with torch.no_grad():
        q = fxq.quantize(model, [torch.randn(4, 8, 64) for _ in range(3)], recipe, progress=False)
        fxq.save(q, tmp_path / "b")
        x = torch.randn(3, 8, 64)
        mine = x.clone()
        want = model(mine)
        for module in (q, fxq.load(tmp_path / "b"), fxq.optimize(q)):
            given = x.clone()
            for a, b in zip(want, module(given), strict=True):
                assert (a - b).norm() < 0.06 * a.norm()
            assert torch.equal(given, mine), "the caller's tensor is written as eager writes it"


def test_what_calibration_saw_is_not_written_afterwards():
    model, x = Block(base_behind_a_view).eval(), torch.randn(4, 8, 64)
    q = fxq.quantize(model, [x], RECIPE, progress=False)
    scale = {name: float(q.get_buffer(f"blocks.0.{name}.input_scale")[0]) for name in ("q", "k")}
    assert 15 < scale["k"] / scale["q"] < 25


def test_linears_around_a_write_share_no_input():
    graph = trace(Block(base_behind_a_view).eval(), (torch.randn(4, 8, 64),))
    inputs = [site.node.args[0] for site in linear_sites(graph.module)]
    assert inputs[0] is not inputs[1]
    assert not share_inputs.input_groups(graph.module)  # nothing is planned yet


def filled_part_by_part(q, k, v, x):
    hidden = q(x)
    turned = torch.empty_like(hidden)
    turned[..., ::2] = -hidden[..., 1::2]
    turned[..., 1::2] = hidden[..., ::2]
    return k(turned)


@pytest.mark.parametrize("run", [own_chain, filled_part_by_part])
def test_writes_that_nobody_can_notice_stay_as_they_are(run):
    graph = trace(Block(run).eval(), (torch.randn(4, 8, 64),)).module.graph
    assert any(any(aliasing.written(node)) for node in graph.nodes)
    assert aliasing.read_around_writes(graph) == []


def test_a_graph_that_reads_around_a_write_breaks_a_rule():
    program = torch.export.export(Block(base_behind_a_view).eval(), (torch.randn(4, 8, 64),))
    graph = QuantGraph(program.module(check_guards=False), Stage.TRACED)
    with pytest.raises(
        RuleError, match=r"read around a write: mul_ at test_aliasing\.py:\d+ .* writes to what linear at"
    ):
        check(graph, "now")


def test_a_write_to_the_model_is_refused():
    model = Block(lambda q, k, v, x: q(x + model.cache.add_(1))).eval()
    model.register_buffer("cache", torch.zeros(64))
    with pytest.raises(TraceError, match="writes to buffer cache"):
        trace(model, (torch.randn(4, 64),))


def test_writes_by_keyword_and_into_lists_are_seen():
    graph = torch.fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    out = graph.call_function(torch.ops.aten.add.out, (a, b), {"out": b})
    each = graph.call_function(torch.ops.aten._foreach_add_.Scalar, ([a, b], 1))
    assert list(aliasing.written(out)) == [b]
    assert list(aliasing.written(each)) == [a, b]
    assert list(aliasing.written(graph.call_function(torch.ops.aten.add.Tensor, (a, b)))) == []
    assert aliasing.written_inputs(graph) == {a, b}
