"""Walks and comparisons that fusion passes recognise patterns by."""

import pytest
import torch
from torch import nn

from fxq.capture.trace import trace
from fxq.core.ir import QuantGraph
from fxq.passes.match.patterns import (
    ATEN,
    CASTS,
    FREE,
    RESHAPES,
    Unfit,
    ahead,
    back,
    calls,
    exact_source,
    frames_of,
    is_call,
    only_user,
    operands,
    partner,
    readers,
    same,
    shape_of,
    shown,
    source,
    terms,
    value_of,
)
from tests.toys import rows


class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def graph_of(function, *args, **options):
    return trace(Of(function).eval(), args, **options)


def inputs(graph):
    return graph.module.graph.find_nodes(op="placeholder")


def test_calls_are_found_by_their_target_in_graph_order():
    graph = graph_of(lambda x: (x.exp() + x.tanh()).exp(), rows(2, 3))
    found = calls(graph, ATEN.exp.default, ATEN.tanh.default)
    assert [node.target for node in found] == [ATEN.exp.default, ATEN.tanh.default, ATEN.exp.default]
    assert is_call(found[0], ATEN.exp.default) and not is_call(found[0], ATEN.tanh.default)
    assert not is_call(inputs(graph)[0], "x") and not is_call(3, ATEN.exp.default)


def test_a_value_that_was_not_recorded_is_unfit():
    graph = graph_of(lambda x: x.exp(), rows(2, 3))
    (node,) = calls(graph, ATEN.exp.default)
    assert value_of(node).shape == shape_of(node) == (2, 3)
    node.meta.pop("val")
    with pytest.raises(Unfit, match="no value is recorded for exp"):
        shape_of(node)


def test_sizes_that_are_equal_in_the_example_alone_are_not_the_same():
    dims = ({0: torch.export.Dim("a")}, {0: torch.export.Dim("b")})
    program = torch.export.export(Of(lambda x, y: (x + 1, y + 1)), (rows(4, 3), rows(4, 3)), dynamic_shapes=(dims,))
    graph = QuantGraph(program.module(check_guards=False))
    x, y = inputs(graph)
    assert same(shape_of(x), shape_of(x)) and not same(shape_of(x), shape_of(y))
    assert same((4, 3), [4, 3]) and not same((4, 3), (4,)) and not same((4, 3), (3, 4))
    assert shown((4, 3)) == "[4, 3]" and shown(()) == "[]"


@pytest.mark.parametrize(
    ("function", "both"),
    [
        (lambda x, y: x + y, True),
        (lambda x, y: x * y, True),
        (lambda x, y: torch.add(x, y, alpha=2), False),
        (lambda x, y: x + 2 + y.sum() * 0, False),
    ],
)
def test_both_orders_of_two_tensors_are_tried_and_none_of_a_scaled_sum(function, both):
    graph = graph_of(function, rows(2, 3), rows(2, 3))
    x, y = inputs(graph)
    node = next(user for user in x.users)
    assert list(operands(node)) == ([(x, y), (y, x)] if both else [])
    assert partner(node, x) is (y if both else None)
    assert terms(node)[0] is x


def test_a_value_is_not_its_own_partner():
    graph = graph_of(lambda x: x * x, rows(2, 3))
    (node,) = calls(graph, ATEN.mul.Tensor)
    assert partner(node, inputs(graph)[0]) is None


def walked(x):
    return x.to(torch.bfloat16).unflatten(1, (2, 3)).float().exp()


def test_walks_go_through_the_given_operators_only():
    graph = graph_of(walked, rows(2, 6))
    (x,) = inputs(graph)
    (exp,) = calls(graph, ATEN.exp.default)
    last = exp.args[0]
    assert list(back(last, FREE))[-1] is source(last, FREE) is x and len(list(back(last, FREE))) == 4
    assert source(last, CASTS).target == ATEN.unflatten.int and source(last, RESHAPES) is last
    assert list(ahead(x, FREE))[-1] is last and list(ahead(x, RESHAPES)) == [x]
    assert list(readers(x)) == [(exp, last)]


