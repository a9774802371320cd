"""One quantized product in operators of torch alone: what :class:`~fxq.passes.qdq.to_qdq.ToQdq` puts in its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx

from fxq import numerics
from fxq.core.config import Scheme
from fxq.core.graph import arguments
from fxq.core.ir import QuantGraph, clear_plan, example_value, get_tensor, inherit_meta, set_plan
from fxq.core.layer import QuantizedLayer

ATEN, QDQ = torch.ops.aten, torch.ops.quantized_decomposed
BYTE = 128
SAFE_BITS = 15
"""Bits of an activation and a weight together, up to which two products fit 16 bits."""


def may_saturate(scheme: Scheme) -> bool:
    """Whether x86 CPUs without VNNI compute the layer's product wrong: they add pairs of u8 x s8 in 16 bits."""
    return scheme.integer_bits + scheme.input_bits > SAFE_BITS


def halves(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights as a sum of two that have 7 bits each: no pair of their products with bytes exceeds 16 bits."""
    low = weight >> 1
    return low, weight - low


_OF_A_GROUP = ("weight", "weight_scale", "weight_rest", "weight_sum")
LOWERED_TENSORS = (*_OF_A_GROUP, *(f"outlier_{name}" for name in _OF_A_GROUP), "offset", "outliers", "normal")
"""What a lowered layer may store under its name."""


class Part(NamedTuple):
    """One scale group of a layer.

    ``channels``: the input channels it reads, None for all of them in the model's order, a slice for neighbours, int64
    indices for any others. ``weight`` int8 [N, channels], ``weight_scale`` float32 [N]. ``own`` float32 [channels] is 0
    where a channel is read that belongs to the other group; None when there is none.
    """

    channels: Tensor | slice | None
    weight: Tensor
    weight_scale: Tensor
    own: Tensor | None


def parts_of(weight: Tensor, weight_scale: Tensor, perm: Tensor | None, split: int) -> list[Part]:
    """Scale groups of a layer without a gather of its whole input.

    With ``perm`` the normal group reads every channel in the model's order and has weight 0 where the outliers are, so
    that only these are gathered: its integers stay what they are.

    Args:
        weight: int8 [N, K] in ``[normal | outlier]`` order, unpacked.
        weight_scale: float32 [G, N].
        perm: int32 [K] or None.
        split: number of normal channels.
    """
    width = weight.shape[1]
    parts = []
    for g, group in enumerate(numerics.group_slices(width, split)):
        channels: Tensor | slice | None = None if split == width else group
        values, own = weight[:, group], None
        if perm is not None:
            channels = None if g == 0 else perm[group].long()
            if g == 0:
                values = torch.zeros_like(weight).index_copy_(1, perm[group].long(), values)
                own = weight_scale.new_ones(width).index_fill_(0, perm[split:].long(), 0)
        parts.append(Part(channels, values.contiguous(), weight_scale[g].contiguous(), own))
    return parts


class Layer(ABC):
    """The rewrite of one layer of a frozen graph, whose input is made by ``quantize``."""

    def __init__(
        self,
        graph: QuantGraph,
        layer: QuantizedLayer,
        quantize: fx.Node,
        stored: dict[str, Tensor],
        in_halves: bool = False,
        signed: bool = False,
    ) -> None:
        self.graph, self.layer, self.node, self.stored = graph, layer, layer.node, stored
        self.in_halves = in_halves and may_saturate(layer.scheme)
        self.quantize = arguments(quantize)
        self.x: fx.Node = self.quantize["x"]
        self.input_bits: int = self.quantize["bits"]
        # Activations are carried as uint8, because CPU kernels multiply uint8 by int8, and no larger than they must be.
        self.shift = 0 if signed else 1 << (self.input_bits - 1)
        self.signed = signed
        self.x_value, self.value = example_value(self.x), example_value(self.node)

    def _tensor(self, node: object) -> Tensor:
        assert isinstance(node, fx.Node)
        return get_tensor(self.graph.module, str(node.target))

    def _parts(self) -> list[Part]:
        integers, perm = self.layer.codes(self.graph.module), self.quantize["perm"]
        order = None if perm is None else self._tensor(perm)
        return parts_of(integers, self._tensor(self.layer.weight_scale), order, self.layer.split)

    def _call(self, target: torch._ops.OpOverload, args: tuple[object, ...], value: Tensor | None) -> fx.Node:
        node = self.graph.module.graph.call_function(target, args)  # type: ignore[arg-type]
        inherit_meta(node, self.node, value)
        return node

    def _get(self, name: str, tensor: Tensor) -> fx.Node:
        full = f"{self.layer.name}.{name}"
        self.stored[full] = tensor
        node = self.graph.module.graph.create_node("get_attr", full)
        inherit_meta(
            node, self.node, None if self.value is None else self.value.new_empty(tensor.shape, dtype=tensor.dtype)
        )
        return node

    def _like(self, value: Tensor | None, width: int, dtype: torch.dtype) -> Tensor | None:
        return None if value is None else value.new_empty((*value.shape[:-1], width), dtype=dtype)

    def replace(self) -> None:
        """Put the new nodes in front of the old product and erase it."""
        offset, dtype, outputs = self.layer.offset, self.layer.dtype, self.layer.plan.out_features
        total_value = self._like(self.value, outputs, torch.float32)
        with self.graph.module.graph.inserting_before(self.node):
            x = self._float(self.x)
            products = [self._product(x, g, part) for g, part in enumerate(self._parts())]
            total = products[0]
            for other in (*products[1:], self._get("offset", self._tensor(offset))):
                total = self._call(ATEN.add.Tensor, (total, other), total_value)
            if dtype != torch.float32:
                total = self._call(ATEN.to.dtype, (total, dtype), self.value)
        self._hand_over(total)

    def _hand_over(self, new: fx.Node) -> None:
        set_plan(new, self.layer.plan)
        clear_plan(self.node)
        self.node.replace_all_uses_with(new)
        self.graph.module.graph.erase_node(self.node)

    def _float(self, x: fx.Node) -> fx.Node:
        if self.x_value is not None and self.x_value.dtype == torch.float32:
            return x
        value = None if self.x_value is None else self.x_value.new_empty(self.x_value.shape, dtype=torch.float32)
        return self._call(ATEN.to.dtype, (x, torch.float32), value)

    def _channels(self, x: fx.Node, part: Part) -> fx.Node:
        value = self._like(self.x_value, part.weight.shape[1], torch.float32)
        if part.channels is None:
            return x
        if isinstance(part.channels, slice):
            return self._call(ATEN.slice.Tensor, (x, -1, part.channels.start, part.channels.stop), value)
        return self._call(ATEN.index_select.default, (x, -1, self._get("outliers", part.channels)), value)

    @abstractmethod
    def _product(self, x: fx.Node, group: int, part: Part) -> fx.Node:
        """The product of one scale group, float32 [..., N]."""

    def _integers(self, h: fx.Node, zero: int, scale: float, part: Part, step: float = 1.0) -> fx.Node:
        """``h / step`` rounded to bytes around ``zero`` plus the shift, and dequantized with ``scale``."""
        width = part.weight.shape[1]
        dtype = torch.int8 if self.signed else torch.uint8
        ends = (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        bytes_, floats = (self._like(self.x_value, width, kind) for kind in (dtype, torch.float32))
        q = self._call(QDQ.quantize_per_tensor.default, (h, step, zero + self.shift, *ends, dtype), bytes_)
        return self._call(QDQ.dequantize_per_tensor.default, (q, scale, self.shift, *ends, dtype), floats)

    def _matmul(self, d: fx.Node, group: int, part: Part, value: Tensor | None) -> fx.Node:
        """``d`` times the weights of a scale group, in one product or in two that are added."""
        prefix = "outlier_" if group else ""
        scale = self._get(f"{prefix}weight_scale", part.weight_scale)
        if not self.in_halves:
            w = self._weight(f"{prefix}weight", part.weight, scale)
            return self._call(ATEN.matmul.default, (d, w), value)
        names = (f"{prefix}weight", f"{prefix}weight_rest")
        weights = [self._weight(name, half, scale) for name, half in zip(names, halves(part.weight), strict=True)]
        products = [self._call(ATEN.matmul.default, (d, w), value) for w in weights]
        return self._call(ATEN.add.Tensor, tuple(products), value)

    def _weight(self, name: str, integers: Tensor, scale: fx.Node) -> fx.Node:
        weight = self._get(name, integers)
        outputs, width = integers.shape

        def like(*shape: int) -> Tensor | None:
            return None if self.value is None else self.value.new_empty(shape, dtype=torch.float32)

        symmetric = (None, 0, -BYTE, BYTE - 1, torch.int8)
        w = self._call(QDQ.dequantize_per_channel.default, (weight, scale, *symmetric), like(outputs, width))
        return self._call(ATEN.t.default, (w,), like(width, outputs))


class StaticLayer(Layer):
    """A product whose input scales are stored."""

    def _product(self, x: fx.Node, group: int, part: Part) -> fx.Node:
        outputs, width = part.weight.shape
        floats = self._like(self.x_value, width, torch.float32)
        scale = self._tensor(self.quantize["scale"])[group]
        zero_point = int(self._tensor(self.quantize["zero_point"])[group])
        result = self._like(self.value, outputs, torch.float32)
        if self.signed:
            h = self._shifted(self._channels(x, part), zero_point, float(scale), floats)
            return self._matmul(self._integers(h, 0, float(scale), part, float(scale)), group, part, result)
        h = self._call(ATEN.mul.Tensor, (self._channels(x, part), float(scale.reciprocal())), floats)
        low, high = numerics.integer_range(self.input_bits)
        zero = min(max(zero_point, -self.shift), 2 * BYTE - 1 - self.shift)
        if (low, high) != (-BYTE, BYTE - 1):
            h = self._call(ATEN.clamp.default, (h, low - zero_point, high - zero_point), floats)
        if zero != zero_point:
            # uint8 cannot hold this zero point: what is too much of it is added to the rounded value, exactly.
            h = self._call(ATEN.round.default, (h,), floats)
            h = self._call(ATEN.add.Tensor, (h, float(zero_point - zero)), floats)
        d = self._integers(h, zero, float(scale), part)
        return self._matmul(d, group, part, result)

    def _shifted(self, x: fx.Node, zero_point: int, scale: float, floats: Tensor | None) -> fx.Node:
        """``x`` plus the zero point's share, within the range of the activation's bits: its integers need no zero."""
        h = self._call(ATEN.add.Tensor, (x, zero_point * scale), floats) if zero_point else x
        low, high = numerics.integer_range(self.input_bits)
        whole = (low, high) == (-BYTE, BYTE - 1)
        return h if whole else self._call(ATEN.clamp.default, (h, low * scale, high * scale), floats)


class PerTokenLayer(Layer):
    """A product whose input scales are measured: rows are divided by their own scale, the results multiplied by it."""

    def _product(self, x: fx.Node, group: int, part: Part) -> fx.Node:
        outputs, width = part.weight.shape
        floats, result = (self._like(self.x_value, n, torch.float32) for n in (width, outputs))
        values = self._channels(x, part)
        scale = self._scale(values, part)
        inverse = self._call(ATEN.reciprocal.default, (scale,), example_value(scale))
        h = self._call(ATEN.mul.Tensor, (values, inverse), floats)
        product = self._matmul(self._integers(h, 0, 1.0, part), group, part, result)
        return self._call(ATEN.mul.Tensor, (product, scale), result)

    def _scale(self, values: fx.Node, part: Part) -> fx.Node:
        """float32 [..., 1]: the largest magnitude of the group's own channels over the largest integer."""
        floats = self._like(self.x_value, part.weight.shape[1], torch.float32)
        magnitude = self._own(self._call(ATEN.abs.default, (values,), floats), part)
        high = numerics.integer_range(self.input_bits)[1]
        return self._of_top(self._largest(magnitude), high, numerics.LEAST_MAGNITUDE)[0]

    def _own(self, values: fx.Node, part: Part) -> fx.Node:
        """``values`` with 0 in the channels of the other group."""
        if part.own is None:
            return values
        floats = self._like(self.x_value, part.weight.shape[1], torch.float32)
        return self._call(ATEN.mul.Tensor, (values, self._get("normal", part.own)), floats)

    def _largest(self, values: fx.Node) -> fx.Node:
        return self._call(ATEN.amax.default, (values, [-1], True), self._like(self.x_value, 1, torch.float32))

    def _of_top(self, top: fx.Node, steps: float, least: float) -> tuple[fx.Node, fx.Node]:
        """``top`` over ``steps``, 1 where it is not above ``least``, and where it is."""
        one, above = (self._like(self.x_value, 1, dtype) for dtype in (torch.float32, torch.bool))
        scale = self._call(ATEN.div.Scalar, (top, steps), one)
        seen = self._call(ATEN.gt.Scalar, (top, least), above)
        return self._call(ATEN.where.ScalarOther, (seen, scale, 1.0), one), seen


class AsymmetricLayer(PerTokenLayer):
    """As :class:`PerTokenLayer` with zero points: their share of the weights' sums is taken off the product."""

    def _product(self, x: fx.Node, group: int, part: Part) -> fx.Node:
        outputs, width = part.weight.shape
        floats, one, result = (self._like(self.x_value, n, torch.float32) for n in (width, 1, outputs))
        low, high = numerics.integer_range(self.input_bits)
        values = self._channels(x, part)
        own = self._own(values, part)
        # The least value as a largest one, which ONNX Runtime computes on empty inputs in another form.
        top, below = (
            self._call(ATEN.relu.default, (self._largest(v),), one)
            for v in (own, self._call(ATEN.neg.default, (own,), floats))
        )
        halves = [self._call(ATEN.mul.Tensor, (v, 0.5), one) for v in (top, below)]
        half = self._call(ATEN.add.Tensor, tuple(halves), one)
        scale, seen = self._of_top(half, (high - low) / 2, numerics.LEAST_HALF_RANGE)
        inverse = self._call(ATEN.reciprocal.default, (scale,), one)
        steps = self._call(ATEN.round.default, (self._call(ATEN.mul.Tensor, (below, inverse), one),), one)
        zero = self._call(ATEN.add.Tensor, (steps, float(low)), one)
        zero = self._call(ATEN.where.ScalarOther, (seen, zero, 0.0), one)
        h = self._call(ATEN.round.default, (self._call(ATEN.mul.Tensor, (values, inverse), floats),), floats)
        h = self._call(ATEN.clamp.default, (self._call(ATEN.add.Tensor, (h, zero), floats), low, high), floats)
        product = self._matmul(self._integers(h, 0, 1.0, part), group, part, result)
        sums = part.weight_scale * part.weight.sum(1, dtype=torch.int32)
        name = "outlier_weight_sum" if group else "weight_sum"
        share = self._call(ATEN.mul.Tensor, (zero, self._get(name, sums)), result)
        product = self._call(ATEN.sub.Tensor, (product, share), result)
        return self._call(ATEN.mul.Tensor, (product, scale), result)
