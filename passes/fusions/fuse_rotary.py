"""Rewrite: the root-mean-square norm of queries and keys and their rotary embedding become one operator."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from fxq import kernels
from fxq.core.ir import QuantGraph, module_path, plan_of
from fxq.core.pipeline import Fusion
from fxq.passes.match import edits, patterns
from fxq.passes.match.patterns import ATEN, FREE, RESHAPES, Unfit, exact_source, same, shape_of, value_of
from fxq.passes.match.rotations import MAKERS, NORMS, Norm, Rotation, norm_of, rotation_of


@dataclasses.dataclass(frozen=True)
class FuseRotary(Fusion):
    """RMSNorm over all heads, the split into heads, and RoPE become ``fxq::rms_norm_rope``.

    Cases: 1. norm and rotation; 2. norm and split into heads alone, as for cross-attention; 3. rotation alone. The norm
    is ``aten.rms_norm`` or its steps; the rotation turns neighbouring channels and is written as a stack or into slices
    of a new tensor. The operator stays in float32 from its input to its result: a 16-bit model that casts between norm,
    weight and rotation rounds less than it did.

    Remarks stand under the linear that makes the input, else as notes under the path of the module.
    """

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of operators made."""
        edits.tidy(graph)
        count = 0
        for maker in patterns.calls(graph, *MAKERS):
            if (rotation := rotation_of(maker)) is not None:
                root = patterns.source(rotation.pairs, FREE)
                count += _attempt(graph, norm_of(root), root, rotation)
        for node in patterns.calls(graph, *NORMS):
            if (norm := norm_of(node)) is not None:
                count += _attempt(graph, norm, node, None)
        return count


def _attempt(graph: QuantGraph, norm: Norm | None, root: fx.Node, rotation: Rotation | None) -> bool:
    """Fuse, or remark why not."""
    x = root if norm is None else norm.x
    plan = plan_of(patterns.source(x, FREE))
    layer = plan.layer if plan is not None else module_path(root) or "rotary"
    parts = [*(["norm"] if norm else []), *(["rotation"] if rotation else [])]
    try:
        _fuse(graph, norm, root, rotation)
    except Unfit as reason:
        graph.note(layer, f"{' and '.join(parts)} after it not fused: {reason}")
        return False
    graph.note(layer, f"{' and '.join(parts)} after it in one pass")
    return True


def _fuse(graph: QuantGraph, norm: Norm | None, root: fx.Node, rotation: Rotation | None) -> None:
    x = exact_source(root) if norm is None else norm.x
    heads = _heads(shape_of(x), root, rotation)
    result = _result(root if rotation is None else rotation.made, (*shape_of(x)[:2], *heads), value_of(x).dtype)
    inputs, made, effects = [x], [result], () if rotation is None else rotation.effects
    if norm is not None:
        if norm.weight is None or norm.eps is None:
            raise Unfit(f"its norm has no {'eps' if norm.weight else 'weight'}")
        inputs.append(norm.weight)
    if rotation is not None:
        inputs += [rotation.cos, rotation.sin]
        made += [*rotation.halves, *effects]
    inner = edits.between(made, inputs)
    edits.check_private(inner, [result, *effects], inputs)
    fused = _insert(graph, max(result, *effects).next if effects else result, result, x, heads, norm, rotation)
    for user in [user for user in result.users if user not in inner]:
        user.replace_input_with(result, fused)
    for effect in effects:
        graph.module.graph.erase_node(effect)
    edits.erase_unread(*(inner - set(effects)))


def _insert(
    graph: QuantGraph,
    before: fx.Node,
    like: fx.Node,
    x: fx.Node,
    heads: tuple[int, int],
    norm: Norm | None,
    rotation: Rotation | None,
) -> fx.Node:
    """The operator's node, and its tables in the shape that it wants."""
    batch, rows, _ = shape_of(x)
    cos, sin = None, None
    if rotation is not None:
        cos, sin = (_table(table, rows, heads[1], before) for table in (rotation.cos, rotation.sin))
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    args = (x, weight, eps, cos, sin, heads[0])
    try:
        edits.check_fits(graph, kernels.rms_norm_rope, args)
    except Unfit:
        edits.erase_unread(*(table for table in (cos, sin) if table is not None))
        raise
    value = value_of(x).new_empty((batch, rows, *heads))
    return edits.insert(before, like, kernels.rms_norm_rope.definition, args, value)


def _heads(x: tuple[int, ...], root: fx.Node, rotation: Rotation | None) -> tuple[int, int]:
    """(heads, head_dim) of what becomes of x, [B, S, heads * head_dim]."""
    if len(x) != 3:
        raise Unfit(f"its input is {patterns.shown(x)}: expected [B, S, heads * head_dim]")
    if rotation is not None:
        pairs = shape_of(rotation.pairs)
        if len(pairs) == 5 and same((*pairs[:2], pairs[2] * pairs[3] * 2), x) and isinstance(pairs[2], int):
            return pairs[2], pairs[3] * 2
        raise Unfit(
            f"it rotates {patterns.shown(pairs)}: expected [B, S, heads, head_dim / 2, 2] of {patterns.shown(x)}"
        )
    for step in patterns.ahead(root, FREE):
        shape = shape_of(step)
        if len(shape) == 4 and same((*shape[:2], shape[2] * shape[3]), x) and isinstance(shape[2], int):
            return shape[2], shape[3]
    raise Unfit("its result is not split into heads")


def _result(made: fx.Node, shape: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
    """The node that holds the result in the shape and dtype in which the operator gives it."""
    for step in reversed(list(patterns.ahead(made, FREE))):
        if same(shape_of(step), shape) and value_of(step).dtype == dtype:
            return step
    raise Unfit(f"its result is not {dtype} {patterns.shown(shape)}, as its input is")


def _table(table: fx.Node, rows: int, head_dim: int, before: fx.Node) -> fx.Node:
    """Cosines or sines as float32 [S, head_dim / 2]."""
    wanted = (rows, head_dim // 2)
    forms = (((rows, 1, wanted[1]), [1]), ((1, rows, 1, wanted[1]), [0, 2]))
    for step in patterns.back(table, RESHAPES):
        if same(shape_of(step), wanted):
            found = step
            break
    else:
        axes = next((axes for form, axes in forms if same(shape_of(table), form)), None)
        if axes is None:
            raise Unfit(f"{table.name} is {patterns.shown(shape_of(table))}: expected {patterns.shown(wanted)}")
        flat = value_of(table).new_empty(wanted)
        found = edits.insert(before, table, ATEN.squeeze.dims, (table, axes), flat)
    if value_of(found).dtype == torch.float32:
        return found
    value = value_of(found).new_empty(wanted, dtype=torch.float32)
    return edits.insert(before, found, ATEN.to.dtype, (found, torch.float32), value)
