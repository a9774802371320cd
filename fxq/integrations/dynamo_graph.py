"""A graph that Dynamo captured: its linears, a copy to rewrite, and integer operators in the place of linears.

Dynamo keeps notes of its own on nodes (``example_value``, ``_dynamo_source``), which AOTAutograd reads.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxq.calls.captured import inherit_notes, notes_of
from fxq.core.ir import compiled_value, inherit_meta, set_compiled_input
from fxq.integrations.binding import BackendError, Binding
from fxq.integrations.swap import QuantizedLinear
from fxq.kernels import float8

_LINEARS = (torch.nn.functional.linear, torch.ops.aten.linear.default)
_IN_PLACE = {"setitem", *(name for name in dir(operator) if hasattr(operator, f"__{name}__") and name[0] == "i")}
_PATH = re.compile(r"\._(?:modules|parameters)\['([^']*)'\]")

Layers = Sequence[QuantizedLinear | None]
"""Per linear of a graph what it becomes; None where it stays in model dtype."""


@dataclasses.dataclass(frozen=True)
class Site:
    """A linear of a graph by the name of its node, with the positions of its weight and bias among the inputs."""

    name: str
    weight: int
    bias: int | None


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _is_linear(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _LINEARS


def find_sites(gm: fx.GraphModule, inputs: Sequence[object]) -> list[Site]:
    """Linears whose weight is a parameter.

    Raises:
        BackendError: when linears are where they cannot be replaced.
    """
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule) and any(_is_linear(node) for node in child.graph.nodes):
            raise BackendError(
                f"linears inside {name}, a checkpoint or other function on functions, cannot be replaced: turn off "
                "activation checkpointing"
            )
    position = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    sites = []
    for node in filter(_is_linear, gm.graph.nodes):
        weight, bias = _argument(node, 1, "weight"), _argument(node, 2, "bias")
        if weight.op == "get_attr":
            raise BackendError(f"the weight of {node.name} is a constant: turn off torch._inductor.config.freezing")
        if weight in position and isinstance(inputs[position[weight]], nn.Parameter):
            sites.append(Site(node.name, position[weight], position.get(bias)))
    return sites


def check_readers(gm: fx.GraphModule, inputs: Sequence[object], binding: Binding) -> None:
    """Make sure that weights of layers are read by linears only: a copy or a part of one would stay in floats."""
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        entry = binding.find(inputs[i])
        if entry is None or entry.layer is None:
            continue
        for user in node.users:
            if not _is_linear(user) or _argument(user, 1, "weight") is not node:
                raise BackendError(
                    f"{entry.name} is read by {user.name}, not by a linear as its weight: its integers cannot take its "
                    "place; exclude the layer by a rule"
                )
            bias = _argument(user, 2, "bias")
            if isinstance(bias, fx.Node) and bias.op != "placeholder":
                raise BackendError(
                    f"the bias of {entry.name} is computed by {bias.name}, the integers hold the one that was "
                    "calibrated; exclude the layer by a rule"
                )


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with notes of its own (Dynamo deletes some after a compile), tensors shared."""
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(gm.graph, values))
    copied = fx.GraphModule(gm, graph)
    inherit_notes(copied, notes_of(gm))
    copied._param_name_to_source = getattr(gm, "_param_name_to_source", {})  # type: ignore[assignment]
    for node in gm.graph.find_nodes(op="placeholder"):
        values[node]._dynamo_source = getattr(node, "_dynamo_source", None)
    return copied


