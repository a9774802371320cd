"""Analysis: linears that read the same input get one set of outlier channels, so that one quantize serves them all."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import ClassVar

import torch
from torch import fx

from fxq.core.config import Scheme
from fxq.core.graph import LinearSite, arguments, linear_sites
from fxq.core.ir import LayerPlan, QuantGraph, Stage, plan_of, set_plan
from fxq.core.pipeline import Analysis
from fxq.passes.detect_outliers import outlier_channels
from fxq.passes.match.blocks import block_of
from fxq.runtime.memory.residency import Residency


def input_groups(module: fx.GraphModule) -> list[list[LinearSite]]:
    """Linears to be quantized that read one node, by two or more, in graph order.

    Members are of one block, have equal schemes, and each is called at one site: another site could see other values.
    """
    sites = list(linear_sites(module))
    calls = Counter(site.layer for site in sites)
    groups: dict[tuple[object, str, Scheme], list[LinearSite]] = {}
    for site in sites:
        plan = plan_of(site.node)
        if plan is not None and plan.scheme is not None and calls[site.layer] == 1:
            groups.setdefault((arguments(site.node)["input"], block_of(site.layer), plan.scheme), []).append(site)
    return [group for group in groups.values() if len(group) > 1]


@dataclasses.dataclass(frozen=True)
class ShareInputs(Analysis):
    """Replaces the outlier channels of layers that read the same input by those of their stacked weights.

    The norm of a channel is then taken over the rows of all of them (Q-ARVD, arXiv 2605.21072, Eq. 9-12, on the weight
    [sum N, K]). :class:`~fxq.passes.ApplyMethods` with ``share_inputs`` solves such layers as one, so that their input
    scales are equal too and :class:`~fxq.passes.fusions.merge_linears.MergeLinears` can make one GEMM of them.
    """

    needs: ClassVar[Stage] = Stage.PLANNED
    gives: ClassVar[Stage] = Stage.PLANNED

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of layers that share their input with another one."""
        groups, residency = input_groups(graph.module), Residency()
        for group in groups:
            plans = [plan for site in group if (plan := plan_of(site.node)) is not None]
            if not _may_have_outliers(plans[0]):
                continue
            weights = [site.weight(graph.module) for site in group]
            outliers, reason = outlier_channels(torch.cat(weights), plans[0].quantization)
            residency.give_back(*weights)
            for site, plan in zip(group, plans, strict=True):
                others = ", ".join(other.layer for other in plans if other.layer != plan.layer)
                text = f"{reason}, shared with {others}" if reason else f"shared with {others}"
                set_plan(site.node, dataclasses.replace(plan, outliers=outliers, outlier_reason=text))
        return sum(map(len, groups))


def _may_have_outliers(plan: LayerPlan) -> bool:
    scheme = plan.quantization
    return scheme.dual_scale and plan.in_features % scheme.align == 0
