"""How fusion passes replace nodes: what lies between, whether it may go, new calls, and the leftovers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import fx
from torch.fx.node import Argument

from fxq.core import aliasing
from fxq.core.graph import arguments
from fxq.core.ir import LayerPlan, QuantGraph, clear_plan, example_value, get_tensor, inherit_meta, plan_of, set_plan
from fxq.kernels.op import Op
from fxq.passes.match.patterns import ATEN, CASTS, Unfit, calls, is_call, same, shape_of, value_of


def tidy(graph: QuantGraph) -> None:
    """Bring casts and dropout to a plain form.

    Casts to the dtype that is there and dropouts of inference go; ``type_as`` says its dtype and reads nothing else.
    """
    for node in calls(graph, *CASTS, ATEN.dropout.default):
        inner, value = node.all_input_nodes[0], example_value(node)
        before, named = example_value(inner), arguments(node)
        if node.target == ATEN.dropout.default:
            idle = named["p"] == 0 or not named["train"]
        elif value is None or before is None or before.device != value.device:
            continue
        else:
            plain = not named.get("copy") and named.get("memory_format") is None
            idle = plain and node.target != ATEN._to_copy.default and before.dtype == value.dtype
        if idle:
            node.replace_all_uses_with(inner)
            graph.module.graph.erase_node(node)
        elif node.target == ATEN.type_as.default:
            node.target, node.args = ATEN.to.dtype, (inner, value.dtype)


def between(results: Iterable[fx.Node], inputs: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes that compute ``results`` from ``inputs``, results included and inputs not."""
    stop, found, queue = set(inputs), set[fx.Node](), list(results)
    while queue:
        node = queue.pop()
        if node not in found and node not in stop and node.op == "call_function":
            found.add(node)
            queue += node.all_input_nodes
    return found


def check_private(inner: set[fx.Node], results: Sequence[fx.Node], inputs: Iterable[fx.Node]) -> None:
    """Make sure that ``inner`` can vanish: only ``results`` are read outside, and ``inputs`` may be read later.

    Casts of inputs may have other readers: they stay for them.

    Raises:
        Unfit: naming the value and its other reader, or the node that writes into an input meanwhile.
    """
    inputs = set(inputs)
    for node in sorted(inner - set(results)):
        if is_call(node, *CASTS) and node.all_input_nodes[0] in inputs:
            continue
        for user in node.users:
            if user not in inner:
                raise Unfit(f"{node.name} is also read by {user.name}")
    if inner:
        owners = {owner(node) for node in inputs}
        node, last = min(inner), max(results)
        while node is not last:
            if node not in inner and owners.intersection(written(node)):
                raise Unfit(f"{node.name} writes into what it reads")
            node = node.next


def written(node: fx.Node) -> Iterator[fx.Node]:
    """What a node writes into: the owner of the memory behind views."""
    yield from map(owner, aliasing.written(node))


def owner(node: fx.Node) -> fx.Node:
    """The node whose memory ``node`` may be a view of."""
    while node.op == "call_function" and node.all_input_nodes and aliasing.is_view(node):
        node = next(aliasing.written(node), node.all_input_nodes[0])
    return node


def check_fits(graph: QuantGraph, op: Op, args: Sequence[Argument]) -> None:
    """Ask the operator whether it takes the recorded values of ``args``.

    Raises:
        Unfit: with the operator's reason.
    """

    def value(node: fx.Node) -> Any:
        return get_tensor(graph.module, str(node.target)) if node.op == "get_attr" else value_of(node)

    if reason := op.supports(*fx.map_arg(tuple(args), value)):
        raise Unfit(reason)


def insert(
    before: fx.Node, like: fx.Node, target: Callable[..., object], args: tuple[Argument, ...], value: object
) -> fx.Node:
    """A new call in front of ``before`` with the origin of ``like``."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args)
    inherit_meta(node, like, value)
    return node


def frame_vector(vector: fx.Node, frames: tuple[int, ...], before: fx.Node) -> fx.Node:
    """A modulation vector in shape ``frames`` [B, F, K]; one axis of size 1 goes where there are four."""
    if same(shape_of(vector), frames):
        return vector
    return insert(before, vector, ATEN.squeeze.dim, (vector, 2), value_of(vector).new_empty(frames))


def move_plan(old: fx.Node, new: fx.Node) -> LayerPlan:
    """Hand the plan of a layer's result to the node that yields it now."""
    plan = plan_of(old)
    assert plan is not None
    set_plan(new, plan)
    clear_plan(old)
    return plan


def erase_unread(*nodes: fx.Node) -> None:
    """Erase nodes that nothing reads any more, and what only they read; inputs and stored tensors stay."""
    queue = set(nodes)
    while queue:
        node = max(queue)
        queue.remove(node)
        if node.op == "call_function" and not node.users and not any(written(node)):
            inputs = node.all_input_nodes
            node.graph.erase_node(node)
            queue.update(inputs)
