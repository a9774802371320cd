"""Rewrite: linears that quantize the same input alike become one quantize and one GEMM."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Iterator

import torch
from torch import fx

from fxq.core import aliasing
from fxq.core.graph import arguments, drop_unread_attributes, in_order, unused_tensors
from fxq.core.ir import (
    QuantGraph,
    clear_plan,
    drop_tensor,
    example_value,
    get_tensor,
    inherit_meta,
    put_tensor,
    set_plan,
)
from fxq.core.layer import FROZEN_QUANTIZES, QuantizedLayer, measured_pair, quantized_layers
from fxq.core.pipeline import Fusion
from fxq.passes.match import edits
from fxq.passes.match.blocks import block_of

_STACKED = {"weight": 0, "weight_scale": 1, "offset": 0}
"""Tensors of a linear that lie one after the other in a joint one, and along which dimension."""
_ATEN = torch.ops.aten
_VIEWS = (_ATEN.view.default, _ATEN._unsafe_view.default)


@dataclasses.dataclass(frozen=True)
class MergeLinears(Fusion):
    """One quantize for all linears that read it alike, and one GEMM for those of one block.

    Cases: 1. quantize nodes of one input with equal tensors and bits become the first of them, static ones and those
    that measure scales per token; 2. linears of one block on one quantize node, of equal bits and dtype, become one
    GEMM of their stacked rows and a split; 3. a linear that reads what its neighbours read but cannot join any keeps
    its GEMM, with the reason as a remark.

    A part is a view of the joint result: readers that need dense memory get a copy, and so does the caller, or a cache
    of values would keep the queries and keys in memory too. Layers of different blocks stay apart: the keys and values
    of all blocks would have to be in memory at once.
    """

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of quantize nodes and linears that another one took over."""
        module = graph.module
        count = unify_quantizes(module)
        # Counted before anything is merged: a tensor with a second reader must stay as it is.
        readers: Counter[str] = Counter()
        for tensor in module.graph.find_nodes(op="get_attr"):
            readers[str(tensor.target)] += len(tensor.users)
        for layers in _neighbours(module):
            obstacles = {layer: _obstacle(readers, layer) for layer in layers}
            groups = _groups(module, obstacles)
            # Remarks first: merging erases the nodes whose layers they name.
            for group in groups:
                _remark(graph, group, obstacles)
            for group in groups:
                if len(group) > 1:
                    _merge(module, group)
                    count += len(group) - 1
        drop_unread_attributes(module.graph)
        for name in unused_tensors(module):
            drop_tensor(module, name)
        return count


def unify_quantizes(module: fx.GraphModule) -> int:
    """Leave one of the quantize nodes that compute the same; returns how many went.

    Nodes with an operator between them that writes into their input's memory stay apart.
    """
    seen: dict[object, fx.Node] = {}
    count = 0
    for node in list(module.graph.nodes):
        # What is written in place from here on has other contents than the nodes above have quantized.
        if written := set(edits.written(node)):
            seen = {key: first for key, first in seen.items() if edits.owner(first.all_input_nodes[0]) not in written}
        if node.target in FROZEN_QUANTIZES or measured_pair(node) is not None:
            source, *others = node.args
            key = (node.target, source, *(_bytes(module, argument) for argument in others))
            # The integers and scales of a measured quantize follow it: they unify too, and count once.
            if (first := seen.setdefault(key, node)) is not node:
                node.replace_all_uses_with(first)
                module.graph.erase_node(node)
                count += node.target in FROZEN_QUANTIZES
    return count


def _bytes(module: fx.GraphModule, argument: object) -> object:
    """Something equal for stored tensors of equal value, and for the same node or number."""
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return argument
    tensor = get_tensor(module, str(argument.target)).detach()
    return tensor.dtype, tuple(tensor.shape), tensor.cpu().numpy().tobytes()


