"""Analysis: which input channels get their own scale (Q-ARVD, arXiv 2605.21072, Eq. 9-12)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from fxq.core.config import Scheme
from fxq.core.graph import linear_sites
from fxq.core.ir import QuantGraph, Stage, plan_of, set_plan
from fxq.core.pipeline import Analysis
from fxq.passes.methods.units import unit_of
from fxq.runtime.memory.residency import Residency


@dataclasses.dataclass(frozen=True)
class OutlierChannels:
    """Outcome of the rule on one weight.

    ``count`` outliers after alignment, ``indices`` int64 [count] ascending, ``median``, ``mad`` and ``threshold`` of
    the channel norms, ``norms`` float32 [K] themselves and ``raw_count`` channels above the threshold.
    """

    count: int
    indices: Tensor
    median: float
    mad: float
    threshold: float
    norms: Tensor
    raw_count: int


def detect_outliers(weight: Tensor, tau: float = 3.5, alpha: float = 1.2, align: int = 32) -> OutlierChannels:
    """Find input channels whose L2 norm stands out.

    Channel j is an outlier iff ``v_j > max(median + tau / 0.6745 * MAD, alpha * median)`` with ``v_j = ||W[:, j]||_2``.
    The count is rounded up to a multiple of ``align`` and capped at half the channels (at the largest multiple of
    ``align`` below it); the outliers are then the channels of largest norm. MAD below 1e-8 of the median means none.

    Args:
        weight: float [N, K].
        tau: distance from the median in robust standard deviations.
        alpha: least ratio to the median.
        align: multiple the count is rounded to; the model's width if that is smaller.

    Returns:
        The outliers and the statistics behind them.

    Raises:
        ValueError: when the weight is not a matrix, has NaN or infinity, or ``align`` is not positive.

    Source: Q-ARVD (arXiv 2605.21072), Eq. 9-12.
    """
    if weight.ndim != 2:
        raise ValueError(f"detect_outliers needs a weight [N, K], got shape {tuple(weight.shape)}")
    if align < 1:
        raise ValueError(f"detect_outliers: align = {align}, expected at least 1")
    values = weight.detach().float()
    if not bool(values.isfinite().all()):
        raise ValueError("detect_outliers: the weight has NaN or infinity")
    size = unit_of(values)
    norms = torch.linalg.vector_norm(values / size, dim=0)
    width = weight.shape[1]
    align = min(align, width)
    # An even count takes the mean of the two middle values; torch.median would take the lower one.
    median = float(norms.quantile(0.5))
    mad = float((norms - median).abs().quantile(0.5))
    threshold = max(median + tau / 0.6745 * mad, alpha * median)
    raw = 0 if mad <= 1e-8 * median else int((norms > threshold).sum())
    count = min(-(-raw // align) * align, width // 2 // align * align)
    indices = norms.topk(count).indices.sort().values
    return OutlierChannels(count, indices, median * size, mad * size, threshold * size, norms * size, raw)


def outlier_channels(weight: Tensor, scheme: Scheme) -> tuple[tuple[int, ...], str]:
    """Outlier channels of a weight [N, K] under a scheme, ascending, and why there are none or ""."""
    found = detect_outliers(weight, scheme.tau, scheme.alpha, scheme.align)
    reason = "" if found.count else "no channel above the threshold"
    if found.raw_count and not found.count:
        reason = f"half of {weight.shape[1]} channels is less than one block of {scheme.align}"
    return tuple(found.indices.tolist()), reason


@dataclasses.dataclass(frozen=True)
class DetectOutliers(Analysis):
    """Writes outlier channels, or why there are none, into the plan of every layer to be quantized."""

    needs: ClassVar[Stage] = Stage.PLANNED
    gives: ClassVar[Stage] = Stage.PLANNED

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of layers with outliers."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        residency = Residency()
        for site in linear_sites(graph.module):
            plan = plan_of(site.node)
            if plan is None or plan.scheme is None:
                continue
            scheme = plan.scheme
            if site.layer not in found:
                if not scheme.dual_scale:
                    found[site.layer] = (), "dual scale is off in the recipe"
                elif plan.in_features % scheme.align:
                    found[site.layer] = (), f"in_features {plan.in_features} is not a multiple of {scheme.align}"
                else:
                    weight = site.weight(graph.module)
                    found[site.layer] = outlier_channels(weight, scheme)
                    residency.give_back(weight)
            channels, reason = found[site.layer]
            set_plan(site.node, dataclasses.replace(plan, outliers=channels, outlier_reason=reason))
        return sum(bool(channels) for channels, _ in found.values())