def _writes(node: fx.Node) -> bool:
    """Whether a node may change a tensor that exists already; a graph of Dynamo is not functional."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    if node.op == "call_module" or isinstance(node.target, torch._ops.OperatorBase | torch._ops.OpOverloadPacket):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    told = bool(node.kwargs.keys() & {"out", "inplace"}) or any(argument is True for argument in node.args)
    return told or name.endswith("_") or name in _IN_PLACE


def shared_inputs(gm: fx.GraphModule, sites: Sequence[Site], layers: Layers) -> list[int]:
    """Per linear the first one that quantizes the same input in the same way, with nothing written between them."""
    epoch, inputs = 0, dict[str, tuple[fx.Node, int]]()
    for node in gm.graph.nodes:
        epoch += _writes(node)
        inputs[node.name] = _argument(node, 0, "input"), epoch

    def same(a: int, b: int) -> bool:
        one, other = layers[a], layers[b]
        if one is None or other is None or inputs[sites[a].name] != inputs[sites[b].name]:
            return False
        return one.quantizes_as(other)

    return [next((j for j in range(i) if same(i, j)), i) for i in range(len(sites))]


def fake_inputs(gm: fx.GraphModule) -> list[Any]:
    """The values that the inputs were recorded with: fake tensors and symbols."""
    return [compiled_value(node) for node in gm.graph.find_nodes(op="placeholder")]


def source_name(node: fx.Node) -> str:
    """Dotted name of a parameter among the inputs, as seen from the module that is compiled; empty for others."""
    name = getattr(getattr(node, "_dynamo_source", None), "name", "")
    return ".".join(_PATH.findall(name() if callable(name) else name))


def operands(layers: Layers) -> list[Tensor]:
    """The tensors of the layers in the order of the graph's additional inputs."""
    return [tensor for _, tensor in _operands(layers)]


def _operands(layers: Layers) -> list[tuple[tuple[int, int], Tensor]]:
    """Every tensor of every layer once; layers may have a tensor in common, it comes for each."""
    found = {
        (id(layer), id(argument)): argument
        for layer in layers
        if layer is not None
        for argument in (*layer.quantization(), *layer.product())
        if isinstance(argument, Tensor)
    }
    return list(found.items())


def _add_inputs(
    graph: fx.Graph, layers: Layers, values: Sequence[Tensor]
) -> Callable[[QuantizedLinear, Sequence[object]], list[object]]:
    """Append an input for every operand; returns what puts them in the place of a layer's tensors."""
    last, inputs = graph.find_nodes(op="placeholder")[-1], dict[tuple[int, int], fx.Node]()
    for number, ((key, _), value) in enumerate(zip(_operands(layers), values, strict=True)):
        with graph.inserting_after(last):
            last = inputs[key] = graph.placeholder(f"fxq_operand_{number}")
        last._dynamo_source = None
        set_compiled_input(last, value)
    return lambda layer, arguments: [inputs.get((id(layer), id(a)), a) for a in arguments]


def replace(
    gm: fx.GraphModule, sites: Sequence[Site], layers: Layers, shared: Sequence[int], values: Sequence[Tensor]
) -> None:
    """Put the integer operators in the place of linears; ``values`` are fake ones of :func:`operands`."""
    graph, quantized = gm.graph, dict[int, tuple[fx.Node, ...]]()
    nodes = {node.name: node for node in graph.nodes}
    inputs = _add_inputs(graph, layers, values)
    for i, (site, layer) in enumerate(zip(sites, layers, strict=True)):
        if layer is None:
            continue
        node = nodes[site.name]
        value = compiled_value(node)
        with graph.inserting_before(node):
            if shared[i] == i:
                quantized[i] = _quantize(graph, node, layer, inputs(layer, layer.quantization()))
            arguments = (*quantized[shared[i]], *inputs(layer, layer.product()), value.dtype)
            y = graph.call_function(layer.operators.product.definition, arguments)
            inherit_meta(y, node, value)
        node.replace_all_uses_with(y)
        graph.erase_node(node)
    graph.lint()
    gm.recompile()


def _quantize(graph: fx.Graph, linear: fx.Node, layer: QuantizedLinear, rest: list[Any]) -> tuple[fx.Node, ...]:
    """The integers of a linear's input and, where they are measured, their scales; ``rest`` are further arguments."""
    x = _argument(linear, 0, "input")
    value = compiled_value(x)
    made_of = layer.operators.quantize.definition
    integers = value.new_empty(value.shape, dtype=float8.E4M3 if layer.is_float8 else torch.int8)
    if not layer.per_token:
        q = graph.call_function(made_of, (x, *rest))
        inherit_meta(q, linear, integers)
        return (q,)
    columns = (1 if layer.split == layer.in_features else 2) * (2 if layer.asymmetric else 1)
    values = integers, value.new_empty((*value.shape[:-1], columns), dtype=torch.float32)
    pair = graph.call_function(made_of, (x, *rest))
    inherit_meta(pair, linear, values)
    made = tuple(graph.call_function(operator.getitem, (pair, i)) for i in range(2))
    for node, part in zip(made, values, strict=True):
        inherit_meta(node, linear, part)
    return made