def _views(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(reader, what it reads) for readers of a node and of its views."""
    for user in node.users:
        yield user, node
        if user.op == "call_function" and user.args[0] is node and aliasing.is_view(user):
            yield from _views(user)


def _neighbours(module: fx.GraphModule) -> Iterator[list[QuantizedLayer]]:
    """Layers of one block on one input, in graph order, where there are two or more."""
    found: dict[tuple[object, str], list[QuantizedLayer]] = {}
    for layer in quantized_layers(module):
        if layer.frozen and (source := layer.quantize) is not None:
            # Neighbours share what lies above their quantize.
            if source.target in FROZEN_QUANTIZES:
                source = arguments(source)["x"]
            found.setdefault((source, block_of(layer.name)), []).append(layer)
    yield from (layers for layers in found.values() if len(layers) > 1)


def _groups(module: fx.GraphModule, obstacles: dict[QuantizedLayer, str]) -> list[list[QuantizedLayer]]:
    """The layers, those together that become one GEMM."""
    groups: dict[object, list[QuantizedLayer]] = {}
    for layer, obstacle in obstacles.items():
        named = layer.arguments
        alike = (named.get(name) for name in ("q", "split", "bits", "dtype"))  # float8 has no bits
        # A layer with an obstacle stays alone; the others must be one operator with equal arguments on one input.
        key = layer if obstacle else (layer.product.target, *alike, _bytes(module, named["input_scale"]))
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def _obstacle(readers: Counter[str], layer: QuantizedLayer) -> str:
    """Why the layer's rows cannot lie in a joint weight, or ""."""
    node = layer.node
    # Its rows move into the joint tensor, and the other reader would need the old one as well.
    if any(readers[str(layer.arguments[name].target)] > 1 for name in _STACKED):
        return "its weight is used at several places"
    # Strides and offsets in absolute numbers are those of a tensor of its own, not of a part of a joint one.
    if any(user.target == _ATEN.as_strided.default for user, _ in _views(node)):
        return "as_strided reads its result"
    # A reshape of a part may be a copy where a view of a whole was none: the write would be lost.
    if any(source is not node and source in aliasing.written(user) for user, source in _views(node)):
        return "a view of its result is written in place"
    return ""


def _remark(graph: QuantGraph, group: list[QuantizedLayer], obstacles: dict[QuantizedLayer, str]) -> None:
    for layer in group:
        # Merged: name the others. Alone: why, for every neighbour, alike reasons together.
        if len(group) > 1:
            others = [other.name for other in group if other is not layer]
            graph.remark(layer.name, f"one GEMM with {', '.join(others)}")
            continue
        reasons: dict[str, str] = {}
        for other in obstacles:
            if other is not layer:
                reasons[other.name] = obstacles[layer] or _difference(layer, other, obstacles[other])
        for reason in dict.fromkeys(reasons.values()):
            others = [name for name, why in reasons.items() if why == reason]
            graph.remark(layer.name, f"not one GEMM with {', '.join(others)}: {reason}")


def _difference(layer: QuantizedLayer, other: QuantizedLayer, obstacle: str) -> str:
    # The neighbour cannot join anything; else the two are apart by their integers, or by how they are multiplied.
    if obstacle:
        return f"there {obstacle}"
    if layer.arguments["q"] is not other.arguments["q"]:
        return "the quantized inputs differ in scales or outliers, or by a write in between"
    return "bits or dtype differ"


def joint_name(module: fx.GraphModule, layers: list[str]) -> str:
    """A free name for layers stored together: ``a.b.q`` and ``a.b.k`` give ``a.b.q_k``."""
    paths = [layer.split(".") for layer in layers]
    shared = 0
    # The last part of a path is never shared: it is what tells the layers apart.
    while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    name = ".".join([*paths[0][:shared], "_".join("_".join(path[shared:]) for path in paths)])
    taken = [str(node.target) for node in module.graph.find_nodes(op="get_attr")]
    while any(f"{target}.".startswith(f"{name}.") for target in taken):
        name += "_"
    return name


def _merge(module: fx.GraphModule, group: list[QuantizedLayer]) -> None:
    """Replace the linears by one at the first of them, whose tensors hold their rows one below the other."""
    first, values = group[0].product, [example_value(layer.node) for layer in group]
    name, target = joint_name(module, [layer.name for layer in group]), group[0].operator
    sizes = [layer.plan.out_features for layer in group]
    value = None if values[0] is None else values[0].new_empty((*values[0].shape[:-1], sum(sizes)))
    graph = module.graph

    def stack(leaf: str, dim: int) -> fx.Node:
        tensors = [layer.operands(module)[leaf].detach() for layer in group]
        put_tensor(module, f"{name}.{leaf}", torch.cat(tensors, dim))
        return graph.get_attr(f"{name}.{leaf}")

    with graph.inserting_before(first):
        stacked = {leaf: stack(leaf, dim) for leaf, dim in _STACKED.items()}
        joint = graph.call_function(target, in_order(target, arguments(first) | stacked))
        split = graph.call_function(_ATEN.split_with_sizes.default, (joint, sizes, -1))
        parts = [graph.call_function(operator.getitem, (split, i)) for i in range(len(group))]
    pieces = [None] * len(group) if value is None else value.split(sizes, -1)
    for node in stacked.values():
        inherit_meta(node, first, None)
    inherit_meta(joint, first, value)
    inherit_meta(split, first, None if value is None else list(pieces))
    for layer, part, piece in zip(group, parts, pieces, strict=True):
        old = layer.node
        inherit_meta(part, old, piece)
        set_plan(part, layer.plan)
        clear_plan(old)
        old.replace_all_uses_with(part)
        graph.erase_node(old)
        _allow_strides(graph, part)


def _allow_strides(graph: fx.Graph, part: fx.Node) -> None:
    """Let readers of a part, which is not dense any more, do what they did."""
    for user, source in list(_views(part)):
        # A view needs a stride that a part may not have; a reshape takes one where there is one.
        if user.target in _VIEWS:
            user.target = _ATEN.reshape.default
        # A caller that keeps the part would keep the joint result alive, and so would this call to its end.
        elif user.op == "output":
            with graph.inserting_after(source):
                copy = graph.call_function(_ATEN.clone.default, (source,))
            inherit_meta(copy, source, example_value(source))
            user.replace_input_with(source, copy)
