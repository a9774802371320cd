"""Scales from ranges: MinMax, and the percentile search of Q-ARVD (arXiv 2605.21072); both round to nearest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fxq import numerics
from fxq.config import RecipeError
from fxq.ir import LayerUpdate
from fxq.passes.methods import LayerProblem

_SAMPLE_LIMIT = 1 << 20
_SEARCH_LIMIT = 1 << 21  # weights searched at a time: the temporaries are about 24 bytes for each
_LEAST_WEIGHT = 1e-30  # an output channel below it counts as zero: its scale would not be a normal float32
_MAX_ZERO_POINT = 1 << 20  # beyond it float32 no longer resolves single integers


def affine(low: float, high: float, bits: int) -> tuple[float, int]:
    """Scale and zero point that map [low, high] onto the signed ``bits``-bit integers.

    A range without width is widened to contain zero; an all-zero one gets scale 1. A range far from zero gets fewer
    levels than there are, so that the zero point stays below 2**20.
    """
    if high - low < 1e-8:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-8:
        return 1.0, 0
    scale = max((high - low) / (2**bits - 1), abs(low) / _MAX_ZERO_POINT)
    return scale, round(-low / scale) + numerics.integer_range(bits)[0]


def search_input_range(values: Tensor, bits: int, percentiles: Sequence[float]) -> tuple[float, int]:
    """Scale and zero point of least squared error over clipping percentiles of both tails.

    Args:
        values: float32 sample of one group's activations, any shape.
        bits: 2..8.
        percentiles: fractions in 0.5..1, 1 meaning no clipping.
    """
    flat = values.flatten()
    if len(flat) > _SAMPLE_LIMIT:
        flat = flat[:: -(-len(flat) // _SAMPLE_LIMIT)]
    low_bit, high_bit = numerics.integer_range(bits)
    best: tuple[float, float, int] | None = None
    clipped = [round((1 - p) * (len(flat) - 1)) for p in percentiles]  # values beyond the range, at either end
    lowest = flat.topk(max(clipped) + 1, largest=False).values
    highest = flat.topk(max(clipped) + 1).values
    for beyond in clipped:
        scale, zero = affine(float(lowest[beyond]), float(highest[beyond]), bits)
        q = (flat / scale).round_().add_(zero).clamp_(low_bit, high_bit)
        error = float(q.sub_(zero).mul_(scale).sub_(flat).square_().mean())
        if best is None or error < best[0]:
            best = (error, scale, zero)
    assert best is not None
    return best[1], best[2]


def search_weight_scale(weight: Tensor, bits: int, percentiles: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Per-output-channel scale of least squared error.

    Args:
        weight: float32 [N, K].
        bits: 4 or 8.
        percentiles: of ``|w|`` per channel that are tried as clipping points.
        ratios: fractions of the channel's absolute maximum that are tried as clipping points.

    Returns:
        float32 [N].
    """
    step = max(1, _SEARCH_LIMIT // weight.shape[1])
    return torch.cat([_search_rows(rows, bits, percentiles, ratios) for rows in weight.split(step)])


def _search_rows(weight: Tensor, bits: int, percentiles: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """:func:`search_weight_scale` of a weight whose temporaries fit into memory."""
    low, high = numerics.integer_range(bits)
    magnitude = weight.abs()
    top = magnitude.amax(1)
    ordered = magnitude.sort(1).values
    clips = [ordered[:, round(p * (weight.shape[1] - 1))] for p in percentiles] + [top * r for r in ratios]
    best_scale = torch.where(top > _LEAST_WEIGHT, top / high, 1.0)
    best_error = torch.full_like(top, torch.inf)
    for clip in clips:
        scale = torch.where(clip > _LEAST_WEIGHT, clip / high, best_scale)
        q = (weight / scale[:, None]).round_().clamp_(low, high)
        error = q.mul_(scale[:, None]).sub_(weight).square_().sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def _rounded(problem: LayerProblem, weight_scales: list[Tensor], inputs: list[tuple[float, int]]) -> LayerUpdate:
    """The update of these scales; ``inputs`` is empty where input scales are measured per token."""
    scale, device = torch.stack(weight_scales), problem.weight.device
    if not inputs:
        return LayerUpdate(weight=_round_weight(problem, scale), weight_scale=scale)
    if len(inputs) == 2:
        # Half the limit leaves room for methods that move the input scales afterwards.
        limit = 0.5 * numerics.ratio_limit(problem.weight.shape[1], problem.split)
        scale[0] = torch.maximum(scale[0], scale[1] * (inputs[1][0] / inputs[0][0] / limit))
    return LayerUpdate(
        weight=_round_weight(problem, scale),
        weight_scale=scale,
        input_scale=torch.tensor([s for s, _ in inputs], dtype=torch.float32, device=device),
        input_zero_point=torch.tensor([z for _, z in inputs], dtype=torch.int32, device=device),
    )


def _round_weight(problem: LayerProblem, scale: Tensor) -> Tensor:
    """int8 [N, K] of nearest integers, some rows at a time."""
    step = max(1, _SEARCH_LIMIT // problem.weight.shape[1])
    integers = torch.empty_like(problem.weight, dtype=torch.int8)
    for out, rows, scales in zip(*(t.split(step) for t in (integers, problem.weight, scale.T)), strict=True):
        out.copy_(numerics.quantize_weight(rows, scales.T, problem.split, problem.scheme.weight_bits))
    return integers


@dataclasses.dataclass(frozen=True)
class MinMax:
    """The baseline: absolute maximum per weight channel, exact minimum and maximum of activations.

    Schemes with a scale per token have no activation range to choose.
    """

    def apply(self, problem: LayerProblem, update: LayerUpdate | None) -> LayerUpdate:
        """Choose scales; replaces ``update``."""
        bits = problem.scheme.weight_bits
        high = numerics.integer_range(bits)[1]
        weights, inputs = [], []
        for part in problem.groups:
            weight = problem.weight[:, part]
            top = torch.maximum(weight.amax(1), -weight.amin(1))
            weights.append(torch.where(top > _LEAST_WEIGHT, top / high, 1.0))
            if not problem.scheme.per_token:
                extremes = float(problem.low[part].min()), float(problem.high[part].max())
                inputs.append(affine(*extremes, problem.scheme.input_bits))
        return _rounded(problem, weights, inputs)


@dataclasses.dataclass(frozen=True)
class RangeSearch:
    """Ranges of least squared error: clipping percentiles for activations, percentiles and ratios for weights.

    The published search uses the percentiles .999, .9999 and .99999 for both. Unclipped activations are added here,
    and for weights ``ratios`` of the absolute maximum: at 4 bits a channel of a few hundred weights has no percentile
    between "clip nothing" and "clip one". ``ratios=()`` with the three percentiles is the published search. Schemes
    with a scale per token get weight scales only, and need no calibration rows for them.
    """

    percentiles: tuple[float, ...] = (0.999, 0.9999, 0.99999, 1.0)
    ratios: tuple[float, ...] = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)

    def __post_init__(self) -> None:
        if not self.percentiles or not all(0.5 <= p <= 1 for p in self.percentiles):
            raise RecipeError(f"RangeSearch: percentiles = {self.percentiles}, expected at least one in 0.5..1")
        if not all(0 < r <= 1 for r in self.ratios):
            raise RecipeError(f"RangeSearch: ratios = {self.ratios}, expected values in 0..1")

    def apply(self, problem: LayerProblem, update: LayerUpdate | None) -> LayerUpdate:
        """Choose scales; replaces ``update``."""
        weights, inputs = [], []
        for part in problem.groups:
            weights.append(
                search_weight_scale(problem.weight[:, part], problem.scheme.weight_bits, self.percentiles, self.ratios)
            )
            if not problem.scheme.per_token:
                inputs.append(search_input_range(problem.rows[:, part], problem.scheme.input_bits, self.percentiles))
        return _rounded(problem, weights, inputs)
