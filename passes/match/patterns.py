"""How fusion passes recognise what they replace: sets of operators, walks through views and casts, shapes.

Shapes are compared symbolically: sizes that are merely equal in the example are not the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxq import kernels
from fxq.core.graph import arguments
from fxq.core.ir import QuantGraph, example_value
from fxq.kernels.quantize.op import FLOATS

ATEN = torch.ops.aten

CASTS = frozenset({ATEN.to.dtype, ATEN._to_copy.default, ATEN.type_as.default})
"""May change the dtype, nothing else."""

RESHAPES = frozenset(
    {
        ATEN.view.default,
        ATEN._unsafe_view.default,
        ATEN.reshape.default,
        ATEN.unflatten.int,
        ATEN.flatten.using_ints,
        ATEN.unsqueeze.default,
        ATEN.squeeze.dim,
        ATEN.squeeze.dims,
        ATEN.contiguous.default,
        ATEN.clone.default,
    }
)
"""Keep the elements and their order: a chain of these is known by its first and last shape."""

FREE = CASTS | RESHAPES
"""What a fused operator does on the way."""

LINEAR = kernels.dual_scale_linear.definition
LINEAR_PER_TOKEN = kernels.dual_scale_linear_per_token.definition
QUANTIZE = kernels.quantize_act.definition
QUANTIZE_PER_TOKEN = kernels.quantize_per_token.definition
QUANTIZE_PER_TOKEN_ASYMMETRIC = kernels.quantize_per_token_asymmetric.definition


class Unfit(Exception):
    """A pattern that starts as expected and goes on differently; the message is the reason for the report."""


def is_call(node: object, *targets: object) -> TypeGuard[fx.Node]:
    """Whether ``node`` calls one of the targets."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def calls(graph: QuantGraph, *targets: object) -> list[fx.Node]:
    """Nodes that call one of the targets, in graph order."""
    return [node for node in graph.module.graph.nodes if is_call(node, *targets)]


def value_of(node: fx.Node) -> Tensor:
    """The recorded tensor value.

    Raises:
        Unfit: when there is none.
    """
    value = example_value(node)
    if not isinstance(value, Tensor):
        raise Unfit(f"no value is recorded for {node.name}")
    return value


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Sizes of the recorded value, ints or symbols."""
    return tuple(value_of(node).shape)


def same(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two shapes are equal for every input, not only for the example."""
    return len(first) == len(second) and all(statically_known_true(a == b) for a, b in zip(first, second, strict=True))


def shown(sizes: Sequence[int]) -> str:
    """A shape for messages."""
    return f"[{', '.join(map(str, sizes))}]"


def terms(node: fx.Node) -> tuple[object, object]:
    """Both operands of a binary operator, tensors or numbers."""
    named = arguments(node)
    return named["self"], named["other"]


def operands(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Both orders of the operands of a binary operator on two tensors; none for a scaled sum."""
    a, b = terms(node)
    if _is_tensor(a) and _is_tensor(b) and node.kwargs.get("alpha", 1) == 1:
        yield from ((a, b), (b, a))


def _is_tensor(value: object) -> TypeGuard[fx.Node]:
    """Whether it is a node of a tensor and not of a size."""
    return isinstance(value, fx.Node) and isinstance(example_value(value), Tensor)


def partner(node: fx.Node, operand: fx.Node) -> fx.Node | None:
    """The other operand of a binary operator; None for a number, and when both are ``operand``."""
    return next((b for a, b in operands(node) if a is operand and b is not operand), None)


def back(node: fx.Node, through: frozenset[object]) -> Iterator[fx.Node]:
    """``node`` and what it was made from, as long as only operators of ``through`` stand between."""
    yield node
    while is_call(node, *through):
        node = node.all_input_nodes[0]
        yield node


def source(node: fx.Node, through: frozenset[object]) -> fx.Node:
    """The last of :func:`back`."""
    return list(back(node, through))[-1]


def exact_source(node: fx.Node) -> fx.Node:
    """What is behind casts that lose nothing: a 16-bit tensor read as float32."""
    while is_call(node, *CASTS):
        inner = node.all_input_nodes[0]
        before, after = value_of(inner).dtype, value_of(node).dtype
        if before not in FLOATS or torch.promote_types(before, after) != after:
            return node
        node = inner
    return node


def only_user(node: fx.Node) -> fx.Node | None:
    """The user of a value that has one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def ahead(node: fx.Node, through: frozenset[object]) -> Iterator[fx.Node]:
    """``node`` and what is made of it, as long as it is the only user and an operator of ``through``."""
    yield node
    while is_call(user := only_user(node), *through):
        node = user
        yield node


def readers(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(user, what it reads) for all that use ``node``, through views and casts."""
    for user in node.users:
        if is_call(user, *FREE):
            yield from readers(user)
        else:
            yield user, node


def frames_of(vector: fx.Node, rows: fx.Node, tokens: Sequence[int]) -> tuple[int, ...]:
    """Shape [B, F, K] of a vector that multiplies or shifts ``rows``, which is a view of ``tokens`` [B, S, K].

    Raises:
        Unfit: when it varies otherwise than from frame to frame.
    """
    (batch, *inner, width), found = shape_of(rows), shape_of(vector)
    if not same((batch, width), (tokens[0], tokens[-1])) or len(inner) not in (1, 2):
        raise Unfit(f"{rows.name} is {shown(shape_of(rows))}: expected {shown(tokens)} or its frames")
    counts = (1, inner[0])
    for count in counts:
        if same(found, (batch, count, *(1 for _ in inner[1:]), width)):
            return batch, count, width
    forms = " or ".join(shown((batch, count, *(1 for _ in inner[1:]), width)) for count in counts)
    raise Unfit(f"{vector.name} is {shown(found)}: expected {forms}")
