"""Scaling of input channels, undone in the weights that read them: what the transforms that do so share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fxq.core.ir import QuantGraph, put_tensor
from fxq.passes.methods.units import unit_of
from fxq.passes.transforms.sites import (
    Layer,
    call,
    change_inputs,
    mark,
    replace_weight,
    shape_of,
    stored,
    wide,
)

FEWEST_ROWS = 8
"""Rows of calibration below which nothing is learned from them."""

_MOST = 12.0  # doublings and halvings from the mean scale, so that a channel that is nearly dead stays finite


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


def scaled_weight(weight: Tensor, multiplier: Tensor) -> Tensor:
    """The weight [N, K], in its dtype, for inputs that are multiplied by ``multiplier`` [K]."""
    exact = wide(weight)
    return (exact / multiplier.to(exact)).to(weight.dtype)


def column_tops(weights: Sequence[Tensor]) -> Tensor:
    """Largest magnitude of each input channel over weights [N, K] that read it, [K] on the CPU."""
    return torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).cpu()


def may_learn(graph: QuantGraph, group: Sequence[Layer]) -> bool:
    """Whether there are enough rows of a group's input, and its schemes let it learn from them."""
    statistics = graph.statistics.get(group[0].name)
    enough = statistics is not None and len(statistics.rows) >= FEWEST_ROWS
    return enough and all(layer.plan.quantization.reconstruct for layer in group)


def scale_inputs(
    graph: QuantGraph, group: Sequence[Layer], multiplier: Tensor, outliers: Sequence[tuple[int, ...]], name: str
) -> None:
    """Multiply the input of a group by ``multiplier`` [K] of model dtype, and divide its weights by it.

    Registers ``<layer>.smoothing`` under the first layer and keeps statistics and plans in step.

    Args:
        graph: changed.
        group: layers on one input.
        multiplier: finite and above zero.
        outliers: channels of each layer, on its new weight.
        name: of the transform, for plans.
    """
    module = graph.module
    weights = [layer.weight(module) for layer in group]
    for layer, weight, channels in zip(group, weights, outliers, strict=True):
        replace_weight(module, layer, scaled_weight(weight, multiplier))
        mark(layer, name, channels)
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
