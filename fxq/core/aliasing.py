"""Memory of a graph's values: what shares it, what writes to it, and which value is read around a write.

Passes take a node for one value. That holds where nothing writes to memory that was read before, or that is read under
another name afterwards; :func:`read_around_writes` tells where it does not.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxq.core.ir import example_value
from fxq.core.places import quoted_place

_MADE = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("empty", "zeros", "ones", "full", "empty_like", "zeros_like", "ones_like", "full_like")
) | frozenset(getattr(torch.ops.aten, f"new_{name}") for name in ("empty", "zeros", "ones", "full"))
"""Make a tensor that nobody else has: filling it part by part is how graphs write ``stack``."""

Memory = frozenset[object]
"""Names of pieces of memory."""


def written(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments that an operator writes to, by position or by keyword."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
    for declared in schema.arguments:
        if declared.alias_info is not None and declared.alias_info.is_write:
            for value in pytree.tree_leaves(given.get(declared.name)):
                if isinstance(value, fx.Node):
                    yield value


def is_view(node: fx.Node) -> bool:
    """Whether the result may share memory with an argument, by the operator's schema."""
    schema = getattr(node.target, "_schema", None)
    return node.target is operator.getitem or (
        schema is not None and any(result.alias_info is not None for result in schema.returns)
    )


def memory_of(graph: fx.Graph) -> dict[fx.Node, Memory]:
    """The memory that each node's value may lie in: by schemas, and by the storages of recorded values."""
    found: dict[fx.Node, Memory] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        values = [v for v in pytree.tree_leaves(example_value(node)) if isinstance(v, Tensor)]
        own = {storage for v in values if (storage := _storage(v)) is not None}
        if node.op == "get_attr":
            own.add(str(node.target))
        elif node.op == "call_function" and is_view(node):
            shared = [found[source] for source in node.all_input_nodes]
            own.update(*(shared[:1] if not any(written(node)) else [found[source] for source in written(node)]))
        found[node] = frozenset(own or {node})
    return found


def _storage(tensor: Tensor) -> object | None:
    """The identity of a tensor's storage; None for kinds that have none, such as batched ones."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def read_around_writes(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """(write, reader) where a node is not one value: each write once.

    Memory that is read before a write counts, and memory that is read afterwards under a name from before: the base of
    a view that was written, or another view. Exempt are inputs and tensors that the graph made empty, which may be
    filled through views, and writes of results into inputs at the very end.
    """
    nodes: list[fx.Node] = list(graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    writes = [node for node in nodes if any(written(node))]
    if not writes:
        return []
    memory = memory_of(graph)
    filled = _joined(memory, (n for n in nodes if n.op == "placeholder" or _packet(n) in _MADE))
    last, found = _tail(nodes), []
    for write in writes:
        targets = set(written(write))
        touched = _joined(memory, targets)
        readers = nodes[: place[write]] if place[write] < last else []
        before = [
            r for r in readers if r.op == "call_function" and not memory[r] & touched and _reads(r, memory, touched)
        ]
        stale: list[fx.Node] = []
        if not touched <= filled:
            old = {n for n in nodes[: place[write]] if n not in targets and n.op != "output" and memory[n] & touched}
            stale = [r for r in nodes[place[write] + 1 :] if old.intersection(r.all_input_nodes)]
        found += [(write, reader) for reader in (*before, *stale)[:1]]
    return found


def written_inputs(graph: fx.Graph) -> set[fx.Node]:
    """Inputs and stored tensors in whose memory the graph writes."""
    memory = memory_of(graph)
    touched = _joined(memory, (target for node in graph.nodes for target in written(node)))
    return {n for n in graph.nodes if n.op in ("placeholder", "get_attr") and memory[n] & touched}


def _packet(node: fx.Node) -> object:
    return getattr(node.target, "overloadpacket", None)


def _joined(memory: dict[fx.Node, Memory], nodes: Iterable[fx.Node]) -> Memory:
    return frozenset[object]().union(*(memory[node] for node in nodes))


def _reads(node: fx.Node, memory: dict[fx.Node, Memory], touched: Memory) -> bool:
    return any(memory[n] & touched for n in node.all_input_nodes)


def _tail(nodes: list[fx.Node]) -> int:
    """From this position on the graph only writes results into its inputs and returns."""
    position = len(nodes)
    while position and (
        nodes[position - 1].op == "output"
        or ((targets := list(written(nodes[position - 1]))) and all(t.op == "placeholder" for t in targets))
    ):
        position -= 1
    return position


def told(pairs: list[tuple[fx.Node, fx.Node]]) -> str:
    """The pairs as text with their places in the model's code, for messages."""
    return "; ".join(
        f"{write.name}{_at(write)} writes to what {reader.name}{_at(reader)} reads" for write, reader in pairs[:3]
    )


def _at(node: fx.Node) -> str:
    return f" at {found}" if (found := quoted_place(node.stack_trace or "")) else ""
