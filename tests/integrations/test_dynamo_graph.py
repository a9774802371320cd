"""A graph of Dynamo: its linears, the copy of it, who may share integers, and what is put in the linears' place."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.core.ir import compiled_value
from fxq.core.layer import ASYMMETRIC, PER_TOKEN, STATIC
from fxq.integrations.binding import BackendError, bind
from fxq.integrations.dynamo_graph import (
    Site,
    check_readers,
    copy_graph,
    fake_inputs,
    find_sites,
    operands,
    replace,
    shared_inputs,
    source_name,
)
from tests.passes.test_share_inputs import model as siblings
from tests.toys import recipe, rows, toy


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def captured(model, *args):
    """(graph, inputs) as a backend gets them."""
    found = []

    def keep(gm, inputs):
        found.append((gm, inputs))
        return gm.forward

    torch.compile(model, backend=keep)(*args)
    (case,) = found
    return case


class Uses(nn.Module):
    """A bound linear whose parameters are used in another way, too."""

    def __init__(self, how):
        super().__init__()
        self.how, self.fc = how, nn.Linear(64, 64)

    def forward(self, x):
        w, b = self.fc.weight, self.fc.bias
        return {
            "linear": lambda: self.fc(x),
            "sum": lambda: self.fc(x) + w.sum(),
            "part": lambda: F.linear(x, w[:32]),
            "input": lambda: F.linear(w, x),
            "bias": lambda: F.linear(x, w, b * 2),
        }[self.how]()


def test_linears_are_found_with_the_places_of_their_parameters():
    model = toy()
    gm, inputs = captured(model, rows(6, 96))
    sites = find_sites(gm, inputs)
    assert [inputs[site.weight].shape for site in sites] == [(64, 96), (96, 64), (7, 96)]
    assert all(inputs[site.bias] is bias for site, bias in zip(sites, biases(model), strict=True))
    placeholders = gm.graph.find_nodes(op="placeholder")
    names = [source_name(placeholders[site.weight]) for site in sites]
    assert names == ["blocks.0.up.weight", "blocks.0.down.weight", "head.weight"]
    assert "" in [source_name(node) for node in placeholders]  # the model's input


def biases(model):
    return [model.blocks[0].up.bias, model.blocks[0].down.bias, model.head.bias]


def test_linears_on_computed_weights_are_no_sites():
    gm, inputs = captured(Uses("part"), rows(3, 64))
    assert find_sites(gm, inputs) == []


def test_constant_weights_and_linears_in_graphs_within_are_refused():
    gm, inputs = captured(Uses("linear"), rows(3, 64))
    outer = torch.fx.GraphModule(nn.Module(), torch.fx.Graph())
    outer.inner = gm
    with pytest.raises(BackendError, match="linears inside inner, a checkpoint or other function on functions"):
        find_sites(outer, [])
    root, graph = nn.Module(), torch.fx.Graph()
    root.w = nn.Parameter(torch.ones(2, 2))
    graph.output(graph.call_function(F.linear, (graph.placeholder("x"), graph.get_attr("w"))))
    with pytest.raises(BackendError, match="the weight of linear is a constant: turn off"):
        find_sites(torch.fx.GraphModule(root, graph), inputs)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("linear", None),
        ("sum", r"fc.weight is read by .*, not by a linear as its weight"),
        ("part", r"fc.weight is read by .*, not by a linear as its weight"),
        ("input", r"fc.weight is read by .*, not by a linear as its weight"),
        ("bias", r"the bias of fc.weight is computed by"),
    ],
)
def test_weights_of_layers_are_read_by_linears_alone(how, reason):
    model = Uses(how).eval()
    plain = Uses("linear").eval()
    bundle = fxq.quantize(plain, [rows(9, 64)], recipe(), progress=False)
    model.load_state_dict(plain.state_dict())
    gm, inputs = captured(model, rows(64, 64))
    binding = bind(model, bundle)
    if reason is None:
        check_readers(gm, inputs, binding)
    else:
        with pytest.raises(BackendError, match=reason):
            check_readers(gm, inputs, binding)


def test_a_copy_is_rewritten_on_its_own_and_keeps_the_sources():
    gm, inputs = captured(toy(), rows(6, 96))
    before = str(gm.graph)
    copied = copy_graph(gm)
    names = [source_name(node) for node in copied.graph.find_nodes(op="placeholder")]
    assert names == [source_name(node) for node in gm.graph.find_nodes(op="placeholder")]
    copied.graph.erase_node(next(iter(reversed(copied.graph.nodes))))
    assert str(gm.graph) == before
    assert [v.shape for v in fake_inputs(gm)] == [t.shape for t in inputs]


def graph_of(*steps):
    """A graph of linears ``a`` and ``b`` on one input with steps between them: targets, or names of methods."""
    graph = torch.fx.Graph()
    x, w, v = (graph.placeholder(name) for name in "xwv")
    graph.call_function(F.linear, (x, w), name="a")
    for target, *more in steps:
        (graph.call_method if isinstance(target, str) else graph.call_function)(target, (x, *more))
    graph.call_function(F.linear, (x, v), name="b")
    graph.output(x)
    return torch.fx.GraphModule(nn.Module(), graph)


class Layer:
    """Stands for a layer that quantizes its input in some way."""

    def __init__(self, way="same"):
        self.way = way

    def quantizes_as(self, other):
        return self.way == other.way


SITES = [Site("a", 1, None), Site("b", 2, None)]


@pytest.mark.parametrize(
    ("step", "shared"),
    [
        (None, True),
        ((torch.exp,), True),
        (("exp",), True),
        ((torch.ops.aten.exp.default,), True),
        (("mul_", 2), False),
        ((torch.ops.aten.mul_.Tensor, 2), False),
        ((operator.iadd, 2), False),
        ((operator.setitem, 0, 1), False),
        ((F.relu, True), False),
    ],
)
def test_integers_are_shared_unless_something_is_written_between(step, shared):
    gm = graph_of(*([] if step is None else [step]))
    assert shared_inputs(gm, SITES, [Layer(), Layer()]) == ([0, 0] if shared else [0, 1])


@pytest.mark.parametrize("layers", [(Layer(), Layer("another")), (None, Layer()), (Layer(), None)])
def test_layers_that_quantize_in_another_way_or_not_at_all_share_nothing(layers):
    assert shared_inputs(graph_of(), SITES, list(layers)) == [0, 1]


@pytest.mark.parametrize(
    ("operators", "options"),
    [(STATIC, {}), (PER_TOKEN, {"per_token": True}), (ASYMMETRIC, {"per_token": True, "asymmetric": True})],
    ids=["static", "per_token", "asymmetric"],
)
def test_operators_take_the_place_of_linears_and_compute_the_same(operators, options):
    model = siblings().eval()
    x = rows(6, 96)
    bundle = fxq.quantize(model, [x], recipe(**options), progress=False)
    binding = bind(model, bundle)
    gm, inputs = captured(model, x)
    sites = find_sites(gm, inputs)
    layers = [binding.find(inputs[site.weight]).layer for site in sites]
    layers[-1] = None  # it stays
    shared = shared_inputs(gm, sites, layers)
    tensors = operands(layers)
    replace(gm, sites, layers, shared, tensors)
    names = [str(node.target) for node in gm.graph.nodes if "fxq" in str(node.target)]
    assert names.count(str(operators.product.definition)) == len(sites) - 1
    assert names.count(str(operators.quantize.definition)) == len(set(shared[:-1])) < len(sites) - 1
    inside = gm.graph.find_nodes(op="placeholder")[len(inputs) :]
    assert [compiled_value(node) is tensor for node, tensor in zip(inside, tensors, strict=True)] == [True] * len(
        inside
    )
    with torch.no_grad():
        got, want = gm(*inputs, *tensors), bundle(x)
    for mine, theirs in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 0.02
