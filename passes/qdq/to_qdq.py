"""Rewrite: quantized layers become quantize, dequantize and matrix product in operators of torch alone."""

from __future__ import annotations

import dataclasses
import operator
from typing import ClassVar

from torch import Tensor, fx

from fxq import kernels
from fxq.core.graph import drop_unread_attributes, product_of, unused_tensors
from fxq.core.ir import LayerPlan, QuantGraph, Stage, drop_tensor, planned, put_tensor
from fxq.core.pipeline import Rewrite
from fxq.kernels.op import NAMESPACE
from fxq.passes.qdq.qdq_layers import Layer, PerTokenLayer, StaticLayer

LINEAR, QUANTIZE = kernels.dual_scale_linear.definition, kernels.quantize_act.definition
LINEAR_PER_TOKEN, PER_TOKEN = kernels.dual_scale_linear_per_token.definition, kernels.quantize_per_token.definition
_QUANTIZES = (QUANTIZE, PER_TOKEN)


@dataclasses.dataclass(frozen=True)
class ToQdq(Rewrite):
    """Replaces the operators of quantized layers by ``quantized_decomposed`` ones.

    Per scale group: ``quantize_per_tensor`` to uint8 of ``x / input_scale`` with scale 1 and the layer's zero point
    plus 128, ``dequantize_per_tensor`` with ``input_scale`` and zero point 128, ``dequantize_per_channel`` of int8
    weights, ``matmul``. The groups are added, then the offset, which goes on holding the zero points' share. So the
    integers are those of :mod:`fxq.numerics` plus 128, and inductor (with freezing), ONNX Runtime and OpenVINO run the
    product on them. 4-bit weights are stored one per byte: integer kernels read bytes. Activations of b bits are
    shifted by ``2**(b - 1)`` instead, so that their bytes have b bits too.

    x86 CPUs without VNNI saturate pairs of products of 8 by 8 bits. ``in_halves`` computes such a layer exactly there:
    its weights become a sum of two of 7 bits, ``weight`` and ``weight_rest``, each with a product of its own.

    With scales per token the graph measures them: rows are multiplied by the reciprocal of their own scale, quantized
    with scale 1 and zero point 128, and each group's product is multiplied by the scale.

    A layer's tensors are then ``weight``, ``weight_scale`` and ``offset``, and with two groups
    ``outlier_weight`` [N, K - split] and ``outlier_weight_scale``, with a permutation ``outliers`` int64, and
    with scales per token ``normal`` float32 [K], 0 at the outliers.
    """

    in_halves: bool = False

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
                rewrite = self._rewrite(graph, plan, node, stored) if product is node else None
                if rewrite is None:
                    graph.remark(layer, f"not lowered: {product.target} does not read a quantize of its own")
                    continue
                rewrite.replace()
                graph.remark(layer, "lowered to quantize, dequantize and matmul")
                count += 1
        self._clean(graph, stored)
        return count

    def _rewrite(self, graph: QuantGraph, plan: LayerPlan, node: fx.Node, stored: dict[str, Tensor]) -> Layer | None:
        """The rewrite of a product that reads a quantize of its own; None for any other node."""
        q = node.args[0]
        if not isinstance(q, fx.Node):
            return None
        if node.target == LINEAR and q.target == QUANTIZE:
            return StaticLayer(graph, plan, node, q, stored, self.in_halves)
        pair = q.args[0] if q.target == operator.getitem else None
        if node.target == LINEAR_PER_TOKEN and isinstance(pair, fx.Node) and pair.target == PER_TOKEN:
            return PerTokenLayer(graph, plan, node, pair, stored, self.in_halves)
        return None

    def _clean(self, graph: QuantGraph, stored: dict[str, Tensor]) -> None:
        module = graph.module
        for target in (operator.getitem, *_QUANTIZES):
            for node in reversed(module.graph.find_nodes(op="call_function", target=target)):
                if not node.users and (target in _QUANTIZES or node.args[0].target == PER_TOKEN):
                    module.graph.erase_node(node)
        drop_unread_attributes(module.graph)
        for name, tensor in stored.items():
            put_tensor(module, name, tensor)
        for name in unused_tensors(module):
            drop_tensor(module, name)
