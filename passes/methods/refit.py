"""Weight scales of least output error for integers that are chosen."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fxq.core.config import RecipeError
from fxq.passes.methods import LayerProblem
from fxq.passes.methods.descent import CoordinateDescent
from fxq.passes.methods.moments import strips
from fxq.passes.methods.quadratic import Quadratic, QuadraticMethod, Solution

_RANGE = 3.0  # a scale that would change by more is one of integers that say little: it stays


@dataclasses.dataclass(frozen=True)
class RefitScales(QuadraticMethod):
    """Least-squares scales of each output and group, then integers for them by coordinate descent, ``rounds`` times.

    For fixed integers the error is quadratic in the scales of an output: one number, or two equations where outliers
    have their own.
    """

    rounds: int = 2
    sweeps: int = 3

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.sweeps < 1:
            raise RecipeError(f"RefitScales: rounds = {self.rounds}, sweeps = {self.sweeps}: expected at least 1")

    def solving(self, width: int, outputs: int) -> float:
        """Two products for the scales and a descent, each round."""
        return self.rounds * (4.0 * outputs * width**2 + CoordinateDescent(self.sweeps).solving(width, outputs))

    def solve(self, problem: LayerProblem, form: Quadratic, start: Solution) -> Solution:
        """Scales and integers in turn."""
        found = start
        for _ in range(self.rounds):
            found = found.with_scale(fitted_scales(problem, form, found))
            found = CoordinateDescent(self.sweeps).solve(problem, form, found)
        return found


def fitted_scales(problem: LayerProblem, form: Quadratic, solution: Solution) -> Tensor:
    """Weight scales [G, N] of least error for the solution's integers."""
    return torch.cat([_fitted(problem, form, solution, at) for at in strips(len(form.weight))], 1)


def _fitted(problem: LayerProblem, form: Quadratic, solution: Solution, outputs: slice) -> Tensor:
    """:func:`fitted_scales` of some outputs."""
    integers = solution.grid.multiplied(solution.integers[outputs], outputs)
    known = solution.grid.scale[:, outputs]
    parts = []
    for part in problem.groups:
        alone = torch.zeros_like(integers)
        alone[:, part] = integers[:, part]
        parts.append(alone)
    products = [alone @ form.gram for alone in parts]
    matrix = torch.stack([torch.stack([(a * b).sum(1) for b in parts], 1) for a in products], 1).double()  # [N, G, G]
    wanted = torch.stack([(a * form.target[outputs]).sum(1) for a in products], 1).double()  # [N, G]
    size = matrix.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float64).tiny)
    matrix = matrix + 1e-9 * size[:, None, None] * torch.eye(len(parts), dtype=torch.float64, device=matrix.device)
    scale = torch.linalg.solve(matrix, wanted[:, :, None])[:, :, 0].T.float()
    ratio = scale / known
    return torch.where(((ratio > 1 / _RANGE) & (ratio < _RANGE)).all(0), scale, known).contiguous()
