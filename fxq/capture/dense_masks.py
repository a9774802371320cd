"""``flex_attention`` of a captured graph as ``scaled_dot_product_attention`` under a dense mask.

Its mask is a function of positions, kept as a graph of its own. Evaluated on all positions at once it is a tensor, as
every later step knows it. It costs one byte for each pair of a query and a key.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from fxq.core.ir import example_value, inherit_meta

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
        if results and whole and _unchanged(score) and all(map(_known, mask.graph.nodes)):
            _replace(node, mask, results)
            _drop_unread_writes(module.graph)


def _drop_unread_writes(graph: fx.Graph) -> None:
    """Erase what made the masks' tables of blocks: dead code, and writes to tensors that nothing else reads."""
    changed = True
    while changed:
        changed = graph.eliminate_dead_code()
        for node in reversed(list(graph.nodes)):
            if not node.users and _is_unread_write(node):
                graph.erase_node(node)
                changed = True


def _is_unread_write(node: fx.Node) -> bool:
    """Whether a call writes to a tensor, no input and no view, that is read before it only, and as a whole."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return False
    tensor = node.args[0]
    if not isinstance(tensor, fx.Node) or not _is_fresh(tensor):
        return False
    return all(user is node or (user < node and _is_fresh(user)) for user in tensor.users)


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


@dataclasses.dataclass(frozen=True)
class _Calls:
    """Makes calls, with their values, before a node and in its name."""

    before: fx.Node

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        graph = self.before.graph
        with graph.inserting_before(self.before):
            new = graph.call_function(target, args, kwargs)
        known_args, known = fx.map_arg((args, kwargs), example_value)
        inherit_meta(new, self.before, target(*known_args, **known))
        return new

    def positions(self, tensor: fx.Node, dim: int, shape: list[int]) -> fx.Node:
        """Numbers from 0 to the size of a tensor's dimension, in a shape."""
        value = example_value(tensor)
        size = value.shape[dim]
        if not isinstance(size, int):
            size = self(_ATEN.sym_size.int, tensor, dim)
        return self(_ATEN.view.default, self(_ATEN.arange.default, size, device=value.device), shape)


def _replace(node: fx.Node, mask: fx.GraphModule, results: list[fx.Node]) -> None:
    query, key, value, _, _, scale, *_, tables = node.args
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(tables, tuple)
    call = _Calls(node)
    with example_value(query).fake_mode:
        inputs = [call.positions(query, dim, [-1, *[1] * (3 - dim)]) for dim in (0, 1, 2)]
        inputs += [call.positions(key, 2, [-1]), *tables]
        values: dict[fx.Node, Any] = dict(zip(mask.graph.find_nodes(op="placeholder"), inputs, strict=True))
        for inner in mask.graph.nodes:
            if inner.op == "call_function":
                args = fx.map_arg(inner.args, values.get)
                indexed = inner.target is _APPLY
                target, args = (_ATEN.index.Tensor, (args[3], list(args[4:]))) if indexed else (inner.target, args)
                values[inner] = call(target, *args, **inner.kwargs)
        dense: object = fx.map_arg(mask.graph.output_node().args[0], values.__getitem__)
        attended = call(_ATEN.scaled_dot_product_attention.default, query, key, value, dense, scale=scale)
    for result in results:
        result.replace_all_uses_with(attended)
