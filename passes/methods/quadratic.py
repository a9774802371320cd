"""The output error of a layer as a quadratic form of its quantized weights, and what methods that minimise it share.

With rows x_i of loss weights w_i (sum 1), x'_i their quantized values and a free shift of the output,
``sum_i w_i |W x_i - W' x'_i - shift|^2 = tr((W' - T) G (W' - T)^T) + const`` where ``G`` is the weighted covariance of
x' and ``T = W cov(x, x') G^-1`` the weight that undoes the inputs' quantization as far as a linear map can. All
calibration rows that are kept are in G and T; none is needed afterwards.

Where the moments of all rows are known (``problem.moments``), G and T are those of all rows, and the sample says what
rounding makes of them (:class:`~fxq.passes.methods.moments.SampleMoments`).
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from fxq import numerics
from fxq.core.method import GROUPED, INTEGER, LayerUpdate, RecipeError
from fxq.passes.methods import LayerProblem, Units, simulated_input, simulated_rows
from fxq.passes.methods.grid import Grid, expanded
from fxq.passes.methods.moments import SampleMoments, strips
from fxq.passes.methods.units import TINY

BLOCK = 128
"""Input channels whose products with all others are made at once."""

ROWS = 4096
"""Calibration rows multiplied at a time."""

DOUBLE = 4096
"""Most channels whose sums are kept in float64."""

_DAMPING = 1e-3  # of the mean diagonal: directions that no row has keep their weights
_SHRINKING = 0.2  # of the mean diagonal, times channels a row: few rows say little about a covariance


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """The form of one layer, in the :class:`~fxq.passes.methods.Units` of its problem.

    ``weight`` float32 [N, K] are the float weights; ``gram`` float32 [K, K] is G, damped; ``target`` float32 [N, K] is
    T; ``shift_of_float`` float32 [N] the mean output of the float weights and ``mean`` float32 [K] the mean of the
    quantized inputs.
    """

    weight: Tensor
    gram: Tensor
    target: Tensor
    shift_of_float: Tensor
    mean: Tensor

    @classmethod
    def of(cls, problem: LayerProblem, update: LayerUpdate) -> Quadratic:
        """The form under an update's input scales; made once for a problem and these scales.

        Args:
            problem: with at least one row.
            update: its input scales say what the quantized inputs are.
        """
        scales = [t.tolist() for t in (update.input_scale, update.input_zero_point) if t is not None]
        known = problem.cache.get("quadratic")
        if known is None or known[0] != scales:
            known = problem.cache["quadratic"] = None  # two would be alive at once
            known = scales, cls._of(problem, update, Units.of(problem))
            problem.cache["quadratic"] = known
        form = known[1]
        assert isinstance(form, cls)
        return form

    @classmethod
    def _of(cls, problem: LayerProblem, update: LayerUpdate, units: Units) -> Quadratic:
        width, device = problem.weight.shape[1], problem.weight.device
        weight, update = units.of_weight(problem.weight), units.update(update)
        sums = torch.float64 if width <= DOUBLE else torch.float32
        weights = problem.row_weights.double() / problem.row_weights.double().sum()
        everything = problem.moments
        gram = torch.zeros(width, width, dtype=sums, device=device)
        sample = None if everything is None else SampleMoments(width, sums, device)
        cross = torch.zeros(weight.shape, dtype=sums, device=device)  # [N, K]: sum of W x x'^T
        mean = torch.zeros(width, dtype=torch.float64, device=device)
        mean_output = torch.zeros(len(weight), dtype=torch.float64, device=device)
        middle = _middle(units.of_rows(problem.rows[:ROWS]))
        origin, origin_output = simulated_input(problem, update, middle), middle @ weight.T
        for stored, w in zip(problem.rows.split(ROWS), weights.float().split(ROWS), strict=True):
            # From a row in the middle of them: sums of squares about zero would cancel where inputs hardly vary.
            rows = units.of_rows(stored)
            output = (rows @ weight.T).sub_(origin_output)
            quantized = simulated_rows(problem, update, rows).sub_(origin)
            if sample is not None:
                sample.add(rows.sub(middle), quantized, w)
            del rows
            weighted = quantized * w[:, None]
            for at in strips(width):
                gram[at] += weighted[:, at].T @ quantized
            for at in strips(len(weight)):
                cross[at] += output[:, at].T @ weighted
            mean += weighted.sum(0)
            mean_output += w.double() @ output.double()
            del quantized, weighted, output
        for at in strips(width):
            gram[at] -= torch.outer(mean[at], mean).to(sums)
        for at in strips(len(weight)):
            cross[at] -= torch.outer(mean_output[at], mean).to(sums)
        concentration = _concentration(weights)
        if everything is not None and sample is not None:
            concentration = everything.concentration
            shift = sample.complete(everything, units, middle[0], mean, gram, cross, weight)
            mean, mean_output = mean + shift, mean_output + weight.double() @ shift
            del sample
        damping = max(float(gram.diagonal().mean()) * max(_DAMPING, _SHRINKING * width * concentration), TINY)
        gram.diagonal().add_(damping)
        cross.add_(weight, alpha=damping)
        target = _solved(cross, _factor(lambda: by_columns(gram)))
        del cross
        mean, mean_output = mean + origin[0], mean_output + origin_output[0]
        return cls(weight, gram.float(), target, mean_output.float(), mean.float())

    def loss(self, weight: Tensor) -> Tensor:
        """The form's value for each output, float32 [N], of dequantized weights [N, K]."""
        difference = weight - self.target
        return ((difference @ self.gram) * difference).sum(1)

    def shift(self, weight: Tensor) -> Tensor:
        """What is to be added to the bias so that the mean outputs of dequantized weights [N, K] are right, [N]."""
        return self.shift_of_float - weight @ self.mean


