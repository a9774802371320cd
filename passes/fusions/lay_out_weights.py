"""Rewrite: weights in the layout that the kernels of their device read."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx

from fxq import kernels, numerics
from fxq.core.graph import product_of
from fxq.core.ir import QuantGraph, Stage, example_value, get_tensor, planned, put_tensor
from fxq.core.pipeline import Rewrite
from fxq.kernels import native
from fxq.kernels.gemm.panels import pack_panels

_WEIGHT = {
    kernels.dual_scale_linear.definition: 1,
    kernels.dual_scale_linear_quantize.definition: 1,
    kernels.dual_scale_linear_add.definition: 1,
    kernels.dual_scale_linear_per_token.definition: 2,
}
"""Place of the weight among an operator's arguments."""

_PER_TOKEN = "input scales are measured per token: quantize and product stay apart"


@dataclasses.dataclass(frozen=True)
class LayOutWeights(Rewrite):
    """On a CPU with native kernels weights become panels (:mod:`fxq.kernels.gemm.panels`); elsewhere they stay.

    4-bit weights are widened to 8 bits by it: the panels of a 4-bit layer take the memory of an 8-bit one.
    """

    needs: ClassVar[Stage] = Stage.FROZEN
    gives: ClassVar[Stage] = Stage.BOUND

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of weights laid out anew."""
        module, done = graph.module, set()
        layers = _layers_of_products(module)
        for layer, plan in graph.quantized_plans.items():
            if plan.scheme is not None and plan.scheme.per_token:
                graph.remark(layer, _PER_TOKEN)
        for node in module.graph.nodes:
            if node.op != "call_function" or node.target not in _WEIGHT:
                continue
            read, split, bits = node.args[_WEIGHT[node.target]], node.args[5], node.args[6]
            assert isinstance(read, fx.Node) and isinstance(split, int) and isinstance(bits, int)
            name = str(read.target)
            weight = get_tensor(module, name)
            if weight.device.type != "cpu" or name in done:
                continue
            if reason := _obstacle(node):
                for layer in layers.get(node, ()):
                    graph.remark(layer, reason)
                continue
            put_tensor(module, name, pack_panels(numerics.unpack_int4(weight) if bits <= 4 else weight, split))
            done.add(name)
        return len(done)


def _layers_of_products(module: fx.GraphModule) -> dict[fx.Node, list[str]]:
    """Layers by the node that multiplies for them, several where linears were merged."""
    found: dict[fx.Node, list[str]] = {}
    for plan, nodes in planned(module).values():
        for node in nodes:
            layers = found.setdefault(product_of(node), [])
            if plan.layer not in layers:
                layers.append(plan.layer)
    return found


def _obstacle(node: fx.Node) -> str:
    """Why the native kernel cannot compute the node, or ""."""
    value = example_value(node)
    if value is not None and value.dtype == torch.float16:
        return "the native kernels give float32, bfloat16 and integers, not float16"
    return native.why_not()
