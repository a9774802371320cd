"""How graphs write the root-mean-square norm and the rotary embedding of queries and keys."""

from __future__ import annotations

import dataclasses
import operator

from torch import fx

from fxq.core.graph import arguments
from fxq.passes.match import patterns
from fxq.passes.match.patterns import ATEN, CASTS, exact_source, is_call, shape_of

MAKERS = (ATEN.stack.default, ATEN.empty_like.default)
"""What a rotation's result is made by."""

NORMS = (ATEN.rms_norm.default, ATEN.mul.Tensor)
"""What a norm ends with."""


@dataclasses.dataclass(frozen=True)
class Norm:
    """``x / sqrt(mean(x ** 2) + eps) * weight`` over the last axis; None for what the call leaves out."""

    x: fx.Node
    weight: fx.Node | None
    eps: float | None


@dataclasses.dataclass(frozen=True)
class Rotation:
    """``pairs`` [..., 2] turned by the tables: ``(a cos - b sin, a sin + b cos)``.

    ``halves`` are the turned even and odd channels; ``made`` is the tensor that holds them in turn, once ``effects``,
    if any, have written them.
    """

    pairs: fx.Node
    cos: fx.Node
    sin: fx.Node
    made: fx.Node
    halves: tuple[fx.Node, fx.Node]
    effects: tuple[fx.Node, ...]


def norm_of(node: fx.Node) -> Norm | None:
    """The root-mean-square norm that ends at a node."""
    if is_call(node, ATEN.rms_norm.default):
        named = arguments(node)
        weight = named["weight"] and exact_source(named["weight"])
        return Norm(exact_source(named["input"]), weight, named["eps"])
    if not is_call(node, ATEN.mul.Tensor):
        return None
    for scaled, weight in patterns.operands(node):
        inner = patterns.source(scaled, CASTS)
        if len(shape_of(weight)) == 1 and is_call(inner, ATEN.mul.Tensor):
            for x, inverse in patterns.operands(inner):
                if (eps := _inverse_rms(inverse, exact_source(x))) is not None:
                    return Norm(exact_source(x), exact_source(weight), eps)
    return None


def _inverse_rms(node: fx.Node, x: fx.Node) -> float | None:
    """``eps`` when a node is ``rsqrt(mean(x ** 2) + eps)`` over the last axis."""
    if not is_call(node, ATEN.rsqrt.default) or not is_call(total := node.args[0], ATEN.add.Tensor):
        return None
    mean, eps = patterns.terms(total)
    if not is_call(mean, ATEN.mean.dim) or not isinstance(eps, float):
        return None
    named = arguments(mean)
    square = named["self"]
    if named["dim"] not in ([-1], [len(shape_of(square)) - 1]) or not named["keepdim"]:
        return None
    squared = is_call(square, ATEN.square.default)
    squared = squared or (is_call(square, ATEN.pow.Tensor_Scalar) and arguments(square)["exponent"] == 2)
    return eps if squared and exact_source(square.all_input_nodes[0]) is x else None


def rotation_of(maker: fx.Node) -> Rotation | None:
    """The rotation that a new tensor holds: a stack of halves, or halves written into its slices."""
    if maker.target == ATEN.stack.default:
        named = arguments(maker)
        tensors = named["tensors"]
        if len(tensors) != 2 or named["dim"] not in (-1, len(shape_of(maker)) - 1):
            return None
        return _turned(tensors[0], tensors[1], maker, ())
    halves: dict[int, fx.Node] = {}
    effects: list[fx.Node] = []
    for user in maker.users:
        copy, start = patterns.only_user(user), _interleaved(user, shape_of(maker))
        if start is not None and is_call(copy, ATEN.copy_.default) and copy.args[0] is user:
            halves[start] = copy.all_input_nodes[1]
            effects.append(copy)
    written = [effect.args[0] for effect in effects]
    if halves.keys() != {0, 1} or any(user < max(effects) for user in maker.users if user not in written):
        return None
    return _turned(halves[0], halves[1], maker, tuple(effects))


def _interleaved(node: fx.Node, shape: tuple[int, ...]) -> int | None:
    """0 or 1 when a node is the slice of every other channel from there to the end."""
    if not is_call(node, ATEN.slice.Tensor):
        return None
    named = arguments(node)
    start, end = named["start"] or 0, named["end"]
    last = named["dim"] in (-1, len(shape) - 1) and named["step"] == 2
    return start if last and start in (0, 1) and (end is None or end >= shape[-1]) else None


def _turned(even: fx.Node, odd: fx.Node, made: fx.Node, effects: tuple[fx.Node, ...]) -> Rotation | None:
    """The rotation with ``even = a cos - b sin`` and ``odd = a sin + b cos``."""
    if not is_call(even, ATEN.sub.Tensor) or not is_call(odd, ATEN.add.Tensor) or even.kwargs or odd.kwargs:
        return None
    straight, crossed = _factors(even), _factors(odd)
    if len(straight) != 2:
        return None
    (a, cos), (b, sin) = straight
    if a != (b[0], 0) or b[1] != 1 or len(crossed) != 2 or dict(crossed) != {a: sin, b: cos}:
        return None
    return Rotation(a[0], cos, sin, made, (even, odd), effects)


_Half = tuple[fx.Node, int]
"""A tensor of pairs, and 0 for its even, 1 for its odd channels."""


def _factors(total: fx.Node) -> list[tuple[_Half, fx.Node]]:
    """(half, factor) of the products that a node adds or subtracts, in order."""
    products = [term for term in patterns.terms(total) if is_call(term, ATEN.mul.Tensor)]
    return [(half, factor) for term in products for x, factor in patterns.operands(term) if (half := _half(x))]


def _half(node: fx.Node) -> _Half | None:
    """What a node is a half of, along a last axis of two."""
    if is_call(node, ATEN.select.int):
        named = arguments(node)
        pairs, axis, index = named["self"], named["dim"], named["index"]
    elif is_call(node, operator.getitem) and is_call(split := node.args[0], ATEN.unbind.int):
        named, (_, index) = arguments(split), node.args
        pairs, axis = named["self"], named["dim"]
    else:
        return None
    shape = shape_of(pairs)
    last = shape[-1] == 2 and axis in (-1, len(shape) - 1)
    return (pairs, index) if last and index in (0, 1) else None
