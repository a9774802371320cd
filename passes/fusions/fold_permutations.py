"""Rewrite: a layer's channel order moves into the rows of the linear before it, where nothing else minds."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, fx

from fxq import kernels
from fxq.core.graph import arguments, drop_unread_attributes, set_arguments, unused_tensors
from fxq.core.ir import QuantGraph, drop_tensor, example_value, get_tensor, inherit_meta, put_tensor
from fxq.core.layer import layers_reading
from fxq.core.pipeline import Fusion
from fxq.passes.match.axis_groups import Axis, AxisGroups
from fxq.passes.match.axis_rules import axis_groups

_QUANTIZE = kernels.quantize_act.definition


@dataclasses.dataclass(frozen=True)
class FoldPermutations(Fusion):
    """Stores producers in the ``[normal | outlier]`` order of their reader, whose quantize then gathers nothing.

    The order of an axis can change when every axis that must share it can (:mod:`fxq.passes.match.axis_groups`): the
    rows of stored weights, scales and offsets change theirs, elementwise operators do not mind. It is folded when every
    ``quantize_act`` that reads such an axis wants just this order; one that wants another would have to gather instead.
    The others keep gathering, with the reason as a remark. Where a norm lies between, its sums change their order: the
    result is equal up to rounding there and exactly equal elsewhere.
    """

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of quantize nodes that gather no more."""
        module = graph.module
        groups = axis_groups(module)
        folded = 0
        for node in list(module.graph.nodes):
            if node.target != _QUANTIZE or arguments(node)["perm"] is None:
                continue
            orders = _orders(module, groups, node)
            if isinstance(orders, str):
                for layer in layers_reading(node):
                    graph.remark(layer, f"its quantize gathers channels: {orders}")
                continue
            readers = _readers(groups, orders)
            for reader, _ in readers:
                for layer in layers_reading(reader):
                    graph.remark(layer, f"channel order folded into {', '.join(_stored(groups, orders))}")
            apply_orders(module, groups, orders)
            folded += len(readers)
        drop_unread_attributes(module.graph)
        for name in unused_tensors(module):
            drop_tensor(module, name)
        return folded


def _orders(module: fx.GraphModule, groups: AxisGroups, node: fx.Node) -> dict[int, Tensor] | str:
    """The new order of every group when the channels of a quantize node come in its order, or why they cannot."""
    x, perm = arguments(node)["x"], _perm(module, node)
    assert isinstance(x, fx.Node) and perm is not None
    channels = _channels(x, module)
    if channels is None:
        return f"the shape of {x.name} is not recorded"
    orders = groups.reorder(groups.number[channels], perm)
    if isinstance(orders, str):
        return f"the order of its input is fixed: {orders}"
    others = []
    for reader, order in _readers(groups, orders):
        wanted = _perm(module, reader)
        if wanted is None or not torch.equal(wanted, order):
            others += layers_reading(reader)
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        return f"the order of its input is shared by {', '.join(others[:3])}{more}"
    return orders


def _channels(x: fx.Node, module: fx.GraphModule) -> Axis | None:
    """The last axis of a quantize node's input; None where its shape is not recorded."""
    if x.op == "get_attr":
        return Axis(str(x.target), get_tensor(module, str(x.target)).ndim - 1)
    value = example_value(x)
    return Axis(x, value.ndim - 1) if isinstance(value, Tensor) else None


def _perm(module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    perm = arguments(node)["perm"]
    return get_tensor(module, str(perm.target)).long().cpu() if isinstance(perm, fx.Node) else None


def _readers(groups: AxisGroups, orders: dict[int, Tensor]) -> list[tuple[fx.Node, Tensor]]:
    """Quantize nodes whose channels get a new order, with it."""
    return [(reader, order) for group, order in orders.items() for reader in groups.readers.get(group, [])]


def _stored(groups: AxisGroups, orders: dict[int, Tensor]) -> list[str]:
    names = (name.rpartition(".")[0] for group in orders for name, _, _ in groups.stored(group))
    return list(dict.fromkeys(names))


def apply_orders(module: fx.GraphModule, groups: AxisGroups, orders: dict[int, Tensor]) -> None:
    """Give stored tensors their new order, as copies, and let quantize nodes gather from it what they did.

    Args:
        module: the graph.
        groups: its axes.
        orders: new order by group, from :meth:`~fxq.passes.match.axis_groups.AxisGroups.reorder`.
    """
    for group, order in orders.items():
        for name, dim, start in groups.stored(group):
            tensor = get_tensor(module, name).detach()
            index = torch.arange(tensor.shape[dim])
            index[start : start + len(order)] = start + order
            put_tensor(module, name, tensor.index_select(dim, index.to(tensor.device)))
    for reader, order in _readers(groups, orders):
        perm = _perm(module, reader)
        inverse = order.argsort()
        _set_perm(module, reader, inverse if perm is None else inverse[perm])


def _set_perm(module: fx.GraphModule, node: fx.Node, perm: Tensor) -> None:
    old, scale = (arguments(node)[name] for name in ("perm", "scale"))
    if torch.equal(perm, torch.arange(len(perm))):
        set_arguments(node, perm=None)
        return
    assert isinstance(scale, fx.Node)
    name = f"{str(scale.target).rpartition('.')[0]}.{node.name}_perm"
    put_tensor(module, name, perm.to(torch.int32).to(get_tensor(module, str(scale.target)).device))
    with module.graph.inserting_before(node):
        read = module.graph.get_attr(name)
    inherit_meta(read, old if isinstance(old, fx.Node) else node, None)
    set_arguments(node, perm=read)