def _middle(rows: Tensor) -> Tensor:
    """The row nearest to the mean of all, [1, K]."""
    return rows[(rows - rows.mean(0)).square_().sum(1).argmin()][None].clone()


def _concentration(weights: Tensor) -> float:
    """One over the number of rows that weights of sum 1 amount to (Kish)."""
    return float(weights.square().sum())


def reordered(gram: Tensor, order: Tensor, out: Tensor | None = None) -> Tensor:
    """``gram`` [K, K] with rows and columns in ``order``, by strips: one [K, K] is made, or none with ``out``."""
    found = torch.empty_like(gram, memory_format=torch.contiguous_format) if out is None else out
    for at in strips(len(gram)):
        found[at] = gram[order[at]][:, order]
    return found


def by_columns(gram: Tensor, order: Tensor | None = None) -> Tensor:
    """A copy of ``gram`` [K, K] that lies in memory column by column, as LAPACK wants it, channels in ``order``."""
    found = torch.empty_like(gram, memory_format=torch.contiguous_format).T
    return found.copy_(gram) if order is None else reordered(gram, order, found)


def by_channel(values: Tensor, channels: Tensor) -> Tensor:
    """Values [N, K] of some channels as [len(channels), N]: what is alike for all outputs lies side by side."""
    return values[:, channels].T.contiguous()


def _factor(make: Callable[[], Tensor]) -> Tensor:
    """Lower Cholesky factor of a positive matrix that rounding may have made a little indefinite.

    Args:
        make: a new matrix each time, by columns; the factor is written over it, so that there is no second one.

    Raises:
        ValueError: for a matrix that is not finite.
    """
    matrix = make()
    size, mean = float(matrix.diagonal().abs().max()), float(matrix.diagonal().mean())
    if not math.isfinite(size):
        raise ValueError("sums of squares of a layer's inputs are not finite: its calibration data are out of range")
    failed = _factor_over(matrix)
    damping = max(mean, size * _DAMPING, TINY) * _DAMPING
    while failed and damping < max(size, 1.0) * 1e6:
        damping *= 10
        del matrix
        matrix = make()
        matrix.diagonal().add_(damping)
        failed = _factor_over(matrix)
    if failed:
        raise ValueError("sums of squares of a layer's inputs are not finite: its calibration data are out of range")
    return matrix


def _factor_over(matrix: Tensor) -> bool:
    """Replace a matrix that lies by columns by its lower Cholesky factor; whether there is none."""
    if matrix.device.type != "cpu":
        factor, info = torch.linalg.cholesky_ex(matrix)
        matrix.copy_(factor)
        return bool(info)
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    return bool(info)


def _solved(cross: Tensor, factor: Tensor) -> Tensor:
    """``cross G^-1`` as float32 [N, K] for a lower Cholesky factor of G."""
    found = torch.empty_like(cross, dtype=torch.float32)
    for at in strips(len(cross)):
        # Not cholesky_solve, which copies the factor first.
        half = torch.linalg.solve_triangular(factor, cross[at].T, upper=False)
        found[at] = torch.linalg.solve_triangular(factor.T, half, upper=True).T
    return found


def cholesky(gram: Tensor, damping: float, order: Tensor | None = None) -> Tensor:
    """Lower Cholesky factor [K, K] of a form's matrix with ``damping`` times its mean diagonal added, float32.

    Args:
        gram: float32 [K, K]; it stays.
        damping: at least 0.
        order: int64 [K], of the channels of the factor; as they are if None.
    """

    def make() -> Tensor:
        matrix = by_columns(gram, order)
        added = float(matrix.diagonal().mean()) * damping
        matrix = matrix.double() if len(gram) <= DOUBLE else matrix
        matrix.diagonal().add_(added)
        return matrix

    return _factor(make).float()


