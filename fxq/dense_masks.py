"""``flex_attention`` of a captured graph as ``scaled_dot_product_attention`` under a dense mask.

Its mask is a function of positions, kept as a graph of its own. Evaluated on all positions at once it is a tensor, as
every later step knows it. It costs one byte for each pair of a query and a key.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxq.ir import example_value, inherit_meta

_ATEN = torch.ops.aten
_FLEX = torch.ops.higher_order.flex_attention
_APPLY = torch.ops.higher_order.flat_apply
_INDEX = "torch._dynamo._trace_wrapped_higher_order_op.ModIndex"  # how a mask's ``table[position]`` is captured


def dense_masks(module: fx.GraphModule) -> None:
    """Replace every ``flex_attention`` that changes no score and whose sums of exponentials nobody reads.

    Others stay and are refused later.
    """
    for node in module.graph.find_nodes(op="call_function", target=_FLEX):
        score, mask = (module.get_submodule(str(graph.target)) for graph in (node.args[3], node.args[4][-1]))
        assert isinstance(score, fx.GraphModule) and isinstance(mask, fx.GraphModule)
        results = [user for user in node.users if user.users]
        whole = all(user.target is operator.getitem and user.args[1] == 0 for user in results)
        if whole and _unchanged(score) and all(map(_known, mask.graph.nodes)):
            _replace(node, mask, results)
    _drop_unread_writes(module.graph)


def _drop_unread_writes(graph: fx.Graph) -> None:
    """Erase what made the masks' tables of blocks: dead code, and writes to tensors that nothing else reads."""
    changed = True
    while changed:
        changed = graph.eliminate_dead_code()
        for node in reversed(list(graph.nodes)):
            if not node.users and _writes(node) and _is_unread(node, node.args[0]):
                graph.erase_node(node)
                changed = True


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_unread(write: fx.Node, tensor: fx.Node) -> bool:
    """Whether nothing sees the write: the tensor is no input and no view, and is read only before it, as a whole."""
    return _is_fresh(tensor) and all(user is write or (user < write and _is_fresh(user)) for user in tensor.users)


def _is_fresh(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return all(result.alias_info is None for result in node.target._schema.returns)


def _unchanged(score: fx.GraphModule) -> bool:
    """Whether a score function returns the score it is given."""
    return score.graph.output_node().args[0] is next(iter(score.graph.nodes))


def _known(node: fx.Node) -> bool:
    """Whether a node of a mask's graph can be written as an ATen call."""
    if node.op == "get_attr":
        return all(user.target is _APPLY for user in node.users)
    return node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload) or node.args[2] == _INDEX


def _replace(node: fx.Node, mask: fx.GraphModule, results: list[fx.Node]) -> None:
    query, key, value, _, _, scale, *_, tables = node.args
    graph, sizes = node.graph, [example_value(x).shape for x in (query, key)]  # type: ignore[arg-type]

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = graph.call_function(target, args, kwargs)
        known_args, known = fx.map_arg((args, kwargs), example_value)
        with example_value(query).fake_mode:  # type: ignore[arg-type]
            inherit_meta(new, node, target(*known_args, **known))
        return new

    with graph.inserting_before(node):
        positions = [
            call(_ATEN.view.default, call(_ATEN.arange.default, size, device=example_value(query).device), shape)  # type: ignore[arg-type]
            for size, shape in (
                (sizes[0][0], [-1, 1, 1, 1]),
                (sizes[0][1], [-1, 1, 1]),
                (sizes[0][2], [-1, 1]),
                (sizes[1][2], [-1]),
            )
        ]
        values: dict[fx.Node, Any] = dict(
            zip(mask.graph.find_nodes(op="placeholder"), (*positions, *tables), strict=True)  # type: ignore[misc]
        )
        for inner in mask.graph.nodes:
            if inner.op != "call_function":
                continue
            args = fx.map_arg(inner.args, lambda n: values.get(n))
            if inner.target is _APPLY:
                values[inner] = call(_ATEN.index.Tensor, args[3], list(args[4:]))
            else:
                values[inner] = call(inner.target, *args, **inner.kwargs)
        dense = values[mask.graph.output_node().args[0]]  # type: ignore[index]
        attended = call(_ATEN.scaled_dot_product_attention.default, query, key, value, dense, scale=scale)
    for result in results:
        result.replace_all_uses_with(attended)
