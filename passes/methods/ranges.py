"""Scales from ranges: MinMax, and the percentile search of Q-ARVD (arXiv 2605.21072); both round to nearest.

Integers or float8; the search for scales of the latter is in :mod:`fxq.passes.methods.float_ranges`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fxq import numerics
from fxq.core.config import RecipeError
from fxq.core.method import FLOAT8, GROUPED, INTEGER, LayerUpdate, Scheme
from fxq.kernels import float8
from fxq.passes.methods import LayerProblem
from fxq.passes.methods.clipping import SAMPLE_LIMIT, clips, representative
from fxq.passes.methods.float_ranges import float_scale, search_float_input, search_float_weight
from fxq.passes.methods.grid import Grid, grouped
from fxq.passes.methods.units import TINY, unit

_SEARCH_LIMIT = 1 << 21  # weights searched at a time: the temporaries are about 24 bytes for each
_MAX_ZERO_POINT = 1 << 20  # beyond it float32 no longer resolves single integers
_LARGEST = float(torch.finfo(torch.float32).max)


def affine(low: float, high: float, bits: int) -> tuple[float, int]:
    """Scale and zero point that map [low, high] onto the signed ``bits``-bit integers.

    A range without width is widened to contain zero; an all-zero one gets scale 1. A range far from zero gets fewer
    levels than there are, so that the zero point stays below 2**20. No scale is below 2**-126, the smallest normal
    float32: of smaller values the nearest multiples of it are kept.
    """
    if high == low:
        low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        return 1.0, 0
    scale = max((high - low) / (2**bits - 1), abs(low) / _MAX_ZERO_POINT, TINY)
    return scale, round(-low / scale) + numerics.integer_range(bits)[0]


def search_input_range(
    values: Tensor,
    bits: int,
    percentiles: Sequence[float],
    weights: Tensor | None = None,
    extremes: tuple[float, float] | None = None,
    seed: int = 0,
) -> tuple[float, int]:
    """Scale and zero point of least squared error over clipping percentiles of both tails.

    The error is that of all calibration rows: ``sum_i c_i |x_i - x'_i|^2``. Where the rows have more than about a
    million values it is estimated on a part of each row: more of rows of more energy, all of those that count most,
    channels from a random one on at equal distances.

    Args:
        values: float32 sample of one group's activations [..., K].
        bits: 2..8.
        percentiles: fractions in 0.5..1, 1 meaning no clipping.
        weights: float [R], the number of calibration rows that each row stands for; None: all the same.
        extremes: exact minimum and maximum of the calibration data, which no clipping keeps; None: those of the sample.
            Where they are more than twice as wide as the widest percentile, some ranges between are tried as well.
        seed: of the choice of channels.
    """
    rows = values.reshape(-1, values.shape[-1])
    low, high = extremes or (float(rows.min()), float(rows.max()))
    size = float(unit(torch.tensor(max(-low, high), dtype=torch.float32, device="cpu")))
    flat, counts = representative(rows / size if rows.numel() <= SAMPLE_LIMIT else rows, weights, seed)
    flat = flat if rows.numel() <= SAMPLE_LIMIT else flat / size
    low_bit, high_bit = numerics.integer_range(bits)
    best: tuple[float, float, int] | None = None
    for clip in clips(flat, counts, percentiles, (low / size, high / size)):
        scale, zero = affine(*clip, bits)
        q = (flat / scale).round_().add_(zero).clamp_(low_bit, high_bit)
        error = q.sub_(zero).mul_(scale).sub_(flat).square_()
        total = float(error.mean() if counts is None else torch.dot(error, counts))
        if best is None or total < best[0]:
            best = (total, scale, zero)
    assert best is not None
    return max(best[1] * size, TINY), best[2]


def search_weight_scale(weight: Tensor, bits: int, percentiles: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Per-output-channel scale of least squared error, whatever the unit; 1 for channels of zeros.

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
    size = unit(torch.maximum(weight.amax(1), -weight.amin(1)))
    weight = weight / size[:, None]
    magnitude = weight.abs()
    top = magnitude.amax(1)
    ordered = magnitude.sort(1).values
    clipped = [ordered[:, round(p * (weight.shape[1] - 1))] for p in percentiles] + [top * r for r in ratios]
    best_scale = top / high
    best_error = torch.full_like(top, torch.inf)
    for clip in clipped:
        scale = torch.where(clip > 0, clip / high, best_scale)
        q = (weight / scale[:, None].clamp(min=TINY)).round_().clamp_(low, high)
        error = q.mul_(scale[:, None]).sub_(weight).square_().sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return torch.where(top > 0, (best_scale * size).clamp(min=TINY), 1.0)


def _rounded(problem: LayerProblem, grid: Grid, inputs: list[tuple[float, int]]) -> LayerUpdate:
    """The update of these scales; ``inputs`` is empty where input scales are measured per token."""
    scale, device = grid.scale, problem.weight.device
    if not inputs:
        return LayerUpdate(weight=_round_weight(problem, grid), weight_scale=scale, multiplier=grid.multiplier)
    input_scale = torch.tensor([s for s, _ in inputs], dtype=torch.float32, device=device)
    if problem.scheme.is_float8:
        return LayerUpdate(weight=_round_weight(problem, grid), weight_scale=scale, input_scale=input_scale)
    if len(inputs) == 2:
        # Half the limit leaves room for methods that move the input scales afterwards.
        limit = 0.5 * numerics.ratio_limit(problem.weight.shape[1], problem.split)
        least = scale[1].double() * (inputs[1][0] / inputs[0][0] / limit)
        scale[0] = torch.maximum(scale[0], least.clamp(max=_LARGEST).float())
    return LayerUpdate(
        weight=_round_weight(problem, grid),
        weight_scale=scale,
        multiplier=grid.multiplier,
        input_scale=input_scale,
        input_zero_point=torch.tensor([z for _, z in inputs], dtype=torch.int32, device=device),
    )


def _round_weight(problem: LayerProblem, grid: Grid) -> Tensor:
    """int8 or float8 [N, K] of nearest numbers, some rows at a time."""
    (outputs, width), scheme = problem.weight.shape, problem.scheme
    step = max(1, _SEARCH_LIMIT // width)
    nearest = torch.empty_like(problem.weight, dtype=scheme.input_dtype)
    low, high = numerics.integer_range(scheme.weight_bits)
    for at in (slice(first, first + step) for first in range(0, outputs, step)):
        rows, scales = problem.weight[at], grid.scale[:, at]
        if scheme.is_float8:
            nearest[at] = float8.quantize_weight(rows, scales, problem.split)
        elif grid.multiplier is not None:
            nearest[at] = grid.multiplied((rows / grid.steps(width, at)).round_().clamp_(low, high), at)
        else:
            nearest[at] = numerics.quantize_weight(rows, scales, problem.split, scheme.weight_bits)
    return nearest


def _grid(problem: LayerProblem, scales: Callable[[Tensor], Tensor]) -> Grid:
    """Scales of each output, or of each 32 channels of it where the scheme has a ``weight_group``.

    Args:
        problem: whose weight is scaled.
        scales: of each row of a weight [N, K], float32 [N], 1 for rows of zeros.
    """
    if not problem.scheme.weight_group:
        return Grid(torch.stack([scales(problem.weight[:, part]) for part in problem.groups]), problem.split)
    blocks = problem.weight.reshape(-1, problem.scheme.weight_group)
    steps = torch.where(blocks.any(1), scales(blocks), 0.0)
    return grouped(problem, steps.reshape(len(problem.weight), -1))


def _largest(scheme: Scheme) -> float:
    """Largest number of the format of a scheme's weights."""
    return float8.LARGEST if scheme.is_float8 else numerics.integer_range(scheme.weight_bits)[1]


