"""Which dimensions of a graph's values and stored tensors are split over ranks, given the linears whose outputs are.

Axes that operators match element by element are split together; a reshape splits its slowest part (the heads, of heads
and their channels). Operators that tell places along an axis apart, or are not known, refuse a split of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import fx

from fxq.core.graph import arguments
from fxq.core.ir import plan_of
from fxq.core.layer import FROZEN_PRODUCTS, FROZEN_QUANTIZES, MEASURING, PER_TOKEN, quantize_of
from fxq.parallel.plan import ParallelError
from fxq.passes.match.axis_groups import Axis, AxisBuilder, AxisGroups
from fxq.passes.match.axis_rules import pointwise, visit
from fxq.passes.match.patterns import ATEN, is_call, value_of

Owner = fx.Node | str
"""A node's value, or a stored tensor by name."""

LINEARS = (*FROZEN_PRODUCTS, ATEN.linear.default)


_ATTENTION = ATEN.scaled_dot_product_attention.default
_MIXING = (
    ATEN.layer_norm.default,
    ATEN.softmax.int,
    ATEN._softmax.default,
    ATEN.amax.default,
    ATEN.amin.default,
    _ATTENTION,
)
"""Join elements in ways that a sum over ranks does not finish."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Dimension ``dim`` of a value is split because the outputs of ``layer`` are."""

    dim: int
    layer: str


Splits = Mapping[Owner, Split]


class _Builder(AxisBuilder):
    """Also keeps every node that pins an axis."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.here: fx.Node | None = None
        self.pinned: list[tuple[Axis, fx.Node]] = []

    def pin(self, axes: Sequence[Axis], why: str) -> None:
        """Note the node that is being visited."""
        super().pin(axes, why)
        assert self.here is not None
        self.pinned += [(axis, self.here) for axis in axes]


def _quantize(builder: AxisBuilder, node: fx.Node) -> None:
    """``fxq::quantize_per_token`` and its like: the integers' channels have an order of their own."""
    x = arguments(node)["x"]
    for axis, target in zip(builder.axes(x)[:-1], builder.axes(node)[:-1], strict=True):
        builder.tie(axis, target)


def _linear(builder: AxisBuilder, node: fx.Node) -> None:
    """``fxq::dual_scale_linear_per_token``."""
    named, out = arguments(node), builder.axes(node)
    q, scale, weight, weight_scale, offset = (
        builder.axes(named[name]) for name in ("q", "input_scale", "weight", "weight_scale", "offset")
    )
    builder.tie(weight[0], weight_scale[1], offset[0], out[-1])
    for axes in zip(q[:-1], scale[:-1], out[:-1], strict=True):
        builder.tie(*axes)


# Operators that write match element by element, though a new order of what they write does not follow.
_RULES: dict[object, Callable[[AxisBuilder, fx.Node], None]] = {
    ATEN.empty_like.default: pointwise,
    ATEN.copy_.default: pointwise,
    **dict.fromkeys(MEASURING, _quantize),
    PER_TOKEN.product.definition: _linear,
}


def find_splits(module: fx.GraphModule, columns: Mapping[fx.Node, str], size: int) -> Splits:
    """Follow the split outputs of linears through the graph.

    Args:
        module: a frozen graph with recorded values.
        columns: linear nodes whose last dimension is split, with their layers.
        size: number of ranks.

    Returns:
        The split dimension of every value and stored tensor that has one.

    Raises:
        ParallelError: naming the layer and the node where the split cannot go on.
    """
    builder = _Builder(module)
    for node in module.graph.nodes:
        builder.here = node
        _RULES.get(node.target, visit)(builder, node)
    groups = builder.finish()
    layers = _close(groups, {groups.number[builder.axes(node)[-1]]: layer for node, layer in columns.items()})
    _check_sizes(groups, layers, size)
    _check_pins(groups, layers, builder.pinned)
    found: dict[Owner, Split] = {}
    for number, layer in layers.items():
        for axis in groups.members[number]:
            if axis.owner in found:
                raise ParallelError(f"layer {layer}: {_name(axis.owner)} would be split along two of its dimensions")
            found[axis.owner] = Split(axis.dim, layer)
    return found


def _name(owner: Owner) -> str:
    return owner if isinstance(owner, str) else owner.name


