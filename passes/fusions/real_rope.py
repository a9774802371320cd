"""Rewrite: rotary embedding by complex numbers becomes the same in real float32 arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import fx
from torch.fx.node import Argument

from fxq.core.ir import QuantGraph, module_path
from fxq.core.pipeline import Fusion
from fxq.passes.match import edits, patterns
from fxq.passes.match.patterns import ATEN, RESHAPES, Unfit, exact_source, is_call, shape_of, value_of


@dataclasses.dataclass(frozen=True)
class RealRope(Fusion):
    """``view_as_real(view_as_complex(pairs) * table)`` becomes products, a difference and a sum of float32 halves.

    Complex numbers run in double precision, have few kernels and no place in most export formats. The real form is the
    one that :class:`~fxq.passes.fusions.fuse_rotary.FuseRotary` knows, so this pass stands before it. The result keeps
    its
    dtype, unless a cast to 32 bits or less follows: then no double is made. Cosines and sines are taken from the table
    once. Notes stand under the path of the module.
    """

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of rotations rewritten."""
        return make_rope_real(graph)


def make_rope_real(graph: QuantGraph) -> int:
    """What :class:`RealRope` does, for a graph at any stage; returns the number of rotations rewritten."""
    edits.tidy(graph)
    tables: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    count = 0
    for node in patterns.calls(graph, ATEN.view_as_real.default):
        if (found := _rotation(node)) is None:
            continue
        pairs, table = found
        name = module_path(node) or "rotary"
        try:
            edits.check_private(edits.between([node], [pairs, table]), [node], [pairs, table])
            if table not in tables:
                tables[table] = _parts(table)
            _rewrite(node, pairs, *tables[table])
        except Unfit as reason:
            graph.note(name, f"complex rotation left as it is: {reason}")
            continue
        graph.note(name, "complex rotation in real float32")
        count += 1
    return count


def _rotation(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(pairs of reals [..., 2], complex table) whose product a ``view_as_real`` reads."""
    product = node.all_input_nodes[0]
    if is_call(product, ATEN.mul.Tensor):
        for x, table in patterns.operands(product):
            if is_call(x, ATEN.view_as_complex.default) and value_of(table).is_complex():
                return x.all_input_nodes[0], table
    return None


def _parts(table: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Cosines and sines of a complex table, float32."""
    before, value = min(table.users), value_of(table)
    parts = []
    for part in (ATEN.real.default, ATEN.imag.default):
        node = edits.insert(before, table, part, (table,), value.new_empty(value.shape, dtype=value.dtype.to_real()))
        parts.append(_cast(node, before, torch.float32))
    return parts[0], parts[1]


def _cast(node: fx.Node, before: fx.Node, dtype: torch.dtype) -> fx.Node:
    value = value_of(node)
    if value.dtype == dtype:
        return node
    return edits.insert(before, node, ATEN.to.dtype, (node, dtype), value.new_empty(value.shape, dtype=dtype))


def _replay(steps: list[fx.Node], start: fx.Node, before: fx.Node) -> fx.Node:
    """The views ``steps`` on another tensor."""
    node = start
    for step in steps:
        value = value_of(start).new_empty(shape_of(step))
        assert callable(step.target)
        _, *rest = step.args
        node = edits.insert(before, step, step.target, (node, *rest), value)
        node.kwargs = step.kwargs
    return node


def _rewrite(node: fx.Node, pairs: fx.Node, cos: fx.Node, sin: fx.Node) -> None:
    *views, base = patterns.back(pairs, RESHAPES)
    single = _replay(views[::-1], _cast(exact_source(base), node, torch.float32), node)
    turned = _turn(single, cos, sin, node)
    last = list(patterns.ahead(node, RESHAPES))[-1]
    cast = patterns.only_user(last)
    if is_call(cast, ATEN.to.dtype) and value_of(cast).dtype.itemsize <= 4:
        after = list(patterns.ahead(node, RESHAPES))[1:]
        old, new = cast, _cast(_replay(after, turned, cast), cast, value_of(cast).dtype)
    else:
        old, new = node, _cast(turned, node, value_of(node).dtype)
    old.replace_all_uses_with(new)
    edits.erase_unread(old)


def _turn(pairs: fx.Node, cos: fx.Node, sin: fx.Node, before: fx.Node) -> fx.Node:
    """``(a cos - b sin, a sin + b cos)`` of the pairs (a, b)."""
    shape = shape_of(before)[:-1]

    def call(target: Callable[..., object], args: tuple[Argument, ...], sizes: tuple[int, ...]) -> fx.Node:
        return edits.insert(before, before, target, args, value_of(pairs).new_empty(sizes))

    a, b = (call(ATEN.select.int, (pairs, -1, index), shape_of(pairs)[:-1]) for index in (0, 1))
    ac, bs, as_, bc = (call(ATEN.mul.Tensor, pair, shape) for pair in ((a, cos), (b, sin), (a, sin), (b, cos)))
    halves = [call(ATEN.sub.Tensor, (ac, bs), shape), call(ATEN.add.Tensor, (as_, bc), shape)]
    return call(ATEN.stack.default, (halves, -1), shape_of(before))