def _extremes(problem: LayerProblem, part: slice) -> tuple[float, float]:
    """Exact minimum and maximum of a group's inputs."""
    return float(problem.low[part].min()), float(problem.high[part].max())


@dataclasses.dataclass(frozen=True)
class MinMax:
    """The baseline: absolute maximum per weight channel, exact minimum and maximum of activations.

    Schemes with a scale per token have no activation range to choose.
    """

    formats: ClassVar[tuple[str, ...]] = (INTEGER, FLOAT8, GROUPED)

    def apply(self, problem: LayerProblem, update: LayerUpdate | None) -> LayerUpdate:
        """Choose scales; replaces ``update``."""
        high, inputs = _largest(problem.scheme), list[tuple[float, int]]()

        def scales(weight: Tensor) -> Tensor:
            top = torch.maximum(weight.amax(1), -weight.amin(1))
            return torch.where(top > 0, (top / high).clamp(min=TINY), 1.0)

        for part in problem.groups:
            if not problem.scheme.per_token:
                low, most = _extremes(problem, part)
                if problem.scheme.is_float8:
                    inputs.append((float_scale(max(-low, most)), 0))
                else:
                    inputs.append(affine(low, most, problem.scheme.input_bits))
        return _rounded(problem, _grid(problem, scales), inputs)


