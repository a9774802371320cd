"""Methods choose the integers and scales of one linear. A method is one file: pure math, then a dataclass.

Nothing here reads or changes a graph.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fxq import numerics
from fxq.core.method import LayerProblem, LayerUpdate, Method
from fxq.kernels import float8
from fxq.passes.methods.units import unit_of

__all__ = [
    "EXACT",
    "LayerProblem",
    "LayerUpdate",
    "Method",
    "Units",
    "amounts",
    "output_errors",
    "output_sqnr",
    "row_energies",
    "simulated_input",
    "simulated_rows",
    "subsample",
]

EXACT = 300.0
"""Decibels told of an output without any error."""

_BLOCK = 2048  # rows whose outputs are in memory at a time
_PART = 512  # rows quantized at a time


def simulated_input(problem: LayerProblem, update: LayerUpdate, x: Tensor) -> Tensor:
    """float32 [R, K]: rows ``x`` quantized as the scheme says, and dequantized."""
    split, bits = problem.split, problem.scheme.input_bits
    if problem.scheme.is_float8:
        if update.input_scale is None:
            return float8.dequantize_per_token(*float8.quantize_per_token(x, split), split)
        return float8.dequantize_input(float8.quantize_input(x, update.input_scale, split), update.input_scale, split)
    if update.input_scale is None or update.input_zero_point is None:
        q, scale = numerics.quantize_per_token(x, split, bits, problem.scheme.asymmetric)
        return numerics.dequantize_per_token(q, scale, split)
    q = numerics.quantize_input(x, update.input_scale, update.input_zero_point, split, bits)
    return numerics.dequantize_input(q, update.input_scale, update.input_zero_point, split)


def simulated_rows(problem: LayerProblem, update: LayerUpdate, rows: Tensor) -> Tensor:
    """:func:`simulated_input` of many rows, some at a time: it takes several times the memory of its result."""
    found = torch.empty_like(rows)
    for out, part in zip(found.split(_PART), rows.split(_PART), strict=True):
        out.copy_(simulated_input(problem, update, part))
    return found


@dataclasses.dataclass(frozen=True)
class Units:
    """Powers of two of a problem: of its inputs and of its weights. Its outputs are in units of their product."""

    inputs: float
    weights: float

    @classmethod
    def of(cls, problem: LayerProblem) -> Units:
        """The units of a problem's rows and weight."""
        return cls(unit_of(problem.rows), unit_of(problem.weight))

    def problem(self, problem: LayerProblem) -> LayerProblem:
        """The problem in these units, but for ``low``, ``high`` and ``bias``."""
        if self == Units(1.0, 1.0):
            return problem
        rows, weight = self.of_rows(problem.rows), self.of_weight(problem.weight)
        return dataclasses.replace(problem, rows=rows, weight=weight)

    def of_rows(self, rows: Tensor) -> Tensor:
        """Inputs in these units, the same tensor where that changes nothing."""
        return rows if self.inputs == 1.0 else rows / self.inputs

    def of_weight(self, weight: Tensor) -> Tensor:
        """Weights in these units, the same tensor where that changes nothing."""
        return weight if self.weights == 1.0 else weight / self.weights

    def update(self, update: LayerUpdate, *, back: bool = False) -> LayerUpdate:
        """An update's scales in these units, or ``back`` in those of the model."""
        inputs, weights = (1 / self.inputs, 1 / self.weights) if back else (self.inputs, self.weights)
        scales = None if update.input_scale is None else update.input_scale / inputs
        shift = None if update.bias_shift is None else update.bias_shift / inputs / weights
        return dataclasses.replace(
            update, weight_scale=update.weight_scale / weights, input_scale=scales, bias_shift=shift
        )


def amounts(energy: Tensor, mass: Tensor, total: float, most: float) -> Tensor:
    """How much of each row to look at, float64 [R]: ``total`` in all, ``most`` at most of one.

    A row's part is its mass times the mean of one and its energy over the mean energy: sums of what is alike for all
    rows and sums of what grows with their squares are both met closely. Rows whose part is ``most`` are set aside and
    the others compared among themselves, so that one huge row does not make the large ones look like the small.

    Args:
        energy: float64 [R], not negative.
        mass: float64 [R], positive: how often a row counts.
        total: less than ``most`` times the number of rows.
        most: of one row.
    """
    parts = torch.full_like(energy, most)
    free = torch.arange(len(energy), device=energy.device)
    while len(free) and total > 0:
        e, m = energy[free], mass[free]
        mean = float((e * m).sum() / m.sum())
        size = m * (1 + e / mean) if mean > 0 else m
        part = size * (total / size.sum())
        parts[free] = part.clamp(max=most)
        if not bool((full := part >= most).any()):
            break
        free, total = free[~full], total - most * int(full.sum())
    return parts


