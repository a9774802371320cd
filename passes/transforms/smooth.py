"""Rewrite: input channels are divided by scales that weights are multiplied with (SmoothQuant, arXiv 2211.10438)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fxq.core.config import RecipeError
from fxq.core.ir import QuantGraph, Stage
from fxq.core.method import LayerProblem, LayerStatistics
from fxq.core.pipeline import Rewrite
from fxq.passes.methods import output_errors, subsample
from fxq.passes.methods.ranges import RangeSearch
from fxq.passes.transforms.scaling import (
    FEWEST_ROWS,
    column_tops,
    may_learn,
    scale_inputs,
    scaled_weight,
    smoothing_scale,
)
from fxq.passes.transforms.sites import Layer, groups_of, outliers_of
from fxq.runtime.memory.residency import Residency


@dataclasses.dataclass(frozen=True)
class Smooth(Rewrite):
    """An input x becomes ``x / s`` and the weights W that read it become ``W s``, channel by channel.

    For each layer, or each group of layers on one input, the scales of every one of ``alphas`` are tried beside none at
    all. What counts is the squared error of the outputs with the weights rounded to nearest under the layers' schemes:
    ranges are searched on every other calibration row and errors measured on those between, ``rows`` in all. A group
    for which none is better than no scales is left as it is, and so are layers of a scheme without ``reconstruct`` and
    those with too few rows. Outlier channels are detected again on the smoothed weights.

    Registers ``<layer>.smoothing`` [K], the reciprocal of s in model dtype, under the first layer of a group. Costs one
    elementwise product for each input.

    Source: SmoothQuant (arXiv 2211.10438), without its fusion into the norm before, with a searched strength.
    """

    alphas: tuple[float, ...] = (0.25, 0.5, 0.75)
    rows: int = 2048
    needs: ClassVar[Stage] = Stage.CALIBRATED
    gives: ClassVar[Stage] = Stage.CALIBRATED
    learns: ClassVar[bool] = True
    stores: ClassVar[tuple[str, ...]] = ("smoothing",)

    def __post_init__(self) -> None:
        if not self.alphas or not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise RecipeError(f"Smooth: alphas = {self.alphas}, expected at least one in 0..1")
        if self.rows < FEWEST_ROWS:
            raise RecipeError(f"Smooth: rows = {self.rows}, expected at least {FEWEST_ROWS}")

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of layers smoothed."""
        workers, residency = graph.workers, Residency()
        groups = [group for group in groups_of(graph.module) if may_learn(graph, group)]
        owners = graph.owners([layer.plan for layer in group] for group in groups)
        count = 0
        for group, owner in zip(groups, owners, strict=True):
            mine = owner == workers.rank
            found = workers.share(self._search(graph, group) if mine else None, owner)
            residency.give_back(*(layer.weight(graph.module) for layer in group))
            if found:
                outliers = [tuple(found[f"outliers.{i}"].tolist()) for i in range(len(group))]
                scale_inputs(graph, group, found["multiplier"], outliers, Smooth.__name__)
                count += len(group)
        return count

    def _search(self, graph: QuantGraph, group: Sequence[Layer]) -> dict[str, Tensor]:
        """``multiplier`` [K] in model dtype and ``outliers.<i>`` of each layer; nothing where none is better."""
        statistics = graph.statistics[group[0].name]
        weights = [layer.weight(graph.module) for layer in group]
        tops = torch.maximum(-statistics.low, statistics.high).clamp(min=0)
        columns = column_tops(weights)
        counts = torch.ones(len(statistics.rows)) if statistics.weights is None else statistics.weights
        index, mass = subsample(statistics.rows.float(), counts, self.rows, 0)
        sample = _Sample(statistics, statistics.rows[index].float(), mass)
        best = _error(group, weights, [layer.plan.outliers for layer in group], sample, None)
        found: dict[str, Tensor] = {}
        for alpha in self.alphas:
            multiplier = (1 / smoothing_scale(tops, columns, alpha)).to(group[0].dtype)
            smoothed = [scaled_weight(weight, multiplier) for weight in weights]
            if not all(bool(w.isfinite().all()) for w in smoothed):
                continue  # of float16
            outliers = outliers_of(smoothed, [layer.plan for layer in group])
            error = _error(group, smoothed, outliers, sample, multiplier.float())
            if error < best:
                best, found = error, {"multiplier": multiplier}
                for i, channels in enumerate(outliers):
                    found[f"outliers.{i}"] = torch.tensor(channels, dtype=torch.int64, device="cpu")
        return found


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Some calibration rows float32 [R, K] of a group, and how many of all each stands for."""

    statistics: LayerStatistics
    rows: Tensor
    mass: Tensor


def _error(
    group: Sequence[Layer],
    weights: Sequence[Tensor],
    outliers: Sequence[tuple[int, ...]],
    sample: _Sample,
    multiplier: Tensor | None,
) -> float:
    """Squared error of the group's quantized outputs on rows that no range was searched on."""
    if len(set(outliers)) == 1:
        weights, outliers = [torch.cat(list(weights))], outliers[:1]
    total = 0.0
    for weight, channels in zip(weights, outliers, strict=True):
        problem = _problem(group[0], weight.float(), channels, sample, multiplier)
        rows, mass = problem.rows, problem.row_weights
        fitted = dataclasses.replace(problem, rows=rows[::2], row_weights=mass[::2], counts=mass[::2])
        update = RangeSearch().apply(fitted, None)
        unseen = dataclasses.replace(problem, rows=rows[1::2])
        total += float(output_errors(unseen, update, mass[1::2])[0].sum())
    return total


def _problem(
    layer: Layer, weight: Tensor, outliers: tuple[int, ...], sample: _Sample, multiplier: Tensor | None
) -> LayerProblem:
    """A layer's problem on a sample, channels in ``[normal | outlier]`` order."""
    chosen, statistics = set(outliers), sample.statistics
    order = torch.tensor([k for k in range(weight.shape[1]) if k not in chosen] + list(outliers), device="cpu")
    given = (statistics.low, statistics.high, sample.rows)
    low, high, rows = (t if multiplier is None else t * multiplier for t in given)
    device = weight.device
    return LayerProblem(
        layer=layer.name,
        weight=weight[:, order.to(device)],
        low=low[order].to(device),
        high=high[order].to(device),
        rows=rows[:, order].to(device),
        row_weights=sample.mass.to(device),
        scheme=layer.plan.quantization,
        split=weight.shape[1] - len(outliers),
        seed=0,
    )
