"""Rewrite: attention reads queries, keys and values where they lie, the cache and the new tokens unconcatenated."""

from __future__ import annotations

import dataclasses

from torch import fx

from fxq import kernels
from fxq.core.graph import arguments
from fxq.core.ir import QuantGraph, module_path
from fxq.core.layer import layers_reading
from fxq.core.pipeline import Fusion
from fxq.kernels.op import Op
from fxq.passes.match import edits, patterns
from fxq.passes.match.patterns import ATEN, QUANTIZE, Unfit, is_call, same, shape_of, value_of

_ATTENTION = ATEN.scaled_dot_product_attention.default
_SWAPS = frozenset({ATEN.transpose.int, ATEN.permute.default})


@dataclasses.dataclass(frozen=True)
class FuseAttention(Fusion):
    """``scaled_dot_product_attention`` between transposes becomes ``fxq::attention`` on ``[B, S, heads, head_dim]``.

    Keys and values that are both joined along the tokens from pieces of the same lengths, for attention alone, are
    taken piece by piece. An attention node carries no plan: its remarks stand under the layer that reads its result,
    else as notes under the path of its module.
    """

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of attentions fused."""
        edits.tidy(graph)
        count = 0
        for node in patterns.calls(graph, _ATTENTION):
            name = place_of(node)
            try:
                pieces = len(arguments(fused(graph, node))["k"])
            except Unfit as reason:
                graph.note(name, f"attention left as it is: {reason}")
                continue
            graph.note(name, f"attention to {pieces} pieces of keys and values" if pieces > 1 else "attention fused")
            count += 1
        return count


def place_of(node: fx.Node) -> str:
    """Where remarks about an attention stand: the quantized layer that reads it, else the path of its module."""
    for user in node.users:
        tail = list(patterns.ahead(user, patterns.FREE))[-1] if is_call(user, *_SWAPS) else node
        for reader, _ in patterns.readers(tail):
            if is_call(reader, QUANTIZE) and (layers := layers_reading(reader)):
                return layers[0]
    return module_path(node) or "attention"


def fused(graph: QuantGraph, node: fx.Node, op: Op = kernels.attention) -> fx.Node:
    """The call of an operator that takes the place of one attention.

    Args:
        graph: that is rewritten.
        node: ``scaled_dot_product_attention``.
        op: ``fxq::attention``, or one that takes the same arguments.

    Raises:
        Unfit: when the operator cannot say what it computes.
    """
    named = arguments(node)
    q, k, v = (_untransposed(named[name], name) for name in ("query", "key", "value"))
    _check_plain(named, shape_of(q), shape_of(k), shape_of(v))
    result = result_of(node)
    keys, values = _pieces(k, named["key"]), _pieces(v, named["value"])
    if not keys or not values or not _aligned(keys, values):
        keys, values = [k], [v]
    inputs = (q, *keys, *values)
    edits.check_private(edits.between([result], inputs), [result], inputs)
    args = (q, keys, values)
    edits.check_fits(graph, op, args)
    value = value_of(q).new_empty(shape_of(result))
    found = edits.insert(result, node, op.definition, args, value)
    result.replace_all_uses_with(found)
    edits.erase_unread(result)
    return found


def _check_plain(named: dict[str, object], q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    """Refuse what the operator cannot say. Shapes are ``[B, S, heads, head_dim]``."""
    if named["attn_mask"] is not None:
        raise Unfit("it has a mask")
    if named["is_causal"]:
        raise Unfit("it is causal")
    if named["dropout_p"]:
        raise Unfit(f"it has a dropout of {named['dropout_p']}")
    if any(len(shape) != 4 for shape in (q, k, v)):
        raise Unfit(f"its query is {patterns.shown(q)}: expected [B, S, heads, head_dim]")
    if not same(q[2:3], k[2:3]):
        raise Unfit(f"{q[2]} query heads share {k[2]} key heads")
    if not same((q[0], *q[2:]), (k[0], *k[2:])) or not same((k[0], *k[2:]), (v[0], *v[2:])):
        raise Unfit(f"query {patterns.shown(q)}, key {patterns.shown(k)} and value {patterns.shown(v)} differ in size")
    scale = named["scale"]
    if scale is not None and (not isinstance(scale, float) or abs(scale * q[3] ** 0.5 - 1) > 1e-6):
        raise Unfit(f"its scale is {scale}: expected head_dim ** -0.5")


def _swapped(node: fx.Node) -> bool:
    """Whether a node exchanges tokens and heads of four axes."""
    if not is_call(node, *_SWAPS) or value_of(node).ndim != 4:
        return False
    if node.target == ATEN.permute.default:
        return [axis % 4 for axis in arguments(node)["dims"]] == [0, 2, 1, 3]
    named = arguments(node)
    return {named["dim0"] % 4, named["dim1"] % 4} == {1, 2}


def _untransposed(node: fx.Node, name: str) -> fx.Node:
    """The ``[B, S, heads, head_dim]`` node behind an operand."""
    for step in patterns.back(node, frozenset({ATEN.contiguous.default, ATEN.clone.default})):
        if _swapped(step):
            return step.all_input_nodes[0]
    raise Unfit(f"its {name} does not come from [B, S, heads, head_dim] through a transpose")


def result_of(node: fx.Node) -> fx.Node:
    """The ``[B, S, heads * head_dim]`` node after attention.

    Raises:
        Unfit: when there is none.
    """
    batch, heads, rows, width = shape_of(node)
    back = patterns.only_user(node)
    if back is None or not _swapped(back):
        raise Unfit("its result is not transposed back to [B, S, heads, head_dim]")
    for step in patterns.ahead(back, patterns.RESHAPES):
        if same(shape_of(step), (batch, rows, heads * width)):
            return step
    raise Unfit("its result is not flattened to [B, S, heads * head_dim]")


def _pieces(node: fx.Node, operand: fx.Node) -> list[fx.Node]:
    """What a tensor is joined from along the tokens, when only attention reads it joined."""
    inner = edits.between([operand], [node]) | {operand}
    if not is_call(node, ATEN.cat.default) or any(user not in inner for user in node.users):
        return []
    named = arguments(node)
    return list(named["tensors"]) if named["dim"] in (1, -3) else []


def _aligned(keys: list[fx.Node], values: list[fx.Node]) -> bool:
    """Whether the pieces have the same lengths.

    Attention asks the sums to be equal, so one pair of lengths may be unproven: it follows from the others.
    """
    pairs = [(shape_of(k)[1:2], shape_of(v)[1:2]) for k, v in zip(keys, values, strict=False)]
    return len(keys) == len(values) and sum(not same(a, b) for a, b in pairs) <= 1
