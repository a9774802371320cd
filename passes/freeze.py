"""Rewrite: pack the integers, give them their final names, and drop every tensor nothing reads."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from fxq import numerics
from fxq.core.graph import drop_unread_attributes, unused_tensors
from fxq.core.ir import QuantGraph, Stage, drop_tensor, get_tensor, planned, put_tensor, stored_names
from fxq.core.pipeline import Rewrite
from fxq.runtime.residency import Residency, trim


@dataclasses.dataclass(frozen=True)
class Freeze(Rewrite):
    """After it the module holds what a deployment needs and nothing else.

    ``<layer>.weight`` is int8 [N, K] or packed int4 uint8 [N, K / 2]; float weights of quantized layers are gone;
    tensors kept in model dtype are copies, so the user's model can change or be freed.
    """

    needs: ClassVar[Stage] = Stage.LOWERED
    gives: ClassVar[Stage] = Stage.FROZEN

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of layers packed."""
        module = graph.module
        count, residency = 0, Residency()
        for layer, (plan, nodes) in planned(module).items():
            if plan.scheme is None:
                continue
            stored = get_tensor(module, f"{layer}.weight_int")
            bits = plan.scheme.weight_bits
            if bits == 4:
                loose, stored = stored, numerics.pack_int4(stored)
                residency.give_back(loose)
                trim()
            drop_tensor(module, f"{layer}.weight_int")
            put_tensor(module, f"{layer}.weight", stored)
            for node in nodes:
                read = next(n for n in node.all_input_nodes if n.target == f"{layer}.weight_int")
                read.target = f"{layer}.weight"
                node.update_arg(6, bits)
            count += 1
        drop_unread_attributes(module.graph)
        for name in unused_tensors(module):
            drop_tensor(module, name)
        made = {f"{layer}.{name}" for layer, plan in graph.quantized_plans.items() for name in stored_names(plan)}
        for name in sorted({str(node.target) for node in module.graph.nodes if node.op == "get_attr"} - made):
            put_tensor(module, name, get_tensor(module, name).detach().clone())
        graph.statistics.clear()
        graph.updates.clear()
        return count
