"""Rewrite: weights in the layout that the kernels of their device read."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx

from fxq.core.ir import QuantGraph, Stage, example_value, get_tensor, put_tensor
from fxq.core.layer import ASYMMETRIC, PER_TOKEN, QuantizedLayer, quantize_of, quantized_layers
from fxq.core.pipeline import Rewrite
from fxq.kernels import native
from fxq.kernels.gemm.panels import pack_panels
from fxq.passes.match.patterns import is_call

_FLOAT8 = "float8 has no CPU kernel and no fused operators: quantize and product stay apart, as they are"
_PER_TOKEN = "input scales are measured per token: quantize stays apart from what gives its input"
_APART = (PER_TOKEN.quantize.definition, ASYMMETRIC.quantize.definition)


@dataclasses.dataclass(frozen=True)
class LayOutWeights(Rewrite):
    """On a CPU with native kernels weights become panels (:mod:`fxq.kernels.gemm.panels`); elsewhere they stay.

    Those of weights of up to 4 bits hold two channels in a byte. Float8 weights stay.
    """

    needs: ClassVar[Stage] = Stage.FROZEN
    gives: ClassVar[Stage] = Stage.BOUND

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of weights laid out anew."""
        module, done = graph.module, set()
        for name, plan in graph.quantized_plans.items():
            if plan.quantization.is_float8:
                graph.remark(name, _FLOAT8)
        for product, layers in _by_product(module).items():
            if is_call(quantize_of(product), *_APART):
                for layer in layers:
                    graph.remark(layer.name, _PER_TOKEN)
            name = str(layers[0].weight.target)
            if get_tensor(module, name).device.type != "cpu" or name in done or layers[0].scheme.is_float8:
                continue
            if reason := _obstacle(product):
                for layer in layers:
                    graph.remark(layer.name, reason)
                continue
            put_tensor(module, name, pack_panels(layers[0].codes(module), layers[0].split, layers[0].bits))
            done.add(name)
        return len(done)


def _by_product(module: fx.GraphModule) -> dict[fx.Node, list[QuantizedLayer]]:
    """Layers by the node that multiplies for them, several where linears were merged."""
    found: dict[fx.Node, list[QuantizedLayer]] = {}
    for layer in quantized_layers(module):
        found.setdefault(layer.product, []).append(layer)
    return found


def _obstacle(node: fx.Node) -> str:
    """Why the native kernel cannot compute the node, or ""."""
    value = example_value(node)
    if value is not None and value.dtype == torch.float16:
        return "the native kernels give float32, bfloat16 and integers, not float16"
    return native.why_not()