def row_energies(rows: Tensor) -> Tensor:
    """Squared L2 norms of rows [R, K] in the unit of the largest, float64 [R]."""
    norms = torch.linalg.vector_norm(rows, dim=1)
    if not bool(norms.isfinite().all() and norms.amax() > 1e-15):
        norms = torch.linalg.vector_norm(rows / unit_of(rows), dim=1)
    return norms.double().square()


def subsample(rows: Tensor, weights: Tensor, limit: int, seed: int) -> tuple[Tensor, Tensor]:
    """At most ``limit`` of weighted rows, with weights under which sums stay what they are in the mean.

    The chances of rows are those of :func:`amounts`; a row whose chance is one is always there (priority sampling,
    Duffield, Lund and Thorup).

    Args:
        rows: float [R, K].
        weights: float [R], positive.
        limit: rows wanted.
        seed: of the draws.

    Returns:
        int64 indices, ascending, and their weights float32; all rows with their own weights where R <= limit.
    """
    if len(rows) <= limit:
        return torch.arange(len(rows), device=rows.device), weights.float()
    mass = weights.double()
    size = amounts(row_energies(rows), mass, limit, 1.0)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    draw = torch.rand(len(rows), generator=generator, dtype=torch.float64, device="cpu").to(rows.device)
    priority = torch.where(size < 1, size / draw.clamp(min=2.0**-53), torch.inf)
    found, order = priority.topk(limit + 1)
    index = order[:limit].sort().values
    chance = torch.where(size[index] < 1, (size[index] / found[-1]).clamp(max=1.0), 1.0)
    return index, (mass[index] / chance).float()


def output_errors(problem: LayerProblem, update: LayerUpdate, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error and energy of each of the layer's outputs, summed over the problem's rows: float64 [N] both.

    ``sum_i m_i (w x_i - w' x'_i)^2`` and ``sum_i m_i (w x_i + b)^2``, where ``x'`` and ``w'`` are quantized; in the
    latter ``w`` is the weight and its branch.

    Args:
        problem: with one row or more.
        update: integers and scales.
        mass: float [R], how much each row counts.
    """
    units = Units.of(problem)
    problem, update = units.problem(problem), units.update(update)
    w_hat = numerics.dequantize_weight(update.weight, update.weight_scale, problem.split)
    bias = 0.0 if problem.bias is None else problem.bias.double() / units.inputs / units.weights
    whole = None if problem.branch is None else problem.weight + problem.branch / units.weights
    noise = torch.zeros(len(problem.weight), dtype=torch.float64, device=problem.weight.device)
    signal = torch.zeros_like(noise)
    for rows, masses in zip(problem.rows.split(_BLOCK), mass.double().split(_BLOCK), strict=True):
        want = rows @ problem.weight.T
        got = simulated_rows(problem, update, rows) @ w_hat.T
        got = got if update.bias_shift is None else got + update.bias_shift
        noise += masses @ (want - got).double().square()
        output = want if whole is None else rows @ whole.T
        signal += masses @ (output.double() + bias).square()
    size = (units.inputs * units.weights) ** 2
    return noise * size, signal * size


def output_sqnr(problem: LayerProblem, update: LayerUpdate, limit: int = 2048) -> float:
    """Signal to quantization-noise ratio of the layer's output in dB, over all calibration rows.

    ``10 log10(sum_i c_i |W x_i + b|^2 / sum_i c_i |W x_i - W' x'_i|^2)`` where ``x'`` and ``W'`` are the quantized
    input and weight and ``c_i`` is the number of calibration rows that the sampled row i stands for. ``limit`` rows
    of the sample are measured, chosen and weighted by :func:`subsample`, so that no rare row is left out. Infinite
    ratios are told as 300 dB.

    Raises:
        ValueError: when the problem has no rows.
    """
    if not len(problem.rows):
        raise ValueError(f"layer {problem.layer}: without calibration rows its output has no measured SQNR")
    counts = problem.rows.new_ones(len(problem.rows)) if problem.counts is None else problem.counts
    index, weights = subsample(problem.rows, counts, limit, problem.seed)
    noise, signal = output_errors(dataclasses.replace(problem, rows=problem.rows[index]), update, weights)
    found = numerics.decibels(float(signal.sum()), float(noise.sum()))
    return -EXACT if math.isnan(found) else max(-EXACT, min(EXACT, found))


if __name__ != "fxq.passes.methods":
    raise ImportError("import fxq.passes.methods")
