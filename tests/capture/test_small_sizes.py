"""Sizes that torch.export assumes away are allowed where model and graph agree."""

import torch
from torch import nn
from torch.export import Dim

from fxq.calls.conditions import evaluator, holds
from fxq.capture.comparisons import compared_sizes
from fxq.capture.guards import Assumptions
from fxq.capture.small_sizes import final_conditions
from fxq.capture.trace import trace

X, Y = ["size", 0, 0], ["size", 1, 0]


def assumed(compared, conditions=()):
    class Shaped(nn.Module):
        def forward(self, x, y):
            return x + 1, y + 1

    call = torch.zeros(4, 3), torch.zeros(4, 3)
    program = torch.export.export(Shaped(), call, dynamic_shapes=({0: Dim.AUTO}, {0: Dim.AUTO}))
    nodes = [n for n in program.graph.nodes if n.op == "placeholder"]
    shapes = [[node.meta["val"].shape[0].node.expr, 3] for node in nodes]
    names = [str(shape[0]) for shape in shapes]
    found = Assumptions(dict(zip(names, (X, Y), strict=True)), dict.fromkeys(names, 2), list(conditions), shapes)
    found.compared = {names[i] for i in compared}
    return found, call


def allowed(conditions, x, y):
    leaves = torch.zeros(x, 3), torch.zeros(y, 3)
    return all(holds(evaluator(condition), leaves) for condition in conditions)


def test_a_size_that_no_code_compares_is_not_tried():
    def never(leaves):
        raise AssertionError("tried")

    found, leaves = assumed([])
    assert final_conditions(found, leaves, never) == []


def test_each_small_size_is_allowed_by_itself():
    found, leaves = assumed([0])
    conditions = final_conditions(found, leaves, lambda leaves: leaves[0].shape[0] == 0)
    assert [allowed(conditions, size, 4) for size in (0, 1, 2, 9)] == [True, False, True, True]
    conditions = final_conditions(found, leaves, lambda leaves: leaves[0].shape[0] == 1)
    assert [allowed(conditions, size, 4) for size in (0, 1, 2, 9)] == [False, True, True, True]
    assert final_conditions(found, leaves, lambda leaves: True) == []


def test_sizes_that_must_be_small_together_are_allowed_together():
    found, leaves = assumed([0, 1])
    conditions = final_conditions(found, leaves, lambda leaves: leaves[0].shape == leaves[1].shape)
    assert [allowed(conditions, *sizes) for sizes in ((0, 0), (1, 1), (5, 7), (0, 4), (4, 1))] == [1, 1, 1, 0, 0]


def test_a_condition_of_larger_sizes_is_lifted_where_a_small_one_is_right():
    found, leaves = assumed([0], [["!=", ["*", X, Y], Y]])
    conditions = final_conditions(found, leaves, lambda leaves: leaves[0].shape[0] == 1)
    assert allowed(conditions, 1, 4) and allowed(conditions, 3, 4) and not allowed(conditions, 0, 0)


class Cached(nn.Module):
    """Keys and values of one length, as its attention needs them, and a branch on whether there are any."""

    def forward(self, q, k, v):
        if k.shape[1] > 0:
            return nn.functional.scaled_dot_product_attention(q, k, v)
        return torch.zeros_like(q)


def test_empty_caches_are_tried_together():
    q, k, v = (torch.randn(2, length, 8) for length in (3, 5, 5))
    shapes = ({0: Dim.AUTO}, {0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO, 1: Dim.AUTO})
    module = trace(Cached().eval(), (q, k, v), None, shapes).module
    assert torch.equal(module(q, k[:, :1], v[:, :1]), Cached()(q, k[:, :1], v[:, :1]))
    with torch.no_grad():
        try:
            got = module(q, k[:, :0], v[:, :0])
        except ValueError as refused:
            assert "captured for" in str(refused)
        else:
            assert torch.equal(got, torch.zeros_like(q))


def test_comparisons_of_model_code_are_noted_and_torch_is_left_as_it_was():
    before = torch.SymInt.__eq__, torch.SymInt.__gt__, torch.SymInt.__bool__

    class Branch(nn.Module):
        def forward(self, x, y):
            return x + 1 if y.shape[0] == 1 else x * y.shape[1]

    call = torch.zeros(4, 3), torch.zeros(5, 3)
    with compared_sizes() as outer, compared_sizes() as found:
        program = torch.export.export(Branch(), call, dynamic_shapes=({0: Dim.AUTO}, {0: Dim.AUTO, 1: Dim.AUTO}))
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    assert {str(s) for s in found} == {str(placeholders[1].meta["val"].shape[0])}
    assert outer == set()
    assert before == (torch.SymInt.__eq__, torch.SymInt.__gt__, torch.SymInt.__bool__)
