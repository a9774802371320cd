"""Cyclic coordinate descent on the integers: each weight in turn takes the integer of least output error."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fxq.core.config import RecipeError
from fxq.passes.methods import LayerProblem
from fxq.passes.methods.quadratic import BLOCK, Quadratic, QuadraticMethod, Solution, bounds, steps


@dataclasses.dataclass(frozen=True)
class CoordinateDescent(QuadraticMethod):
    """Exact minimisation over one integer at a time (as QuantEase, arXiv 2309.01885, on the corrected target).

    No step raises the error, so it refines any integers: those of GPTQ, or nearest ones. It ends after ``sweeps`` over
    all input channels, or when a sweep changes nothing.
    """

    sweeps: int = 5

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise RecipeError(f"CoordinateDescent: sweeps = {self.sweeps}, expected at least 1")

    def solving(self, width: int, outputs: int) -> float:
        """A product with the form's matrix at first, and one a sweep."""
        return 2.0 * outputs * width**2 * (1 + self.sweeps)

    def solve(self, problem: LayerProblem, form: Quadratic, start: Solution) -> Solution:
        """Integers that no change of a single one improves, unless the sweeps end before."""
        order = form.gram.diagonal().argsort(descending=True, stable=True)
        gram, target = form.gram[order][:, order], form.target[:, order]
        step, integers = steps(problem, start.scale)[:, order], start.integers[:, order]
        low, high = bounds(form.weight[:, order], step, problem.scheme.weight_bits)
        slope = (integers * step - target) @ gram  # half the derivative by each weight, [N, K]
        active = torch.arange(len(integers), device=integers.device)  # outputs that the last sweep changed
        for _ in range(self.sweeps):
            found = integers[active]
            changes = _sweep(found, slope, step[active], gram, (low[active], high[active]))
            integers[active] = found
            active, slope = active[changes], slope[changes]
            if not len(active):
                break
        result = torch.empty_like(integers)
        result[:, order] = integers
        return dataclasses.replace(start, integers=result)


def _sweep(integers: Tensor, slope: Tensor, step: Tensor, gram: Tensor, limits: tuple[Tensor, Tensor]) -> Tensor:
    """Give every integer [N, K] its best value in turn, in place, and bring ``slope`` [N, K] up to date.

    Returns:
        bool [N], the outputs that changed.
    """
    low, high = limits
    diagonal = gram.diagonal()
    changed = torch.zeros(len(integers), dtype=torch.bool, device=integers.device)
    for begin in range(0, len(gram), BLOCK):
        here = slice(begin, begin + BLOCK)
        before, inside, near = integers[:, here].clone(), slope[:, here].clone(), gram[here, here]
        for k in range(len(near)):
            at = begin + k
            wanted = integers[:, at] - inside[:, k] / (diagonal[at] * step[:, at])
            change = wanted.round_().clamp_(low[:, at], high[:, at]) - integers[:, at]
            integers[:, at] += change
            inside.addr_(change * step[:, at], near[k])
        difference = integers[:, here] - before
        changed |= difference.any(1)
        slope += (difference * step[:, here]) @ gram[here]
    return changed
