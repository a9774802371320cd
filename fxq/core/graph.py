"""Small fx helpers: find linears and their parameters, drop what nothing reads, print a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxq.core.ir import get_tensor, plan_of

_LINEAR = torch.ops.aten.linear.default
_CASTS = (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default)


def argument_names(target: Callable[..., object]) -> tuple[str, ...]:
    """Names of an operator's arguments, in its schema's order."""
    return tuple(argument.name for argument in target._schema.arguments)  # type: ignore[attr-defined]


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an operator's call by name, in its schema's order, defaults filled in."""
    declared = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in declared), node.args, strict=False))
    return {a.name: a.default_value for a in declared} | given | dict(node.kwargs)


def in_order(target: Callable[..., object], named: Mapping[str, object]) -> tuple[Any, ...]:
    """Arguments for an operator's call by position; names that it does not have are left out.

    Raises:
        KeyError: naming an argument that is not among them.
    """
    return tuple(named[name] for name in argument_names(target))


def set_arguments(node: fx.Node, **named: Any) -> None:
    """Replace arguments of an operator's call by name; the others stay as they are given."""
    assert callable(node.target)
    names = argument_names(node.target)[: len(node.args)]
    node.args = tuple(named.pop(name, given) for name, given in zip(names, node.args, strict=True))
    node.kwargs = {**node.kwargs, **named}


@dataclasses.dataclass(frozen=True)
class LinearSite:
    """One ``aten.linear`` node. ``layer`` is the weight's name without ``.weight``; weight None: not a parameter."""

    node: fx.Node
    layer: str
    weight_name: str | None
    bias_name: str | None

    def weight(self, module: torch.nn.Module) -> Tensor:
        """Float weight [N, K]."""
        assert self.weight_name is not None
        return get_tensor(module, self.weight_name).detach()

    def bias(self, module: torch.nn.Module) -> Tensor | None:
        """Float bias [N] or None."""
        return None if self.bias_name is None else get_tensor(module, self.bias_name).detach()


def _parameter_name(argument: object) -> str | None:
    node = argument
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in _CASTS:
        node = node.args[0]
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def linear_sites(module: fx.GraphModule) -> Iterator[LinearSite]:
    """Every linear of the graph in execution order; a weight used twice gives two sites of one layer."""
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target != _LINEAR:
            continue
        named = arguments(node)
        weight, bias = _parameter_name(named["weight"]), _parameter_name(named["bias"])
        if named["bias"] is not None and bias is None:
            weight = None
        layer = node.name if weight is None else weight.removesuffix(".weight")
        yield LinearSite(node, layer, weight, bias)


def sharing_conflicts(module: fx.GraphModule, names: tuple[str, ...]) -> dict[str, str]:
    """Layers whose weight cannot be replaced by integers without changing something else, with the reason.

    Args:
        module: the graph.
        names: what the integers, scales and the rest would be called under the layer's name.
    """
    sites = [site for site in linear_sites(module) if site.weight_name is not None]
    weights = {site.weight_name: site.layer for site in sites}
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    biases: dict[str, set[str | None]] = {}
    for site in sites:
        biases.setdefault(site.layer, set()).add(site.bias_name)
    conflicts: dict[str, str] = {
        layer: "its weight is shared by linears with different biases"
        for layer, found in biases.items()
        if len(found) > 1
    }
    for layer in biases:
        own = {f"{layer}.weight", f"{layer}.bias"}
        if taken := [name for name in names if f"{layer}.{name}" in read - own]:
            conflicts[layer] = f"the model has a tensor of its own named {layer}.{taken[0]}"
    for node in module.graph.nodes:
        if node.op == "get_attr" and (owner := weights.get(str(node.target))) is not None:
            for reader in _readers(node):
                conflicts[owner] = f"its weight is also read by {reader.name}"
    return conflicts


def _readers(tensor: fx.Node) -> Iterator[fx.Node]:
    """Nodes that read a tensor, through casts, as anything but a linear's weight."""
    for user in tensor.users:
        if user.target in _CASTS and user.args[0] is tensor:
            yield from _readers(user)
        elif user.target != _LINEAR or [i for i, arg in enumerate(user.args) if arg is tensor] != [1]:
            yield user


def unused_tensors(module: fx.GraphModule) -> list[str]:
    """Names of parameters and buffers that no node reads."""
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in module.named_buffers(remove_duplicate=False)]
    return [name for name in names if name not in used]


def drop_unread_attributes(graph: fx.Graph) -> None:
    """Erase ``get_attr`` nodes without users, and casts that only they fed."""
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "get_attr" or node.target in _CASTS):
            graph.erase_node(node)


def graph_text(module: fx.GraphModule) -> str:
    """The graph as stable text: one node a line with its plan, for golden files and diffs."""
    lines = []
    for node in module.graph.nodes:
        plan = plan_of(node)
        note = ""
        if plan is not None:
            what = plan.scheme.detail if plan.scheme else f"kept: {plan.reason}"
            note = f"    # {plan.layer}: {what}" + (f", {len(plan.outliers)} outliers" if plan.outliers else "")
        lines.append(f"{node.format_node()}{note}")
    return "\n".join(lines) + "\n"
