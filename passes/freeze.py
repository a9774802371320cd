"""Rewrite: pack the integers, give them their final names, and drop every tensor nothing reads."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from fxq import numerics
from fxq.core.graph import drop_unread_attributes, unused_tensors
from fxq.core.ir import QuantGraph, Stage, drop_tensor, get_tensor, put_tensor, stored_names
from fxq.core.layer import quantized_layers
from fxq.core.pipeline import Rewrite
from fxq.runtime.memory.residency import Residency, trim


@dataclasses.dataclass(frozen=True)
class Freeze(Rewrite):
    """After it the module holds what a deployment needs and nothing else.

    ``<layer>.weight`` is int8 or float8 [N, K] or packed int4 uint8 [N, K / 2]; float weights of quantized layers are
    gone; tensors kept in model dtype are copies, so the user's model can change or be freed.
    """

    needs: ClassVar[Stage] = Stage.LOWERED
    gives: ClassVar[Stage] = Stage.FROZEN

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of layers packed."""
        module = graph.module
        residency = Residency()
        done = set[str]()
        for layer in quantized_layers(module):
            loose, final, bits = f"{layer.name}.weight_int", f"{layer.name}.weight", layer.scheme.code_bits
            if layer.name not in done:
                stored = get_tensor(module, loose)
                if bits == 4:
                    packed = numerics.pack_int4(stored)
                    residency.give_back(stored)
                    trim()
                    stored = packed
                drop_tensor(module, loose)
                put_tensor(module, final, stored)
                done.add(layer.name)
            layer.weight.target = final
            if not layer.scheme.is_float8:  # whose operators name no bits
                layer.set_arguments(bits=bits)
        drop_unread_attributes(module.graph)
        for name in unused_tensors(module):
            drop_tensor(module, name)
        made = {f"{layer}.{name}" for layer, plan in graph.quantized_plans.items() for name in stored_names(plan)}
        for name in sorted({str(node.target) for node in module.graph.nodes if node.op == "get_attr"} - made):
            put_tensor(module, name, get_tensor(module, name).detach().clone())
        graph.statistics.clear()
        graph.updates.clear()
        return len(done)