def _close(groups: AxisGroups, layers: dict[int, str]) -> dict[int, str]:
    """All groups that are split with the given ones, with the layer that each comes from."""
    layers, todo = dict(layers), list(layers)
    while todo:
        here = todo.pop()
        for product in groups.products:
            first, *others = product.children
            if here in others:
                raise ParallelError(
                    f"layer {layers[here]}: {product.where} joins its split outputs behind another dimension; "
                    "replicate the layer"
                )
            for other in {product.parent: [first], first: [product.parent]}.get(here, []):
                if other not in layers:
                    layers[other] = layers[here]
                    todo.append(other)
    return layers


def _check_sizes(groups: AxisGroups, layers: Mapping[int, str], size: int) -> None:
    reshapes = {product.children[0]: product.where for product in groups.products}
    for number, layer in layers.items():
        total = groups.sizes[number]
        if total is None or total % size:
            parts = f", {total} parts (heads) in {reshapes[number]}," if number in reshapes else f" ({total} channels)"
            raise ParallelError(
                f"layer {layer}: its outputs{parts} cannot be split evenly over {size} ranks; use a number of ranks "
                f"that divides {total}, or replicate the layer"
            )


def _check_pins(groups: AxisGroups, layers: Mapping[int, str], pinned: Sequence[tuple[Axis, fx.Node]]) -> None:
    """Inputs may be split, and so may results that go on from an input (caches); nothing else that looks at places."""
    inputs = {groups.number[axis] for axis, node in pinned if node.op == "placeholder"}
    for axis, node in pinned:
        layer = layers.get(number := groups.number[axis])
        if layer is None or node.op == "placeholder" or (node.op == "output" and number in inputs):
            continue
        what = "is a result of the model" if node.op == "output" else f"is needed whole by {node.name} ({node.target})"
        raise ParallelError(
            f"layer {layer}: {_name(axis.owner)} would be split but {what}; "
            'plan the linear between them as "row", or replicate the layer'
        )


def joins(node: fx.Node, splits: Splits) -> bool:
    """Whether an operator (a norm, a reduction, attention) joins the split channels of its first input."""
    x = node.all_input_nodes[0]
    return x in splits and splits[x].dim in _joined(node, len(value_of(x).shape))


def _joined(node: fx.Node, rank: int) -> set[int]:
    """Dimensions of its first input, of ``rank`` dimensions, whose elements an operator joins."""
    named = arguments(node)
    if is_call(node, _ATTENTION):
        return {rank - 1, rank - 2}
    if "normalized_shape" in named:
        return set(range(rank - len(named["normalized_shape"]), rank))
    dims = named["dim"]
    if dims is None or dims == []:
        return set(range(rank))
    return {dim % rank for dim in ([dims] if isinstance(dims, int) else dims)}


def check_mixing(module: fx.GraphModule, splits: Splits) -> None:
    """Refuse operators that need the split channels of all ranks.

    Raises:
        ParallelError: naming the layer and the operator.
    """
    for node in module.graph.nodes:
        if is_call(node, *_MIXING) and joins(node, splits):
            raise ParallelError(
                f"layer {splits[node.all_input_nodes[0]].layer}: {node.name} ({node.target}) needs the split channels "
                "of all ranks; replicate the layer"
            )


def check_readers(module: fx.GraphModule, splits: Splits, rows: Mapping[fx.Node, str]) -> None:
    """Make sure that linears read split channels if and only if they are row layers.

    Raises:
        ParallelError: naming the layer, and what to plan instead.
    """
    for node, layer in rows.items():
        if not is_call(node, *LINEARS):
            raise ParallelError(f"layer {layer} is {node.target}: only linears of a frozen graph can be split by rows")
    for node in module.graph.nodes:
        if not is_call(node, *LINEARS):
            continue
        x = arguments(quantize_before(node))["x"] if is_call(node, *FROZEN_PRODUCTS) else node.all_input_nodes[0]
        split = splits[x] if x in splits and splits[x].dim == len(value_of(x).shape) - 1 else None
        if split is not None and node not in rows:
            name = plan.layer if (plan := plan_of(node)) is not None else node.name
            raise ParallelError(
                f'layer {name} reads the split outputs of {split.layer}: plan it as "row", or replicate {split.layer}'
            )
        if split is None and node in rows:
            raise ParallelError(
                f'layer {rows[node]} is planned as "row" but its input {x.name} is whole on every rank: plan the '
                'linear before it as "column", or replicate it'
            )


def quantize_before(linear: fx.Node) -> fx.Node:
    """The node that makes the integers of an integer linear's input.

    Raises:
        ParallelError: when it is no quantize operator.
    """
    node = quantize_of(linear)
    if not is_call(node, *FROZEN_QUANTIZES):
        made = "no operator" if node is None else node.target
        raise ParallelError(f"{linear.name}: its input is made by {made}; give a module that is not optimized")
    return node