def test_a_walk_ahead_stops_where_there_are_two_readers():
    graph = graph_of(lambda x: (x.float().exp(), x.double()), rows(2, 6).half())
    (x,) = inputs(graph)
    assert only_user(x) is None and list(ahead(x, FREE)) == [x]
    cast = calls(graph, ATEN.exp.default)[0].args[0]
    assert only_user(cast).target == ATEN.exp.default


@pytest.mark.parametrize(
    ("dtypes", "behind"),
    [
        ((torch.bfloat16, torch.float32), True),
        ((torch.float16, torch.float32), True),
        ((torch.float32, torch.bfloat16), False),
        ((torch.float16, torch.bfloat16), False),
        ((torch.int32, torch.float32), False),
    ],
)
def test_only_casts_that_lose_nothing_are_looked_behind(dtypes, behind):
    before, after = dtypes
    graph = graph_of(lambda x: x.to(after).exp(), torch.ones(2, 3, dtype=before))
    (exp,) = calls(graph, ATEN.exp.default)
    assert exact_source(exp.args[0]) is (inputs(graph)[0] if behind else exp.args[0])


@pytest.mark.parametrize(
    ("vector", "view", "frames"),
    [
        ((2, 1, 8), (2, 12, 8), (2, 1, 8)),
        ((2, 12, 8), (2, 12, 8), (2, 12, 8)),
        ((2, 3, 1, 8), (2, 3, 4, 8), (2, 3, 8)),
        ((2, 1, 1, 8), (2, 3, 4, 8), (2, 1, 8)),
    ],
)
def test_a_vector_varies_from_frame_to_frame_at_most(vector, view, frames):
    graph = graph_of(lambda v, r: v * r, rows(*vector), rows(*view))
    assert frames_of(*inputs(graph), (2, 12, 8)) == frames


@pytest.mark.parametrize(
    ("vector", "view", "reason"),
    [
        ((2, 3, 4, 8), (2, 3, 4, 8), r"v is \[2, 3, 4, 8\]: expected \[2, 1, 1, 8\] or \[2, 3, 1, 8\]"),
        ((1, 1, 8), (2, 12, 8), r"v is \[1, 1, 8\]: expected \[2, 1, 8\] or \[2, 12, 8\]"),
        ((2, 1, 8), (2, 8), r"r is \[2, 8\]: expected \[2, 12, 8\] or its frames"),
        ((2, 1, 4), (2, 24, 4), r"r is \[2, 24, 4\]: expected \[2, 12, 8\] or its frames"),
    ],
)
def test_a_vector_that_varies_otherwise_is_unfit_with_both_shapes(vector, view, reason):
    graph = graph_of(lambda x: x + 1, rows(2, 12, 8))
    (x,) = inputs(graph)
    nodes = []
    for name, shape in (("v", vector), ("r", view)):
        with graph.module.graph.inserting_before(x):
            nodes.append(graph.module.graph.placeholder(name))
        nodes[-1].meta["val"] = torch.empty(shape)
    with pytest.raises(Unfit, match=reason):
        frames_of(*nodes, (2, 12, 8))


SIZED = {
    "times a size": lambda x, w: x * x.shape[0],
    "a size times": lambda x, w: x.shape[0] * (x * w),
    "plus a multiple": lambda x, w: x + (x * w) * (x.shape[0] // 3),
    "by a sum of sizes": lambda x, w: (x * w) * (1 + x.shape[0]),
    "of all sizes": lambda x, w: (x * w) * max(x.shape[0], x.shape[1]),
}


@pytest.mark.parametrize("name", SIZED)
def test_sizes_are_no_operands(name):
    free = {"args": ({0: torch.export.Dim("n", min=2)}, None)}
    graph = graph_of(SIZED[name], rows(6, 8), rows(8), dynamic_shapes=free)
    products = calls(graph, ATEN.mul.Tensor)
    pairs = [pair for node in products for pair in operands(node)]
    assert all(isinstance(value_of(side), torch.Tensor) for pair in pairs for side in pair)
    assert len(pairs) < 2 * len(products) and any(not list(operands(node)) for node in products)