def bounds(weight: Tensor, step: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The integers less than a step away from each weight [N, K], least and greatest, float32 [N, K].

    Calibration rows leave directions unseen in which larger changes cost nothing, until other rows come.

    Args:
        weight: of the model.
        step: value of one integer of each weight, [N, K].
        bits: of the integers.
    """
    low, high = numerics.integer_range(bits)
    scaled = weight / step
    return scaled.floor().clamp(low, high), scaled.ceil().clamp(low, high)


@dataclasses.dataclass(frozen=True)
class Solution:
    """Integers as float32 [N, K] and their grid, in units."""

    integers: Tensor
    grid: Grid

    def weight(self, outputs: slice = slice(None)) -> Tensor:
        """The dequantized weights float32 [N, K] of some outputs."""
        integers = self.integers[outputs]
        return integers * self.grid.steps(integers.shape[1], outputs)

    def with_scale(self, scale: Tensor) -> Solution:
        """The same integers under other scales [G, N]."""
        return dataclasses.replace(self, grid=dataclasses.replace(self.grid, scale=scale))


class QuadraticMethod(ABC):
    """Base of methods that lower a layer's :class:`Quadratic` under input scales chosen before them.

    An output whose error a method would raise keeps its integers and scales; multipliers of groups stay. The outputs'
    means are made right by the update's ``bias_shift``.
    """

    formats: ClassVar[tuple[str, ...]] = (INTEGER, GROUPED)
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]

    def apply(self, problem: LayerProblem, update: LayerUpdate | None) -> LayerUpdate:
        """Refine ``update``; layers without rows or whose scheme says ``reconstruct=False`` pass unchanged.

        Raises:
            ValueError: when no method has chosen scales before.
        """
        if update is None:
            name = type(self).__name__
            raise ValueError(f"{name} refines scales chosen before it: put RangeSearch or MinMax first in the recipe")
        if not problem.scheme.reconstruct or not len(problem.rows):
            return update
        units, form = Units.of(problem), Quadratic.of(problem, update)
        start = _start(problem, update, units)
        found = self.solve(problem, form, start)
        found = found.with_scale(_within_limit(problem, update, found.grid.scale))
        before, after = _loss(form, start), _loss(form, found)
        better = (after < before) & (found.grid.scale * units.weights >= TINY).all(0)
        scale = torch.where(better, found.grid.scale * units.weights, update.weight_scale)
        best = Solution(torch.where(better[:, None], found.integers, start.integers), found.grid)
        best = best.with_scale(scale / units.weights)
        shift = form.shift(best.weight()) * units.inputs * units.weights
        weight = best.grid.multiplied(best.integers).to(torch.int8)
        return dataclasses.replace(update, weight=weight, weight_scale=scale, bias_shift=shift)

    def operations(self, rows: int, width: int, outputs: int) -> float:
        """Floating-point operations of a layer with that many calibration rows, at most: the form, and the solution."""
        form = 2.0 * rows * width * (width + 2 * outputs) + width**3 / 3
        return form + self.solving(width, outputs)

    @abstractmethod
    def solving(self, width: int, outputs: int) -> float:
        """Floating-point operations of :meth:`solve`, at most."""

    @abstractmethod
    def solve(self, problem: LayerProblem, form: Quadratic, start: Solution) -> Solution:
        """Integers and scales of less error than ``start``, if the method finds some."""


@dataclasses.dataclass(frozen=True)
class IteratedMethod(QuadraticMethod):
    """Base of those that go down the form's gradient: so many ``iterations``, the first step of length ``rate``."""

    iterations: int
    rate: float

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise RecipeError(f"{type(self).__name__}: iterations = {self.iterations}, expected at least 1")
        if not 0 < self.rate <= 1:
            raise RecipeError(f"{type(self).__name__}: rate = {self.rate}, expected a number in 0..1")

    def solving(self, width: int, outputs: int) -> float:
        """A product with the form's matrix an iteration."""
        return 2.0 * outputs * width**2 * (1 + self.iterations)


def _start(problem: LayerProblem, update: LayerUpdate, units: Units) -> Solution:
    """The solution that an update is."""
    grid = Grid(update.weight_scale / units.weights, problem.split, update.multiplier)
    weight = update.weight.float()
    return Solution(weight if update.multiplier is None else weight / expanded(update.multiplier), grid)


def _loss(form: Quadratic, solution: Solution) -> Tensor:
    """:meth:`Quadratic.loss` of a solution."""
    found = []
    for at in strips(len(form.weight)):
        difference = solution.weight(at).sub_(form.target[at])
        found.append((difference @ form.gram).mul_(difference).sum(1))
    return torch.cat(found)


def _within_limit(problem: LayerProblem, update: LayerUpdate, scale: Tensor) -> Tensor:
    """Weight scales [G, N] under which the sums of both groups fit an int32, see :func:`fxq.numerics.ratio_limit`."""
    if len(scale) < 2 or update.input_scale is None:
        return scale
    limit = 0.5 * numerics.ratio_limit(problem.weight.shape[1], problem.split)
    least = scale[1] * float(update.input_scale[1].double() / update.input_scale[0].double() / limit)
    return torch.stack((torch.maximum(scale[0], least), scale[1]))
