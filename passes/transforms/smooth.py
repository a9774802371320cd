"""Rewrite: input channels are divided by scales that weights are multiplied with (SmoothQuant, arXiv 2211.10438)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, fx

from fxq.core.config import RecipeError
from fxq.core.ir import QuantGraph, Stage, put_tensor
from fxq.core.method import LayerProblem, LayerStatistics
from fxq.core.pipeline import Rewrite
from fxq.passes.methods import output_errors, subsample
from fxq.passes.methods.ranges import RangeSearch
from fxq.passes.methods.units import unit_of
from fxq.passes.transforms.sites import (
    Layer,
    call,
    change_inputs,
    groups_of,
    mark,
    outliers_of,
    replace_weight,
    shape_of,
    stored,
    wide,
)
from fxq.runtime.residency import Residency

_MOST = 12.0  # doublings and halvings from the mean scale, so that a channel that is nearly dead stays finite
_FEWEST = 8  # rows to choose on


def smoothing_scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """``s_j = inputs_j^alpha / weights_j^(1 - alpha)``, over its geometric mean: float64 [K].

    Channels in which either is zero have 1. Changing the unit of either changes nothing.

    Args:
        inputs: largest magnitude of each input channel, [K].
        weights: the same of the weight's columns, [K].
        alpha: 0..1, how much of the difficulty goes from inputs to weights.

    Source: SmoothQuant (arXiv 2211.10438), Eq. 4.
    """
    x, w = ((top.float() / unit_of(top)).double() for top in (inputs, weights))
    live = (x > 0) & (w > 0)
    if not bool(live.any()):
        return torch.ones_like(x)
    logs = torch.where(live, alpha * x.log2() - (1 - alpha) * w.log2(), 0.0)
    logs = torch.where(live, logs - logs[live].mean(), 0.0)
    return logs.clamp(-_MOST, _MOST).exp2()


def _smoothed(weight: Tensor, multiplier: Tensor) -> Tensor:
    """The weight [N, K], in its dtype, for inputs that are multiplied by ``multiplier`` [K]."""
    exact = wide(weight)
    return (exact / multiplier.to(exact)).to(weight.dtype)


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
        if self.rows < _FEWEST:
            raise RecipeError(f"Smooth: rows = {self.rows}, expected at least {_FEWEST}")

    def run(self, graph: QuantGraph) -> int:
        """Returns the number of layers smoothed."""
        workers, residency = graph.workers, Residency()
        groups = [group for group in groups_of(graph.module) if _may_learn(graph, group)]
        owners = graph.owners([layer.plan for layer in group] for group in groups)
        count = 0
        for group, owner in zip(groups, owners, strict=True):
            mine = owner == workers.rank
            found = workers.share(self._search(graph, group) if mine else None, owner)
            residency.give_back(*(layer.weight(graph.module) for layer in group))
            if found:
                _rewrite(graph, group, found)
                count += len(group)
        return count

    def _search(self, graph: QuantGraph, group: Sequence[Layer]) -> dict[str, Tensor]:
        """``multiplier`` [K] in model dtype and ``outliers.<i>`` of each layer; nothing where none is better."""
        statistics = graph.statistics[group[0].name]
        weights = [layer.weight(graph.module) for layer in group]
        tops = torch.maximum(-statistics.low, statistics.high).clamp(min=0)
        columns = torch.stack([w.abs().amax(0) for w in weights]).amax(0).cpu()
        counts = torch.ones(len(statistics.rows)) if statistics.weights is None else statistics.weights
        index, mass = subsample(statistics.rows.float(), counts, self.rows, 0)
        sample = _Sample(statistics, statistics.rows[index].float(), mass)
        best = _error(group, weights, [layer.plan.outliers for layer in group], sample, None)
        found: dict[str, Tensor] = {}
        for alpha in self.alphas:
            multiplier = (1 / smoothing_scale(tops, columns, alpha)).to(group[0].dtype)
            smoothed = [_smoothed(weight, multiplier) for weight in weights]
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


def _may_learn(graph: QuantGraph, group: Sequence[Layer]) -> bool:
    statistics = graph.statistics.get(group[0].name)
    enough = statistics is not None and len(statistics.rows) >= _FEWEST
    return enough and all(layer.plan.quantization.reconstruct for layer in group)


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


def _rewrite(graph: QuantGraph, group: Sequence[Layer], found: dict[str, Tensor]) -> None:
    module, multiplier = graph.module, found["multiplier"]
    weights = [layer.weight(module) for layer in group]
    for i, (layer, weight) in enumerate(zip(group, weights, strict=True)):
        replace_weight(module, layer, _smoothed(weight, multiplier))
        mark(layer, Smooth.__name__, tuple(found[f"outliers.{i}"].tolist()))
        known, factor = graph.statistics[layer.name], multiplier.float()
        graph.statistics[layer.name] = dataclasses.replace(
            known, low=known.low * factor, high=known.high * factor, multiplier=factor
        )

    def change(before: fx.Node, x: fx.Node, layer: str) -> fx.Node:
        put_tensor(module, f"{layer}.smoothing", multiplier.to(weights[0].device))
        return call(
            before, torch.ops.aten.mul.Tensor, (x, stored(before, f"{layer}.smoothing", multiplier)), shape_of(x)
        )

    change_inputs(group, change)