@dataclasses.dataclass(frozen=True)
class RangeSearch:
    """Ranges of least squared error: clipping percentiles for activations, percentiles and ratios for weights.

    The published search uses the percentiles .999, .9999 and .99999 for both. Unclipped activations are added here,
    and for weights ``ratios`` of the absolute maximum: at 4 bits a channel of a few hundred weights has no percentile
    between "clip nothing" and "clip one". ``ratios=()`` with the three percentiles is the published search. Schemes
    with a scale per token get weight scales only, and need no calibration rows for them. Unclipped means the exact
    extremes of all calibration rows, sampled or not. A float8 scale has no range to fill: see
    :func:`~fxq.passes.methods.float_ranges.search_float_weight`.
    """

    formats: ClassVar[tuple[str, ...]] = (INTEGER, FLOAT8, GROUPED)
    percentiles: tuple[float, ...] = (0.999, 0.9999, 0.99999, 1.0)
    ratios: tuple[float, ...] = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)

    def __post_init__(self) -> None:
        if not self.percentiles or not all(0.5 <= p <= 1 for p in self.percentiles):
            raise RecipeError(f"RangeSearch: percentiles = {self.percentiles}, expected at least one in 0.5..1")
        if not all(0 < r <= 1 for r in self.ratios):
            raise RecipeError(f"RangeSearch: ratios = {self.ratios}, expected values in 0..1")

    def apply(self, problem: LayerProblem, update: LayerUpdate | None) -> LayerUpdate:
        """Choose scales; replaces ``update``."""
        grid = _grid(problem, functools.partial(self._weight_scale, problem.scheme))
        inputs = [] if problem.scheme.per_token else [self._input_scale(problem, part) for part in problem.groups]
        return _rounded(problem, grid, inputs)

    def _weight_scale(self, scheme: Scheme, weight: Tensor) -> Tensor:
        """float32 [N] of weights [N, K]."""
        if scheme.is_float8:
            return search_float_weight(weight, self.percentiles, self.ratios)
        return search_weight_scale(weight, scheme.weight_bits, self.percentiles, self.ratios)

    def _input_scale(self, problem: LayerProblem, part: slice) -> tuple[float, int]:
        """Scale and zero point of one group."""
        rows, extremes = problem.rows[:, part], _extremes(problem, part)
        if problem.scheme.is_float8:
            return search_float_input(rows, self.percentiles, problem.counts, extremes, problem.seed), 0
        bits = problem.scheme.input_bits
        return search_input_range(rows, bits, self.percentiles, problem.counts, extremes, problem.seed)
