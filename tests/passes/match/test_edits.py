import pytest
import torch
from torch import nn

from fxq.capture.trace import trace
from fxq.core.graph import graph_text
from fxq.core.ir import QuantGraph, Stage
from fxq.passes.match import edits, patterns
from fxq.passes.match.patterns import Unfit
from tests.toys import rows


def traced(forward, *args):
    """The graph of a function, its first dimension dynamic."""
    module = nn.Module()
    module.forward = forward
    shapes = tuple({0: torch.export.Dim.AUTO} for _ in args)
    return trace(module.eval(), args, None, shapes)


def targets(graph):
    return [str(node.target) for node in graph.module.graph.nodes if node.op == "call_function"]


def named(graph, name):
    (node,) = (node for node in graph.module.graph.nodes if node.name == name)
    return node


def test_tidying_drops_what_does_nothing_and_says_dtypes_plainly():
    def forward(x, y):
        x = torch.dropout(x.float(), 0.5, False)
        return x.to(torch.bfloat16), x.type_as(y), x.to(torch.float32, copy=True)

    graph = traced(forward, rows(3, 5), rows(3, 5).half())
    edits.tidy(graph)
    graph.module.recompile()
    assert targets(graph) == ["aten.to.dtype"] * 3
    assert [t.dtype for t in graph.module(rows(2, 5), rows(2, 5).half())] == [
        torch.bfloat16,
        torch.float16,
        torch.float32,
    ]


def test_a_value_that_something_else_reads_is_not_private():
    graph = traced(lambda x: (x.sin().cos(), x.sin().exp()), rows(3, 5))
    first, last = named(graph, "sin"), named(graph, "cos")
    edits.check_private(edits.between([last], [first]), [last], [first])
    graph = traced(lambda x: (y := x.sin(), y.cos().exp(), y.cos())[1:], rows(3, 5))
    result = named(graph, "exp")
    x = next(iter(graph.module.graph.nodes))
    with pytest.raises(Unfit, match="sin is also read by cos_1"):
        edits.check_private(edits.between([result], [x]), [result], [x])


def test_a_write_into_an_input_on_the_way_is_seen_through_views():
    class Writes(torch.nn.Module):
        def forward(self, x):
            x = x * 2
            y = x.sin()
            x[:, 1:].add_(1)
            return y.cos(), x

    # As torch.export gives it, and as bundles of old have it: fxq.capture.trace undoes the write.
    module = torch.export.export(Writes(), (rows(3, 5),)).module(check_guards=False)
    graph = QuantGraph(module, Stage.TRACED)
    source, result = named(graph, "mul"), named(graph, "cos")
    with pytest.raises(Unfit, match="add_ writes into what it reads"):
        edits.check_private(edits.between([result], [source]), [result], [source])


def test_erasing_takes_what_only_the_erased_read():
    graph = traced(lambda x: (x.sin().cos(), x.exp()), rows(3, 5))
    last = named(graph, "cos")
    last.replace_all_uses_with(named(graph, "exp"))
    edits.erase_unread(last)
    assert targets(graph) == ["aten.exp.default"], graph_text(graph.module)


def test_sizes_are_the_same_only_when_they_are_for_every_input():
    graph = traced(lambda x, y: (x * 2, y * 2), rows(3, 5), rows(3, 5))
    x, y = named(graph, "mul"), named(graph, "mul_1")
    assert patterns.same(patterns.shape_of(x), patterns.shape_of(x))
    assert not patterns.same(patterns.shape_of(x), patterns.shape_of(y))
    assert not patterns.same((3, 5), (3, 5, 1))
