"""SignRound: rounding offsets and clipping learned by the signs of their gradients (arXiv 2309.05516)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fxq import numerics
from fxq.passes.methods import LayerProblem
from fxq.passes.methods.grid import Grid
from fxq.passes.methods.quadratic import IteratedMethod, Quadratic, Solution

_CLIPPING = (0.5, 1.25)  # of the scale at the start


@dataclasses.dataclass(frozen=True)
class SignRound(IteratedMethod):
    """Integers ``round(W / (c s) + V)``: V in -0.5..0.5 for each weight, c for each output and group.

    Every iteration moves each of them by the rate in the direction that lowers the error, straight through the
    rounding;
    the rate falls to zero, and each output keeps the best iteration. The error is the quadratic form of all calibration
    rows, where the published method draws some rows an iteration, and s is the scale chosen before, where it is the
    absolute maximum's. The published rate is one over the iterations.
    """

    iterations: int = 200
    rate: float = 0.005

    def solve(self, problem: LayerProblem, form: Quadratic, start: Solution) -> Solution:
        """The best iteration of each output."""
        low, high = numerics.integer_range(problem.scheme.weight_bits)
        step = start.grid.steps(len(form.gram))  # [N, K]
        scaled = form.weight / step
        offset, clipping = torch.zeros_like(step), torch.ones_like(start.grid.scale)  # [N, K], [G, N]
        best = form.loss(start.integers * step)  # [N]
        integers, scale = start.integers.clone(), start.grid.scale.clone()
        for i in range(self.iterations + 1):
            factor = Grid(clipping, problem.split).steps(len(form.gram))
            rounded = (scaled / factor + offset).round()
            found = rounded.clamp(low, high)
            slope, loss = _slope(form, found * step * factor)
            better = loss < best
            best = torch.where(better, loss, best)
            integers[better], scale[:, better] = found[better], (start.grid.scale * clipping)[:, better]
            if i == self.iterations:
                break
            now = self.rate * (1 - i / self.iterations)
            inside = rounded == found
            # W' = c s round(W / (c s) + V): straight through, its derivative by c is that of the integer's own part
            # less what the weight keeps of it.
            kept = torch.where(inside, found - scaled / factor, found) * step
            offset = (offset - now * torch.sign(slope * inside)).clamp_(-0.5, 0.5)
            by_clipping = torch.stack([(slope * kept)[:, part].sum(1) for part in problem.groups])
            clipping = (clipping - now * torch.sign(by_clipping)).clamp_(*_CLIPPING)
        return dataclasses.replace(start, integers=integers).with_scale(scale)


def _slope(form: Quadratic, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Half the form's derivative by each dequantized weight [N, K], and its value for each output [N]."""
    difference = weight - form.target
    slope = difference @ form.gram
    return slope, (slope * difference).sum(1)
