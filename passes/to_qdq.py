"""Rewrite: quantized layers become quantize, dequantize and matrix product in operators of torch alone."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx

from fxq import kernels, numerics
from fxq.graph import drop_unread_attributes, product_of, unused_tensors
from fxq.ir import (
    LayerPlan,
    QuantGraph,
    Stage,
    clear_plan,
    drop_tensor,
    example_value,
    get_tensor,
    inherit_meta,
    plan_of,
    planned,
    put_tensor,
    set_plan,
)
from fxq.kernels.op import NAMESPACE
from fxq.pipeline import Rewrite

ATEN, QDQ = torch.ops.aten, torch.ops.quantized_decomposed
LINEAR, QUANTIZE = kernels.dual_scale_linear.definition, kernels.quantize_act.definition
SHIFT = 128  # int8 activations are carried as uint8: CPU kernels multiply uint8 by int8


class Part(NamedTuple):
    """One scale group of a layer.

    ``channels``: the input channels it reads, None for all of them in the model's order, a slice for neighbours, int64
    indices for any others. ``weight`` int8 [N, channels], ``weight_scale`` float32 [N], ``scale`` and ``zero_point``
    those of its activations.
    """

    channels: Tensor | slice | None
    weight: Tensor
    weight_scale: Tensor
    scale: float
    inverse: float
    zero_point: int


def parts_of(
    weight: Tensor, weight_scale: Tensor, input_scale: Tensor, zero_point: Tensor, perm: Tensor | None, split: int
) -> list[Part]:
    """Scale groups of a layer without a gather of its whole input.

    With ``perm`` the normal group reads every channel in the model's order and has weight 0 where the outliers are, so
    that only these are gathered: its integers stay what they are.

    Args:
        weight: int8 [N, K] in ``[normal | outlier]`` order, unpacked.
        weight_scale: float32 [G, N].
        input_scale: float32 [G].
        zero_point: int32 [G].
        perm: int32 [K] or None.
        split: number of normal channels.
    """
    width = weight.shape[1]
    inverses = input_scale.reciprocal()
    parts = []
    for g, group in enumerate(numerics.group_slices(width, split)):
        channels: Tensor | slice | None = None if split == width else group
        values = weight[:, group]
        if perm is not None:
            channels = None if g == 0 else perm[group].long()
            if g == 0:
                values = torch.zeros_like(weight).index_copy_(1, perm[group].long(), values)
        scale, inverse, zero = float(input_scale[g]), float(inverses[g]), int(zero_point[g])
        parts.append(Part(channels, values.contiguous(), weight_scale[g].contiguous(), scale, inverse, zero))
    return parts


@dataclasses.dataclass(frozen=True)
class ToQdq(Rewrite):
    """Replaces ``fxq::quantize_act`` and ``fxq::dual_scale_linear`` by ``quantized_decomposed`` operators.

    Per scale group: ``quantize_per_tensor`` to uint8 of ``x / input_scale`` with scale 1 and the layer's zero point
    plus 128, ``dequantize_per_tensor`` with ``input_scale`` and zero point 128, ``dequantize_per_channel`` of int8
    weights, ``matmul``. The groups are added, then the offset, which goes on holding the zero points' share. So the
    integers are those of :mod:`fxq.numerics` plus 128, and inductor (with freezing), ONNX Runtime and OpenVINO run the
    product on them. 4-bit weights are stored one per byte: integer kernels read bytes.

    A layer's tensors are then ``weight``, ``weight_scale`` and ``offset``, and with two groups
    ``outlier_weight`` [N, K - split] and ``outlier_weight_scale``, with a permutation ``outliers`` int64.
    """

    needs: ClassVar[Stage] = Stage.FROZEN
    gives: ClassVar[Stage] = Stage.FUSED
    repeatable: ClassVar[bool] = True

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of products replaced."""
        stored: dict[str, Tensor] = {}
        count = 0
        for layer, (plan, nodes) in planned(graph.module).items():
            for node in nodes if plan.scheme is not None else []:
                product = product_of(node)
                if not str(product.target).startswith(f"{NAMESPACE}."):
                    continue  # lowered before
                quantize = node.args[0] if product is node and node.target == LINEAR else None
                if not isinstance(quantize, fx.Node) or quantize.target != QUANTIZE:
                    graph.remark(layer, f"not lowered: {product.target} does not read a quantize_act of its own")
                    continue
                _Layer(graph, plan, node, quantize, stored).replace()
                graph.remark(layer, "lowered to quantize, dequantize and matmul")
                count += 1
        self._clean(graph, stored)
        return count

    def _clean(self, graph: QuantGraph, stored: dict[str, Tensor]) -> None:
        module = graph.module
        for node in reversed(module.graph.find_nodes(op="call_function", target=QUANTIZE)):
            if not node.users:
                module.graph.erase_node(node)
        drop_unread_attributes(module.graph)
        for name, tensor in stored.items():
            put_tensor(module, name, tensor)
        for name in unused_tensors(module):
            drop_tensor(module, name)


