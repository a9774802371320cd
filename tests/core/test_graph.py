import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.capture.trace import trace
from fxq.core.graph import (
    argument_names,
    arguments,
    drop_unread_attributes,
    graph_text,
    in_order,
    linear_sites,
    set_arguments,
    sharing_conflicts,
    unused_tensors,
)
from fxq.core.ir import LayerPlan, set_plan
from tests.toys import recipe, relative_error, rows, toy

LINEAR = torch.ops.aten.linear.default


class Cast(nn.Module):
    """A linear on cast parameters, one without a bias, and one whose bias is computed."""

    def __init__(self):
        super().__init__()
        self.cast, self.plain, self.made = nn.Linear(8, 4).double(), nn.Linear(8, 4, bias=False), nn.Linear(8, 4)

    def forward(self, x):
        y = F.linear(x, self.cast.weight.float(), self.cast.bias.float())
        return y + self.plain(x) + F.linear(x, self.made.weight, self.made.bias * 2)


def traced(model, width=8):
    return trace(model.eval(), (rows(3, width),)).module


def test_linears_are_found_with_their_parameters_behind_casts():
    model = Cast()
    module = traced(model)
    sites = {site.weight_name: site for site in linear_sites(module)}
    cast, plain, made = sites["cast.weight"], sites["plain.weight"], sites[None]
    assert (cast.layer, cast.bias_name) == ("cast", "cast.bias") and (plain.layer, plain.bias_name) == ("plain", None)
    assert torch.equal(cast.weight(module), model.cast.weight) and torch.equal(cast.bias(module), model.cast.bias)
    assert plain.bias(module) is None and not plain.weight(module).requires_grad
    assert made.layer == made.node.name and made.bias_name is None


def test_arguments_are_read_by_name_with_their_defaults():
    module = traced(nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)))
    norm = next(node for node in module.graph.nodes if node.target == torch.ops.aten.layer_norm.default)
    named = arguments(norm)
    assert list(named) == list(argument_names(norm.target)) and named["normalized_shape"] == [4]
    assert named["eps"] == 1e-5 and named["input"] is norm.args[0]


def test_arguments_are_replaced_by_name_wherever_they_were_given():
    module = traced(nn.Linear(8, 4))
    (site,) = linear_sites(module)
    x, weight, bias = site.node.args
    site.node.args, site.node.kwargs = (x, weight), {"bias": bias}
    set_arguments(site.node, weight=x, bias=None)
    assert site.node.args == (x, x) and site.node.kwargs == {"bias": None}
    assert in_order(LINEAR, arguments(site.node)) == (x, x, None)


def test_arguments_in_order_leave_out_other_names_and_miss_none():
    assert in_order(LINEAR, {"bias": 3, "input": 1, "color": 5, "weight": 2}) == (1, 2, 3)
    with pytest.raises(KeyError, match="bias"):
        in_order(LINEAR, {"input": 1, "weight": 2})


def test_tensors_that_nothing_reads_are_listed_and_their_nodes_dropped():
    module = traced(Cast())
    assert unused_tensors(module) == []
    for site in list(linear_sites(module)):
        if site.layer == "cast":
            set_arguments(site.node, weight=site.node.args[0], bias=None)
    before = len(module.graph.nodes)
    drop_unread_attributes(module.graph)
    assert before - len(module.graph.nodes) == 4  # two parameters and their casts
    assert unused_tensors(module) == ["cast.weight", "cast.bias"]


def test_the_text_of_a_graph_has_a_line_a_node_with_the_layers_plan():
    module = traced(toy(), 96)
    site = next(linear_sites(module))
    set_plan(site.node, LayerPlan(layer="blocks.0.up", in_features=96, out_features=64, reason="why not"))
    lines = graph_text(module).splitlines()
    assert len(lines) == len(module.graph.nodes)
    assert [line.split("#")[1].strip() for line in lines if "#" in line] == ["blocks.0.up: kept: why not"]


class Shared(nn.Module):
    """One weight in several places; ``how`` says which."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64, bias=how != "plain")
        self.b.weight = self.a.weight
        if how == "plain":
            self.a.bias = None
        if how == "bias too":
            self.b.bias = self.a.bias
        if how == "two biases":
            self.b.bias.data += 3
        if how == "own offset":
            self.b = self.a
            self.a.offset = nn.Parameter(torch.full((64,), 5.0))

    def forward(self, x):
        y = self.b(torch.tanh(self.a(x)))
        if self.how == "read elsewhere":
            y = y + self.a.weight.sum(0)
        return y + self.a.offset if self.how == "own offset" else y


@pytest.mark.parametrize("how", ["plain", "bias too"])
def test_a_weight_used_twice_is_stored_once(how):
    model, x = Shared(how).eval(), rows(30, 64)
    q = fxq.quantize(model, [x], recipe())
    (row,) = fxq.summary(q).rows
    assert row.quantized and row.layer in ("a", "b")  # torch.export chooses one of the names
    assert relative_error(model, q, x) < 0.03
    assert [name for name, b in q.named_buffers() if b.dtype == torch.int8] == [f"{row.layer}.weight"]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("two biases", "its weight is shared by linears with different biases"),
        ("read elsewhere", "its weight is also read by sum"),
        ("own offset", r"the model has a tensor of its own named [ab]\.offset"),
    ],
)
def test_a_weight_that_integers_cannot_replace_is_kept_with_the_reason(how, reason):
    model, x = Shared(how).eval(), rows(30, 64)
    q = fxq.quantize(model, [x], recipe())
    (row,) = fxq.summary(q).rows
    assert not row.quantized
    assert re.match(reason, row.reason)
    assert torch.equal(q(x), model(x))


@pytest.mark.parametrize("how", ["plain", "bias too", "two biases", "read elsewhere", "own offset"])
def test_conflicts_are_told_before_any_work(how):
    module = traced(Shared(how), 64)
    conflicts = sharing_conflicts(module, ("offset",))
    assert bool(conflicts) == (how not in ("plain", "bias too"))
    if how == "own offset":
        assert not sharing_conflicts(module, ("perm",))


class Tied(nn.Module):
    """An embedding that is also the last linear."""

    def __init__(self):
        super().__init__()
        self.embed, self.last = nn.Embedding(50, 64), nn.Linear(64, 50, bias=False)
        self.middle = nn.Linear(64, 64)
        self.last.weight = self.embed.weight

    def forward(self, index):
        return self.last(self.middle(self.embed(index)))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tied_embedding_is_kept_and_its_neighbours_quantized(bits):
    model, index = Tied().eval(), torch.arange(23)
    q = fxq.quantize(model, [index], recipe(bits))
    (kept,), (quantized,) = fxq.summary(q).kept, fxq.summary(q).quantized
    assert quantized.layer == "middle" and kept.reason == "its weight is also read by embedding"
    assert relative_error(model, q, index) < 0.3
