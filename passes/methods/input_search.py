"""Input scales of least output error: both ends of the range of each group are searched."""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

import torch
from torch import Tensor

from fxq import numerics
from fxq.core.config import RecipeError
from fxq.core.method import GROUPED, INTEGER, LayerUpdate
from fxq.passes.methods import LayerProblem, Units, subsample
from fxq.passes.methods.ranges import affine
from fxq.passes.methods.units import TINY


@dataclasses.dataclass(frozen=True)
class InputSearch:
    """Scale and zero point of each group by what their rounding and clipping do to the output of the float weights.

    ``sum_i w_i |W (x_i - x'_i) - shift|^2`` is measured for every pair of ``ratios`` of the lowest and the highest
    input, on at most ``rows`` weighted rows; a constant shift of the output costs nothing, as the bias takes it up. The
    scales that are there already are kept where no pair is better, and where an int32 could not hold the sums of both
    groups (:func:`fxq.numerics.ratio_limit`). Weights are not looked at: put it before methods
    that choose integers. Schemes with scales per token have nothing to search.
    """

    formats: ClassVar[tuple[str, ...]] = (INTEGER, GROUPED)
    ratios: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    rows: int = 2048

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 < r <= 1 for r in self.ratios):
            raise RecipeError(f"InputSearch: ratios = {self.ratios}, expected values in 0..1")
        if self.rows < 1:
            raise RecipeError(f"InputSearch: rows = {self.rows}, expected at least 1")

    def apply(self, problem: LayerProblem, update: LayerUpdate | None) -> LayerUpdate:
        """Replace the input scales of ``update``.

        Raises:
            ValueError: when no method has chosen scales before.
        """
        if update is None:
            raise ValueError("InputSearch refines scales chosen before it: put RangeSearch or MinMax first")
        if update.input_scale is None or update.input_zero_point is None or not len(problem.rows):
            return update
        units = Units.of(problem)
        index, weights = subsample(problem.rows, problem.row_weights, self.rows, problem.seed)
        rows, weights = problem.rows[index] / units.inputs, weights / weights.sum()
        scales, zeros = update.input_scale.clone(), update.input_zero_point.clone()
        for g, part in enumerate(problem.groups):
            weight = problem.weight[:, part] / units.weights
            known = float(scales[g]) / units.inputs, int(zeros[g])
            scale, zeros[g] = self._search(problem, rows[:, part], weights, weight, known)
            scales[g] = max(scale * units.inputs, TINY)
        if len(scales) == 2:
            ratio = float((update.weight_scale[1] / update.weight_scale[0]).max() * scales[1] / scales[0])
            if not ratio <= 0.5 * numerics.ratio_limit(problem.weight.shape[1], problem.split):
                return update
        return dataclasses.replace(update, input_scale=scales, input_zero_point=zeros)

    def _search(
        self, problem: LayerProblem, x: Tensor, weights: Tensor, weight: Tensor, known: tuple[float, int]
    ) -> tuple[float, int]:
        """Scale and zero point of rows [R, K] of one group whose errors e cost ``|W e|^2``, W [N, K]."""
        bits = problem.scheme.input_bits
        low_bit, high_bit = numerics.integer_range(bits)
        low, high = float(x.min()), float(x.max())
        pairs = [affine(low * a, high * b, bits) for a, b in itertools.product(self.ratios, repeat=2)]
        form = weight.T @ weight if len(weight) > weight.shape[1] else None  # whichever product is the smaller
        best, found = torch.inf, known
        for scale, zero in dict.fromkeys((known, *pairs)):
            q = (x / scale).round_().add_(zero).clamp_(low_bit, high_bit)
            error = q.sub_(zero).mul_(scale).sub_(x)
            error -= weights @ error
            squares = (error @ weight.T).square_() if form is None else (error @ form).mul_(error)
            cost = float((squares.sum(1) * weights).sum())
            if cost < best:
                best, found = cost, (scale, zero)
        return found
