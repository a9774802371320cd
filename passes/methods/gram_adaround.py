"""AdaRound on the quadratic form of all calibration rows (arXiv 2004.10568)."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fxq import numerics
from fxq.passes.methods import LayerProblem
from fxq.passes.methods.adaround import inverse_rectified_sigmoid, rectified_sigmoid
from fxq.passes.methods.quadratic import IteratedMethod, Quadratic, Solution


@dataclasses.dataclass(frozen=True)
class GramAdaRound(IteratedMethod):
    """Rounding up or down of each weight, learned as in :class:`~fxq.passes.methods.adaround.AdaRound`.

    An iteration takes the exact error of all calibration rows, ``tr((W' - T) G (W' - T)^T)``, and its gradient from one
    product with G, where AdaRound draws some rows; nothing is random. The error counts relative to that of the
    integers before, output by output, so that each is rounded as if it were alone. Scales stay as they are.
    """

    iterations: int = 500
    rate: float = 1e-2
    regulariser: float = 0.1
    warmup: float = 0.2

    def solve(self, problem: LayerProblem, form: Quadratic, start: Solution) -> Solution:
        """Round every weight to the side on which its choice ends."""
        low, high = numerics.integer_range(problem.scheme.weight_bits)
        step = start.grid.steps(len(form.gram))  # [N, K]
        scaled = form.weight / step
        floor = scaled.floor()
        # At the start every weight inside of the range is exactly what it was: the choice is its fraction.
        choice = inverse_rectified_sigmoid(scaled - floor).requires_grad_()
        before = form.loss(start.integers * step).clamp_min(torch.finfo(torch.float32).tiny)  # [N]
        optimizer = torch.optim.Adam([choice], lr=self.rate)
        warm = int(self.warmup * self.iterations)
        for i in range(self.iterations):
            h = rectified_sigmoid(choice)
            # Outside of the range the clamp has no gradient: such a weight stays at the end of it.
            loss = (form.loss((floor + h).clamp(low, high) * step) / before).sum()
            if i >= warm:
                exponent = 20 - 18 * (i - warm) / max(1, self.iterations - warm)
                # 1 - |2 h - 1|^e is 0 at h = 0 and 1; as e falls, all h are driven there.
                loss = loss + self._weight(h) * (1 - (2 * h - 1).abs().pow(exponent)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return dataclasses.replace(start, integers=(floor + (choice.detach() >= 0)).clamp(low, high))

    def _weight(self, h: Tensor) -> float:
        """Of the regulariser beside an error of 1 for each output."""
        return self.regulariser / math.sqrt(h.shape[1])
