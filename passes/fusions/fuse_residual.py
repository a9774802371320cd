"""Rewrite: gate and residual after a linear become the linear's epilogue."""

from __future__ import annotations

import dataclasses

from torch import fx

from fxq import kernels
from fxq.core.graph import arguments, in_order
from fxq.core.ir import QuantGraph, plan_of
from fxq.core.pipeline import Fusion
from fxq.passes.match import edits, patterns
from fxq.passes.match.patterns import (
    ATEN,
    CASTS,
    LINEAR,
    LINEAR_PER_TOKEN,
    Unfit,
    exact_source,
    is_call,
    same,
    shape_of,
    value_of,
)

_ADDING: dict[object, kernels.Op] = {
    LINEAR: kernels.dual_scale_linear_add,
    LINEAR_PER_TOKEN: kernels.dual_scale_linear_per_token_add,
}
"""Product -> the operator that has gate and residual as its epilogue."""


@dataclasses.dataclass(frozen=True)
class FuseResidual(Fusion):
    """``residual + linear`` and ``residual + gate * linear`` become ``fxq::dual_scale_linear_add``.

    With scales per token they become ``fxq::dual_scale_linear_per_token_add``. The gate is one vector for all tokens,
    one per frame or one per token. Casts between are looked through: the operator sums in float32 and stores the
    residual's dtype, which must be the dtype of the sum or of the cast after it. The plan moves to the fused node.
    """

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of linears fused."""
        edits.tidy(graph)
        count = 0
        for linear in patterns.calls(graph, *_ADDING):
            plan, found = plan_of(linear), _sum(linear)
            if plan is None or found is None:
                continue
            what = "residual" if found.factor is None else "gate and residual"
            try:
                _fuse(graph, linear, found)
            except Unfit as reason:
                graph.remark(plan.layer, f"{what} not in its epilogue: {reason}")
                continue
            graph.remark(plan.layer, f"{what} in its epilogue")
            count += 1
        return count


@dataclasses.dataclass(frozen=True)
class _Sum:
    """``total = residual + product``, ``product = factor * gated``; without a gate only ``total`` and ``residual``."""

    total: fx.Node
    residual: fx.Node
    product: fx.Node | None = None
    gated: fx.Node | None = None
    factor: fx.Node | None = None


def _sum(linear: fx.Node) -> _Sum | None:
    """The sum that a linear's result goes into, alone or after a product."""
    for reader, read in patterns.readers(linear):
        if is_call(reader, ATEN.add.Tensor) and (residual := patterns.partner(reader, read)) is not None:
            return _Sum(reader, residual)
        if is_call(reader, ATEN.mul.Tensor) and (factor := patterns.partner(reader, read)) is not None:
            for total, term in patterns.readers(reader):
                if is_call(total, ATEN.add.Tensor) and (residual := patterns.partner(total, term)) is not None:
                    return _Sum(total, residual, reader, read, factor)
    return None


def _fuse(graph: QuantGraph, linear: fx.Node, found: _Sum) -> None:
    rows = shape_of(linear)
    for node in (found.residual, found.total):
        if not same(shape_of(node), rows):
            raise Unfit(f"{node.name} is {patterns.shown(shape_of(node))}: expected {patterns.shown(rows)}")
    residual, result = _stored(found)
    inputs = [*linear.all_input_nodes, residual, *([] if found.factor is None else [found.factor])]
    edits.check_private(edits.between([result], inputs), [result], inputs)
    gate = _gate(found, rows, result)
    op = _ADDING[linear.target]
    target = op.definition
    args = in_order(target, arguments(linear) | {"residual": residual, "gate": gate})
    try:
        edits.check_fits(graph, op, args)
    except Unfit:
        edits.erase_unread(*([] if gate is None else [gate]))
        raise
    fused = edits.insert(result, linear, target, args, value_of(result))
    result.replace_all_uses_with(fused)
    edits.move_plan(linear, fused)
    edits.erase_unread(result)


def _stored(found: _Sum) -> tuple[fx.Node, fx.Node]:
    """The residual as it is stored, and the node in the same dtype that holds the sum."""
    for residual in (exact_source(found.residual), found.residual):
        for result in reversed(list(patterns.ahead(found.total, CASTS))):
            if value_of(result).dtype == value_of(residual).dtype:
                return residual, result
    raise Unfit(f"its residual is {value_of(found.residual).dtype}, their sum {value_of(found.total).dtype}")


def _gate(found: _Sum, tokens: tuple[int, ...], before: fx.Node) -> fx.Node | None:
    """The gate as [B, F, N]."""
    if found.factor is None or found.product is None or found.gated is None:
        return None
    if not same(shape_of(found.product), shape_of(found.gated)):
        raise Unfit(f"its gate is {patterns.shown(shape_of(found.factor))}: it widens the result")
    frames = patterns.frames_of(found.factor, found.product, tokens)
    return edits.frame_vector(exact_source(found.factor), frames, before)
