"""Rewrite: LayerNorm, modulation and the quantization of what follows become one operator."""

from __future__ import annotations

import dataclasses

from torch import fx

from fxq import kernels
from fxq.core.graph import arguments, in_order
from fxq.core.ir import QuantGraph, example_value
from fxq.core.layer import layers_reading
from fxq.core.pipeline import Fusion
from fxq.passes.match import edits, patterns
from fxq.passes.match.patterns import ATEN, FREE, Unfit, exact_source, is_call, same, shape_of

_NORMED: dict[object, kernels.Op] = {
    kernels.quantize_act.definition: kernels.norm_quantize,
    kernels.quantize_per_token.definition: kernels.norm_quantize_per_token,
    kernels.quantize_per_token_asymmetric.definition: kernels.norm_quantize_per_token_asymmetric,
}
"""Quantization -> the operator that is it behind a norm."""
_ELEMENTWISE = FREE | {ATEN.mul.Tensor, ATEN.add.Tensor}


@dataclasses.dataclass(frozen=True)
class FuseNormQuantize(Fusion):
    """``layer_norm`` and the ``quantize_act`` of its result become ``fxq::norm_quantize``.

    Quantizations with scales per token become ``fxq::norm_quantize_per_token`` or its asymmetric twin.

    Cases: 1. a norm with or without weight and bias; 2. followed by ``* (1 + gain) + shift``, where gain and shift are
    one vector for all tokens, one per frame or one per token; 3. views and casts anywhere between. Each of several
    quantizations of one norm gets it, which costs less than to store the float tensor.

    The operator stays in float32 from the norm to the integers, so a 16-bit model rounds less than it did.
    """

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of quantizations fused."""
        edits.tidy(graph)
        count = 0
        for norm in patterns.calls(graph, ATEN.layer_norm.default):
            behind = _quantizations(norm)
            layers = [layer for node in behind for layer in layers_reading(node)]
            if not behind:
                continue
            try:
                _fuse(graph, norm)
                text = "quantize fused into its norm"
                count += len(behind)
            except Unfit as reason:
                text = f"quantize not fused into its norm: {reason}"
            for layer in layers:
                graph.remark(layer, text)
        return count


def _quantizations(norm: fx.Node) -> list[fx.Node]:
    """The quantize nodes that a norm feeds through sums, products, views and casts."""
    found: dict[fx.Node, None] = {}
    queue, seen = [norm], {norm}
    while queue:
        for user in queue.pop(0).users:
            if is_call(user, *_NORMED):
                found[user] = None
            elif is_call(user, *_ELEMENTWISE) and user not in seen:
                seen.add(user)
                queue.append(user)
    return list(found)


@dataclasses.dataclass(frozen=True)
class _Modulation:
    """``(1 + gain)`` and ``shift`` as the graph has them, the gain alone, and the shape [B, F, K] of both."""

    factor: fx.Node
    gain: fx.Node
    shift: fx.Node
    frames: tuple[int, ...]


def _fuse(graph: QuantGraph, norm: fx.Node) -> None:
    """Fuse a norm with all that read it."""
    named = arguments(norm)
    if len(named["normalized_shape"]) != 1:
        raise Unfit(f"it is over {len(named['normalized_shape'])} dimensions")
    x = exact_source(named["input"])
    if len(shape_of(x)) != 3:
        raise Unfit(f"its input is {patterns.shown(shape_of(x))}: expected [B, S, K]")
    modulation, result = _modulation(norm, shape_of(x))
    quantizes = _readers(result, shape_of(x))
    affine = [named[name] for name in ("weight", "bias")]
    inputs = [n for n in (x, *affine) if n is not None]
    inputs += [] if modulation is None else [modulation.factor, modulation.gain, modulation.shift]
    edits.check_private(edits.between(quantizes, inputs), quantizes, inputs)
    vectors: list[fx.Node | None] = [None, None]
    if modulation is not None:
        made = (modulation.gain, modulation.shift)
        vectors = [edits.frame_vector(vector, modulation.frames, min(quantizes)) for vector in made]
    weight, bias = (None if n is None else exact_source(n) for n in affine)
    normed = {"x": x, "weight": weight, "bias": bias, "gain": vectors[0], "shift": vectors[1], "eps": named["eps"]}
    try:
        for quantize in quantizes:
            _replace(graph, quantize, normed)
    finally:
        edits.erase_unread(*(vector for vector in vectors if vector is not None))


def _replace(graph: QuantGraph, quantize: fx.Node, normed: dict[str, object]) -> None:
    op = _NORMED[quantize.target]
    args = in_order(op.definition, arguments(quantize) | normed)
    edits.check_fits(graph, op, args)
    fused = edits.insert(quantize, quantize, op.definition, args, example_value(quantize))
    quantize.replace_all_uses_with(fused)
    edits.erase_unread(quantize)


def _modulation(norm: fx.Node, tokens: tuple[int, ...]) -> tuple[_Modulation | None, fx.Node]:
    """The modulation after a norm, or None, and the node that holds the result."""
    last = list(patterns.ahead(norm, FREE))[-1]
    product = patterns.only_user(last)
    if not is_call(product, ATEN.mul.Tensor) or (factor := patterns.partner(product, last)) is None:
        return None, norm
    gain = _less_one(factor)
    scaled = list(patterns.ahead(product, FREE))[-1]
    total = patterns.only_user(scaled)
    if not is_call(total, ATEN.add.Tensor) or (shift := patterns.partner(total, scaled)) is None:
        raise Unfit("no shift is added to the product with its gain")
    rows = shape_of(product)
    if not same(rows, shape_of(last)) or not same(rows, shape_of(total)):
        raise Unfit("its gain or shift changes the shape of the norm's result")
    frames = patterns.frames_of(factor, product, tokens)
    if not same(shape_of(shift), shape_of(factor)):
        raise Unfit(f"gain is {patterns.shown(shape_of(factor))}, shift {patterns.shown(shape_of(shift))}")
    return _Modulation(factor, gain, exact_source(shift), frames), total


def _less_one(factor: fx.Node) -> fx.Node:
    """``gain`` of ``1 + gain``."""
    total = patterns.source(factor, patterns.CASTS)
    if is_call(total, ATEN.add.Tensor) and not total.kwargs and patterns.terms(total)[1] == 1:
        return exact_source(total.all_input_nodes[0])
    raise Unfit("its gain is not of the form 1 + gain")


def _readers(result: fx.Node, rows: tuple[int, ...]) -> list[fx.Node]:
    """The quantizations that read a result, when nothing else does."""
    quantizes = []
    for reader, read in patterns.readers(result):
        if not is_call(reader, *_NORMED):
            raise Unfit(f"{result.name} is also read by {reader.name}")
        batch, *inner, width = shape_of(read)
        if len(inner) != 1 or not same((batch, width), (rows[0], rows[-1])):
            raise Unfit(f"what is quantized is {patterns.shown(shape_of(read))}: expected {patterns.shown(rows)}")
        quantizes.append(reader)
    return quantizes
