"""Rewrite: input channels and weight columns are made equally large (PTQ4DiT, arXiv 2405.16005)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from fxq.core.ir import QuantGraph, Stage
from fxq.core.method import LayerStatistics
from fxq.core.pipeline import Rewrite
from fxq.passes.transforms.scaling import column_tops, may_learn, scale_inputs, scaled_weight, smoothing_scale
from fxq.passes.transforms.sites import groups_of, outliers_of


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's correlation of the last axis of a [..., K] with b [K], float64 [...]; 0 where either is constant."""
    ranks = [_ranks(x) - (x.shape[-1] - 1) / 2 for x in (a, b)]
    norms = ranks[0].norm(dim=-1) * ranks[1].norm(dim=-1)
    return torch.where(norms > 0, (ranks[0] * ranks[1]).sum(-1) / norms.clamp(min=1e-300), 0.0)


def _ranks(x: Tensor) -> Tensor:
    """Ranks along the last axis, of equal values their mean."""
    ordered = x.sort(-1).values
    below, upto = (torch.searchsorted(ordered, x.contiguous(), right=right) for right in (False, True))
    return (below + upto - 1).double() / 2


def salience(statistics: LayerStatistics, columns: Tensor) -> Tensor:
    """Largest magnitude of each input channel in a chunk, averaged over chunks, float64 [K].

    A chunk counts ``exp(-rho)``, rho the rank correlation of its channels with the weight's columns: where large
    inputs meet large weights balancing can do little.

    Args:
        statistics: of the input.
        columns: largest magnitude of the weight's columns, [K].
    """
    rows, chunks = statistics.rows.float().abs().double(), statistics.chunks
    tops = torch.stack([rows[chunks == chunk].amax(0) for chunk in chunks.unique()])
    shares = torch.softmax(-rank_correlation(tops, columns.double()), 0)
    return shares @ tops


@dataclasses.dataclass(frozen=True)
class Balance(Rewrite):
    """An input x becomes ``x B`` and the weights W that read it ``W / B``, so that channels are as large as columns.

    ``B_k = sqrt(s(x_k) s(W_k)) / s(x_k)`` with the saliences of :func:`salience`, for each layer or each group on one
    input. Layers of a scheme without ``reconstruct`` and those with too few rows are left as they are. Outlier
    channels are detected again on the balanced weights.

    Registers ``<layer>.smoothing`` [K], B in model dtype, under the first layer of a group. Costs one elementwise
    product for each input.

    Source: PTQ4DiT (arXiv 2405.16005), channel-wise salience balancing with Spearman-guided calibration; over the
    chunks of a video in the place of the timesteps of an image, and as a product in the graph where the paper folds it
    into the layer before.
    """

    needs: ClassVar[Stage] = Stage.CALIBRATED
    gives: ClassVar[Stage] = Stage.CALIBRATED
    learns: ClassVar[bool] = True
    stores: ClassVar[tuple[str, ...]] = ("smoothing",)

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of layers balanced."""
        count = 0
        for group in groups_of(graph.module):
            if not may_learn(graph, group):
                continue
            weights = [layer.weight(graph.module) for layer in group]
            columns = column_tops(weights)
            scale = smoothing_scale(salience(graph.statistics[group[0].name], columns), columns, 0.5)
            multiplier = (1 / scale).to(group[0].dtype)
            balanced = [scaled_weight(weight, multiplier) for weight in weights]
            if all(bool(weight.isfinite().all()) for weight in balanced):  # of float16
                outliers = outliers_of(balanced, [layer.plan for layer in group])
                scale_inputs(graph, group, multiplier, outliers, Balance.__name__)
                count += len(group)
        return count
