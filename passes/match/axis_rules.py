"""What operators ask of the order of the axes they read and give; what is not listed here pins them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx

from fxq import kernels
from fxq.core.graph import arguments
from fxq.core.ir import example_value
from fxq.passes.match.axis_groups import Axis, AxisBuilder, AxisGroups, known

_ATEN = torch.ops.aten


def axis_groups(module: fx.GraphModule) -> AxisGroups:
    """Analyse a captured or quantized graph; operators that are not known here pin what they read and give."""
    builder = AxisBuilder(module)
    for node in module.graph.nodes:
        visit(builder, node)
    return builder.finish()


def visit(b: AxisBuilder, node: fx.Node) -> None:
    """Add what one node asks for."""
    if node.op == "placeholder":
        b.pin(b.axes(node), f"{node.name} is an input of the model")
    elif node.op == "output":
        for value in node.all_input_nodes:
            b.pin(b.axes(value), f"{value.name} is a result of the model")
    elif node.op == "call_function":
        rule = _RULES.get(node.target)
        if rule is None and _is_pointwise(node):
            rule = pointwise
        if rule is None or (rule is not ignore and example_value(node) is None):
            rule = unknown
        rule(b, node)
    elif node.op != "get_attr":
        unknown(b, node)


def _is_pointwise(node: fx.Node) -> bool:
    op = node.target
    return isinstance(op, torch._ops.OpOverload) and torch.Tag.pointwise in op.tags and not op._schema.is_mutable


def _depends(node: fx.Node) -> str:
    return f"{node.name} ({node.target}) depends on it"


def ignore(b: AxisBuilder, node: fx.Node) -> None:
    """Reads no elements."""


def unknown(b: AxisBuilder, node: fx.Node) -> None:
    """Pins what the node reads and gives."""
    for value in (node, *node.all_input_nodes):
        b.pin(b.axes(value), _depends(node))


def pointwise(b: AxisBuilder, node: fx.Node) -> None:
    """Element by element, with broadcasting from the right."""
    out = b.axes(node)
    for value in node.all_input_nodes:
        _align(b, b.axes(value), out)


def _align(b: AxisBuilder, axes: Sequence[Axis], out: Sequence[Axis]) -> None:
    # From the right, as broadcasting does; an axis of length 1 is repeated and says nothing about the other's order.
    for axis, target in zip(reversed(axes), reversed(out), strict=False):
        if not known(b.size[axis] == 1):
            b.tie(axis, target)


def _reduce(b: AxisBuilder, node: fx.Node) -> None:
    axes, out = b.axes(node.args[0]), b.axes(node)
    dims = arguments(node)["dim"] or list(range(len(axes)))
    gone = {dim % len(axes) for dim in ([dims] if isinstance(dims, int) else dims)}
    kept = [axis for axis in axes if axis.dim not in gone]
    left = [axis for axis in out if axis.dim not in gone] if len(out) == len(axes) else out
    for axis, target in zip(kept, left, strict=True):
        b.tie(axis, target)


def _linear(b: AxisBuilder, node: fx.Node) -> None:
    named, out = arguments(node), b.axes(node)
    x, weight, bias = (b.axes(named[name]) for name in ("input", "weight", "bias"))
    _align(b, x[:-1], out[:-1])  # x [..., K], weight [N, K], bias [N], out [..., N]
    b.tie(x[-1], weight[1])
    b.tie(weight[0], out[-1], *bias)


def _joint_sizes(node: object) -> list[int]:
    """Sizes of the parts when all that reads a GEMM is one split of its outputs."""
    if not isinstance(node, fx.Node) or node.target != kernels.dual_scale_linear.definition or len(node.users) != 1:
        return []
    (reader,) = node.users
    if reader.target != _ATEN.split_with_sizes.default or arguments(reader)["dim"] != -1:
        return []
    return list(arguments(reader)["split_sizes"])


def _integer_linear(b: AxisBuilder, node: fx.Node) -> None:
    named, out = arguments(node), b.axes(node)
    q, weight, scale, offset = (b.axes(named[name]) for name in ("q", "weight", "weight_scale", "offset"))
    # q [..., K], weight [N, K] or packed or in panels, weight_scale [G, N], input_scale [G], offset [N], out [..., N].
    # K stays as its quantize ordered it, ``[normal | outlier]``: split and packed bytes go by it.
    _align(b, q[:-1], out[:-1])
    b.pin([q[-1], *weight[1:], scale[0], *b.axes(named["input_scale"])], _depends(node))
    rows = [weight[0], scale[1], offset[0]]
    # A joint GEMM: every layer's rows may change their order among themselves.
    start = 0
    for size in _joint_sizes(node):
        parts = [axis._replace(start=start) for axis in rows]
        b.tie(*parts)
        b.size.update(dict.fromkeys(parts, size))
        start += size
    if not start:
        b.tie(*rows, out[-1])


def _split(b: AxisBuilder, node: fx.Node) -> None:
    x, out, dim = b.axes(node.args[0]), b.axes(node), arguments(node)["dim"]
    dim %= len(x)
    for axis, target in zip(x, out, strict=True):
        if axis.dim != dim:
            b.tie(axis, target)
    # Where the parts are those of a joint GEMM, _integer_linear and _getitem tie them one by one.
    if not _joint_sizes(node.args[0]):
        b.pin([x[dim], out[dim]], _depends(node))


def _getitem(b: AxisBuilder, node: fx.Node) -> None:
    source, index = node.args
    whole, out = b.axes(source), b.axes(node)
    # The first of several results stands for all of them; nothing is known of one with other dimensions.
    if len(whole) != len(out):
        return unknown(b, node)
    joint = source.args[0] if isinstance(source, fx.Node) and source.args else None
    if sizes := _joint_sizes(joint):
        weight = b.axes(arguments(joint)["weight"])[0]  # type: ignore[arg-type]
        b.tie(weight._replace(start=sum(sizes[: int(index)])), out.pop())  # type: ignore[arg-type]
    for axis, target in zip(whole, out, strict=False):
        b.tie(axis, target)


def _quantize(b: AxisBuilder, node: fx.Node) -> None:
    x, out = b.axes(arguments(node)["x"]), b.axes(node)
    _align(b, x[:-1], out[:-1])
    # x [..., K]: the gather inside takes any order of x, so what it gives is pinned and what it reads is free.
    b.reads.append((x[-1], node))
    for tensor in (node, *node.all_input_nodes[1:]):
        b.pin(b.axes(tensor)[-1:], _depends(node))


def _attention(b: AxisBuilder, node: fx.Node) -> None:
    named, out = arguments(node), b.axes(node)
    q, k, v = (b.axes(named[name]) for name in ("query", "key", "value"))
    if not len(q) == len(k) == len(v) == len(out):
        return unknown(b, node)
    # q [..., S, D], k [..., L, D], v [..., L, V], out [..., S, V]: sums over D and over L do not mind their order.
    b.tie(q[-1], k[-1])
    b.tie(v[-1], out[-1])
    b.tie(q[-2], out[-2])
    b.tie(k[-2], v[-2])
    for axes in (q, k, v):
        _align(b, axes[:-2], out[:-2])
        # Lengths that differ: several heads of q share one of k, by position.
        if any(not known(b.size[a] == b.size[o]) for a, o in zip(axes[:-2], out[:-2], strict=True)):
            b.pin([*axes[:-2], *out[:-2]], _depends(node))
    if (mask := named["attn_mask"]) is not None:
        _align(b, b.axes(mask), [*out[:-2], q[-2], k[-2]])
    if named["is_causal"]:  # compares positions
        b.pin([q[-2], k[-2]], _depends(node))


def _pieces(b: AxisBuilder, node: fx.Node) -> None:
    """``fxq::attention``: keys and values in pieces, heads joined in the result."""
    named, out = arguments(node), b.axes(node)
    q = b.axes(named["q"])
    keys, values = ([b.axes(piece) for piece in named[name]] for name in ("k", "v"))
    # q [B, S, H, D], k and v [B, L_i, H, D], out [B, S, H * D]. Pieces share all but their length.
    b.tie(q[0], out[0])
    b.tie(q[1], out[1])
    for k, v in zip(keys, values, strict=True):
        b.tie(q[0], k[0], v[0])
        b.tie(k[1], v[1])
        b.tie(q[2], k[2], v[2])
        b.tie(q[3], k[3])
        b.tie(values[0][3], v[3])
    b.product(out[2], values[0][2:], node)


def _rotate(b: AxisBuilder, node: fx.Node) -> None:
    """``fxq::rms_norm_rope``: a norm over all channels, then pairs of channels of each head."""
    named, out = arguments(node), b.axes(node)
    x, cos = b.axes(named["x"]), named["cos"]
    # x [B, S, H * D], weight [H * D], cos and sin [S, D / 2], out [B, S, H, D]
    _align(b, x[:2], out[:2])
    _align(b, b.axes(named["weight"]), x)
    b.product(x[2], out[2:], node)
    # Tables pair a position with a row of theirs, and neighbouring channels with each other.
    if cos is not None:
        b.pin([x[1], out[3], *b.axes(cos), *b.axes(named["sin"])], _depends(node))


def _convolution(b: AxisBuilder, node: fx.Node) -> None:
    named, out = arguments(node), b.axes(node)
    x, weight, bias = (b.axes(named[name]) for name in ("input", "weight", "bias"))
    if len(x) != len(weight) or named["groups"] != 1:
        return unknown(b, node)
    # x [B, C, ...], weight [O, C, ...], bias [O], out [B, O, ...]; B and O are free, the rest stays as it is.
    b.tie(x[0], out[0])
    b.tie(weight[0], out[1], *bias)
    b.pin([*x[1:], *weight[1:], *out[2:]], _depends(node))


def _transpose(b: AxisBuilder, node: fx.Node) -> None:
    named, x, out = arguments(node), b.axes(node.args[0]), b.axes(node)
    first, second = (named[name] % len(x) for name in ("dim0", "dim1"))
    order = list(range(len(x)))
    order[first], order[second] = second, first
    for target, dim in zip(out, order, strict=True):
        b.tie(x[dim], target)


def _permute(b: AxisBuilder, node: fx.Node) -> None:
    x, out = b.axes(node.args[0]), b.axes(node)
    for target, dim in zip(out, arguments(node)["dims"], strict=True):
        b.tie(x[dim], target)


def _drop(b: AxisBuilder, node: fx.Node) -> None:
    """``select`` and ``unbind``: one dimension less, whose places are told apart."""
    x, out, dim = b.axes(node.args[0]), b.axes(node), arguments(node)["dim"]
    gone = x.pop(dim)
    for axis, target in zip(x, out, strict=True):
        b.tie(axis, target)
    b.pin([gone], _depends(node))


def _slice(b: AxisBuilder, node: fx.Node) -> None:
    dim = arguments(node)["dim"]
    for axis, target in zip(b.axes(node.args[0]), b.axes(node), strict=True):
        whole = known(b.size[axis] == b.size[target])
        # A slice of everything is no slice; any other one takes places by number.
        if axis.dim != dim % len(b.shape(node)) or (whole and arguments(node)["step"] == 1):
            b.tie(axis, target)
        else:
            b.pin([axis, target], _depends(node))


def _join(b: AxisBuilder, node: fx.Node) -> None:
    """``cat`` and ``stack``."""
    out, dim = b.axes(node), arguments(node)["dim"]
    dim %= len(out)
    b.pin([out[dim]], _depends(node))
    for value in node.args[0]:  # type: ignore[union-attr]
        axes = b.axes(value)
        if len(axes) == len(out):  # ``cat``: ``stack`` adds the axis it joins along
            b.pin([axes[dim]], _depends(node))
            axes.pop(dim)
        for axis, target in zip(axes, [*out[:dim], *out[dim + 1 :]], strict=True):
            b.tie(axis, target)


def _reshape(b: AxisBuilder, node: fx.Node) -> None:
    """Any reshape: runs of dimensions with equal products, as far as the sizes tell."""
    old = [axis for axis in b.axes(node.args[0]) if not known(b.size[axis] == 1)]
    new = [axis for axis in b.axes(node) if not known(b.size[axis] == 1)]
    # (2, 3, 4) -> (6, 4) is the runs 2, 3 | 6 and 4 | 4; (2, 6) -> (4, 3) mixes axes and is pinned from there on.
    while old and new:
        run = _matching(b, old, new)
        if run is None or (run[0] > 1 and run[1] > 1):
            break
        left, right = old[: run[0]], new[: run[1]]
        old, new = old[run[0] :], new[run[1] :]
        if len(right) == 1:
            b.product(right[0], left, node)
        else:
            b.product(left[0], right, node)
    b.pin([*old, *new], _depends(node))


def _matching(b: AxisBuilder, old: list[Axis], new: list[Axis]) -> tuple[int, int] | None:
    """How many leading dimensions of each have equal products: the least numbers."""
    for total in range(2, len(old) + len(new) + 1):
        for i in range(1, total):
            if i <= len(old) and total - i <= len(new):
                sizes = [math.prod(b.size[axis] for axis in axes) for axes in (old[:i], new[: total - i])]
                if known(sizes[0] == sizes[1]):
                    return i, total - i
    return None


def _like_first(b: AxisBuilder, node: fx.Node) -> None:
    """The elements of the first argument, perhaps repeated."""
    _align(b, b.axes(node.args[0]), b.axes(node))


def _normal(b: AxisBuilder, node: fx.Node) -> None:
    """A norm: the affine tensors lie along the last dimensions."""
    _like_first(b, node)
    named = arguments(node)
    for name in ("weight", "bias"):
        _align(b, b.axes(named.get(name)), b.axes(node))


Rule = Callable[[AxisBuilder, fx.Node], None]

_ATTEND: dict[object, Rule] = {op.definition: _pieces for op in (kernels.attention, *kernels.ATTENTIONS.values())}
_RULES: Mapping[object, Rule] = {
    op: rule
    for rule, operators in (
        (ignore, "sym_size.int _assert_tensor_metadata.default _assert_scalar.default"),
        (
            _like_first,
            "to.dtype to.dtype_layout to.device to.other type_as.default _to_copy.default clone.default"
            " contiguous.default alias.default detach.default dropout.default expand.default softmax.int"
            " _softmax.default",
        ),
        (_normal, "layer_norm.default rms_norm.default"),
        (_reduce, "mean.dim sum.dim_IntList amax.default amin.default"),
        (_linear, "linear.default"),
        (_attention, "scaled_dot_product_attention.default"),
        (_convolution, "conv1d.default conv2d.default conv3d.default"),
        (_transpose, "transpose.int"),
        (_permute, "permute.default"),
        (_drop, "select.int unbind.int"),
        (_split, "split_with_sizes.default split.Tensor chunk.default"),
        (_slice, "slice.Tensor"),
        (_join, "cat.default stack.default"),
        (
            _reshape,
            "view.default reshape.default _unsafe_view.default flatten.using_ints unflatten.int unsqueeze.default"
            " squeeze.dim",
        ),
    )
    for op in (operator.attrgetter(name)(_ATEN) for name in operators.split())
} | {
    operator.getitem: _getitem,
    kernels.quantize_act.definition: _quantize,
    kernels.dual_scale_linear.definition: _integer_linear,
    kernels.rms_norm_rope.definition: _rotate,
    **_ATTEND,
}