class _Layer:
    """The rewrite of one product."""

    def __init__(
        self, graph: QuantGraph, plan: LayerPlan, node: fx.Node, quantize: fx.Node, stored: dict[str, Tensor]
    ) -> None:
        self.graph, self.plan, self.node, self.stored = graph, plan, node, stored
        x, self.perm, _, self.zero_point, _, bits = quantize.args
        assert isinstance(x, fx.Node) and isinstance(bits, int)
        self.x, self.input_bits = x, bits
        self.x_value, self.value = example_value(self.x), example_value(node)

    def _tensor(self, node: object) -> Tensor:
        assert isinstance(node, fx.Node)
        return get_tensor(self.graph.module, str(node.target))

    def _parts(self) -> list[Part]:
        _, weight, weight_scale, input_scale, _, split, bits, _ = self.node.args
        integers = self._tensor(weight)
        if bits == 4:
            integers = numerics.unpack_int4(integers)
        perm = None if self.perm is None else self._tensor(self.perm)
        scales = self._tensor(weight_scale), self._tensor(input_scale), self._tensor(self.zero_point)
        assert isinstance(split, int)
        return parts_of(integers, *scales, perm, split)

    def _call(self, target: torch._ops.OpOverload, args: tuple[object, ...], value: Tensor | None) -> fx.Node:
        node = self.graph.module.graph.call_function(target, args)  # type: ignore[arg-type]
        inherit_meta(node, self.node, value)
        return node

    def _get(self, name: str, tensor: Tensor) -> fx.Node:
        full = f"{self.plan.layer}.{name}"
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
        _, _, _, _, offset, _, _, dtype = self.node.args
        outputs = self.plan.out_features
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
        plan = plan_of(self.node)
        assert plan is not None
        set_plan(new, plan)
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

    def _product(self, x: fx.Node, group: int, part: Part) -> fx.Node:
        outputs, width = part.weight.shape
        floats = self._like(self.x_value, width, torch.float32)
        h = self._call(ATEN.mul.Tensor, (self._channels(x, part), part.inverse), floats)
        low, high = numerics.integer_range(self.input_bits)
        zero = min(max(part.zero_point, -SHIFT), SHIFT - 1)
        if (low, high) != (-SHIFT, SHIFT - 1):
            h = self._call(ATEN.clamp.default, (h, low - part.zero_point, high - part.zero_point), floats)
        if zero != part.zero_point:
            # uint8 cannot hold this zero point: what is too much of it is added to the rounded value, exactly.
            h = self._call(ATEN.round.default, (h,), floats)
            h = self._call(ATEN.add.Tensor, (h, float(part.zero_point - zero)), floats)
        to_uint8 = (1.0, zero + SHIFT, 0, 255, torch.uint8)
        bytes_ = self._like(self.x_value, width, torch.uint8)
        q = self._call(QDQ.quantize_per_tensor.default, (h, *to_uint8), bytes_)
        from_uint8 = (part.scale, SHIFT, 0, 255, torch.uint8)
        d = self._call(QDQ.dequantize_per_tensor.default, (q, *from_uint8), floats)
        w = self._weight("outlier_" if group else "", part)
        return self._call(ATEN.matmul.default, (d, w), self._like(self.value, outputs, torch.float32))

    def _weight(self, prefix: str, part: Part) -> fx.Node:
        weight = self._get(f"{prefix}weight", part.weight)
        scale = self._get(f"{prefix}weight_scale", part.weight_scale)
        outputs, width = part.weight.shape

        def like(*shape: int) -> Tensor | None:
            return None if self.value is None else self.value.new_empty(shape, dtype=torch.float32)

        symmetric = (None, 0, -SHIFT, SHIFT - 1, torch.int8)
        w = self._call(QDQ.dequantize_per_channel.default, (weight, scale, *symmetric), like(outputs, width))
        return self._call(ATEN.t.default, (w,), like(width, outputs))
