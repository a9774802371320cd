"""Rewrite: quantized layers become quantize, dequantize and matrix product in operators of torch alone."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from fxq.core.graph import drop_unread_attributes, unused_tensors
from fxq.core.ir import QuantGraph, Stage, drop_tensor, put_tensor
from fxq.core.layer import FROZEN_QUANTIZES, LayerError, measured_pair, quantized_layers
from fxq.core.method import FLOAT8
from fxq.core.pipeline import PassError, Rewrite
from fxq.passes.qdq.qdq_layers import AsymmetricLayer, PerTokenLayer, StaticLayer


def refuse_float8(graph: QuantGraph) -> str:
    """Why a graph has no form of integers: it has layers of float8; or ""."""
    floats = [layer for layer, plan in graph.quantized_plans.items() if plan.quantization.is_float8]
    if not floats:
        return ""
    more = f" and {len(floats) - 1} more are" if len(floats) > 1 else " is"
    return (
        f"layer {floats[0]}{more} {FLOAT8}: this form multiplies integers. Quantize with w8a8 or w8a8-dynamic for it, "
        "or take an export that holds FP8: compressed-tensors, comfy, vllm-omni, diffusers-torchao"
    )


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

    ``signed`` is the form of runtimes that take int8 activations around zero and one scale for quantizing and
    dequantizing (TensorRT): the zero point's share is added to ``x``, which is quantized to int8 with ``input_scale``.

    With scales per token the graph measures them: rows are multiplied by the reciprocal of their own scale, quantized
    with scale 1 and zero point 128, and each group's product is multiplied by the scale. Zero points of rows are added
    to the rounded values, and ``weight_sum`` float32 [N] times them is taken off the product.

    A layer's tensors are then ``weight``, ``weight_scale`` and ``offset``, and with two groups
    ``outlier_weight`` [N, K - split], ``outlier_weight_scale`` and its sum, with a permutation ``outliers`` int64, and
    with scales per token ``normal`` float32 [K], 0 at the outliers.
    """

    in_halves: bool = False
    signed: bool = False

    needs: ClassVar[Stage] = Stage.FROZEN
    gives: ClassVar[Stage] = Stage.FUSED
    repeatable: ClassVar[bool] = True

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of products replaced.

        Raises:
            PassError: naming a layer of float8, see :func:`refuse_float8`.
        """
        stored: dict[str, Tensor] = {}
        count = 0
        if reason := refuse_float8(graph):
            raise PassError(reason)
        for layer in list(quantized_layers(graph.module)):
            try:
                quantize = layer.own_quantize
            except LayerError:
                reason = f"{layer.product.target} does not read a quantize of its own"
                graph.remark(layer.name, f"not lowered: {reason}")
                continue
            measured = AsymmetricLayer if layer.scheme.asymmetric else PerTokenLayer
            made = measured if layer.per_token else StaticLayer
            made(graph, layer, quantize, stored, self.in_halves, self.signed).replace()
            graph.remark(layer.name, "lowered to quantize, dequantize and matmul")
            count += 1
        self._clean(graph, stored)
        return count

    def _clean(self, graph: QuantGraph, stored: dict[str, Tensor]) -> None:
        module = graph.module
        for node in reversed(list(module.graph.nodes)):
            if not node.users and (node.target in FROZEN_QUANTIZES or measured_pair(node) is not None):
                module.graph.erase_node(node)
        drop_unread_attributes(module.graph)
        for name, tensor in stored.items():
            put_tensor(module, name, tensor)
        for name in unused_tensors(module):
            drop_tensor(module, name)
