"""Rewrite: attentions whose measured error allows it multiply in 8 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from fxq import kernels
from fxq.core.facts import ATTENTION, Chosen, ChosenAttentions
from fxq.core.ir import QuantGraph, Stage
from fxq.core.method import AttentionScheme
from fxq.core.pipeline import Rewrite
from fxq.passes.fusions import fuse_attention
from fxq.passes.match import edits, patterns
from fxq.passes.match.patterns import ATEN, Unfit

_SDPA = ATEN.scaled_dot_product_attention.default


@dataclasses.dataclass(frozen=True)
class QuantizeAttention(Rewrite):
    """``scaled_dot_product_attention`` becomes the operator of a scheme where that says so.

    As ``fxq::attention_int8``: :data:`fxq.kernels.ATTENTIONS`.

    Keys and values are read piece by piece, as by :class:`~fxq.passes.FuseAttention`. What became of each, with its
    error and the reason why it is exact, is written to ``graph.found["attention"]``.

    Args:
        scheme: which errors are allowed.
        errors: relative error of each attention, by the name of its node; those that are not in it stay exact.
    """

    scheme: AttentionScheme
    errors: Mapping[str, float] = dataclasses.field(hash=False)

    needs: ClassVar[Stage] = Stage.FROZEN
    gives: ClassVar[Stage] = Stage.FROZEN

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of attentions in integers."""
        edits.tidy(graph)
        layers = []
        for node in patterns.calls(graph, _SDPA):
            error = self.errors.get(node.name)
            chosen = Chosen(place=fuse_attention.place_of(node), error=error)
            reason = self._why_exact(chosen)
            try:
                if not reason:
                    fuse_attention.fused(graph, node, kernels.ATTENTIONS[self.scheme.scheme])
            except Unfit as unfit:
                reason = str(unfit)
            layers.append(dataclasses.replace(chosen, reason=reason))
        found = ChosenAttentions(scheme=self.scheme.scheme, max_error=self.scheme.max_error, layers=tuple(layers))
        graph.found[ATTENTION] = found.to_json()
        return len(found.integers)

    def _why_exact(self, chosen: Chosen) -> str:
        """Why an attention stays exact, or ""."""
        if self.scheme.keeps(chosen.place):
            return "the recipe keeps it"
        if chosen.error is None:
            return "no error was measured: it has a mask, or no calibration call has reached it"
        if not chosen.error <= self.scheme.max_error:
            return f"an error of {chosen.error:.2%}, more than {self.scheme.max_error:.2%}"
        return ""
