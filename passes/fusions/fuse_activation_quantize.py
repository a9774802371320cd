"""Rewrite: the activation after a linear, and the quantization of the next, become the linear's epilogue."""

from __future__ import annotations

import dataclasses

from torch import fx

from fxq import kernels
from fxq.core.graph import arguments, in_order
from fxq.core.ir import QuantGraph, example_value, plan_of
from fxq.core.layer import layers_reading
from fxq.core.pipeline import Fusion
from fxq.kernels.gemm.activations import ACTIVATIONS
from fxq.passes.match import edits, patterns
from fxq.passes.match.patterns import (
    FREE,
    LINEAR,
    QUANTIZE,
    QUANTIZE_PER_TOKEN,
    QUANTIZE_PER_TOKEN_ASYMMETRIC,
    Unfit,
    is_call,
    same,
    shape_of,
)


@dataclasses.dataclass(frozen=True)
class FuseActivationQuantize(Fusion):
    """A linear, an activation or none, and its result's ``quantize_act`` become ``fxq::dual_scale_linear_quantize``.

    With scales per token, which need whole rows, an activation and the quantize of its result become
    ``fxq::activation_quantize_per_token`` or its asymmetric twin, where the kernels of the device have the activation.

    The activations are those of :data:`fxq.kernels.gemm.activations.ACTIVATIONS`. The quantization must be the only
    reader and must keep the channel order: folded permutations do. The value stays in float32 up to the integers, so a
    16-bit model rounds less than it did. The plan moves to the fused node.
    """

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of linears, and of quantizes with scales per token, that were fused."""
        edits.tidy(graph)
        count = 0
        for linear in patterns.calls(graph, LINEAR):
            plan = plan_of(linear)
            activation, result = _activation(linear)
            quantizes = [node for node, _ in patterns.readers(result) if is_call(node, QUANTIZE)]
            if plan is None or not quantizes:
                continue
            what = "the next quantize" if result is linear else f"{_shown(result)} and the next quantize"
            try:
                _fuse(graph, linear, activation, result)
            except Unfit as reason:
                graph.remark(plan.layer, f"{what} not in its epilogue: {reason}")
                continue
            eager = ACTIVATIONS[activation].eager_on(example_value(linear).device.type)
            graph.remark(plan.layer, f"{what} in its epilogue{eager and '; '}{eager}")
            count += 1
        return count + sum(_fuse_per_token(graph, node) for node in patterns.calls(graph, *_ACTIVATED))


_ACTIVATED: dict[object, kernels.Op] = {
    QUANTIZE_PER_TOKEN: kernels.activation_quantize_per_token,
    QUANTIZE_PER_TOKEN_ASYMMETRIC: kernels.activation_quantize_per_token_asymmetric,
}
"""Quantization -> the operator that is it behind an activation."""


def _fuse_per_token(graph: QuantGraph, quantize: fx.Node) -> bool:
    """Whether the activation before a quantize was fused with it."""
    read, op, layers = arguments(quantize)["x"], _ACTIVATED[quantize.target], layers_reading(quantize)
    result = patterns.source(read, FREE)
    name = _name(result)
    if name is None:
        return False
    before = arguments(result)["self"]
    try:
        if eager := ACTIVATIONS[name].eager_on(example_value(result).device.type):
            raise Unfit(eager)
        if not same(shape_of(read), shape_of(before)):
            raise Unfit(
                f"what is quantized is {patterns.shown(shape_of(read))}, not {patterns.shown(shape_of(before))}"
            )
        x = patterns.exact_source(before)
        edits.check_private(edits.between([quantize], [x]), [quantize], [x])
        args = in_order(op.definition, arguments(quantize) | {"x": x, "activation": name})
        edits.check_fits(graph, op, args)
    except Unfit as reason:
        for layer in layers:
            graph.remark(layer, f"{_shown(result)} not fused into its quantize: {reason}")
        return False
    fused = edits.insert(quantize, quantize, op.definition, args, example_value(quantize))
    quantize.replace_all_uses_with(fused)
    edits.erase_unread(quantize)
    for layer in layers:
        graph.remark(layer, f"{_shown(result)} fused into its quantize")
    return True


def _name(call: fx.Node) -> str | None:
    """Of the activation that a node calls."""
    for name, activation in ACTIVATIONS.items():
        values = activation.calls.get(call.target)
        if values is not None and values.items() <= arguments(call).items():
            return name
    return None


def _activation(linear: fx.Node) -> tuple[str, fx.Node]:
    """Name of the activation after a linear, and the node that holds its result."""
    for reader, _ in patterns.readers(linear):
        if (name := _name(reader)) is not None:
            return name, reader
    return "none", linear


def _shown(activation: fx.Node) -> str:
    """As "gelu" of the call of an activation."""
    return str(activation.target).split(".")[-2]


def _fuse(graph: QuantGraph, linear: fx.Node, activation: str, result: fx.Node) -> None:
    quantize, *others = (node for node, _ in patterns.readers(result))
    if others:
        raise Unfit(f"its result is read by {quantize.name} and {', '.join(node.name for node in others)}")
    wanted = arguments(quantize)
    if wanted["perm"] is not None:
        layers = ", ".join(layers_reading(quantize))
        raise Unfit(f"FoldPermutations did not fold the channel order of {layers}")
    if not same(shape_of(quantize), shape_of(linear)):
        raise Unfit(
            f"what is quantized is {patterns.shown(shape_of(quantize))}, the result {patterns.shown(shape_of(linear))}"
        )
    operands = linear.all_input_nodes
    edits.check_private(edits.between([quantize], operands), [quantize], operands)
    target = kernels.dual_scale_linear_quantize.definition
    out = {f"out_{name}": wanted[name] for name in ("scale", "zero_point", "split", "bits")}
    args = in_order(target, arguments(linear) | {"activation": activation} | out)
    edits.check_fits(graph, kernels.dual_scale_linear_quantize, args)
    fused = edits.insert(quantize, linear, target, args, example_value(quantize))
    quantize.replace_all_uses_with(fused)
    edits.move_plan(linear, fused)
    edits.erase_unread(quantize)
