"""GPTQ: round one input channel after the other, each making up for the errors of those before (arXiv 2210.17323)."""

from __future__ import annotations

import dataclasses

import torch

from fxq.core.config import RecipeError
from fxq.passes.methods import LayerProblem
from fxq.passes.methods.quadratic import (
    BLOCK,
    Quadratic,
    QuadraticMethod,
    Solution,
    bounds,
    by_channel,
    cholesky,
)


@dataclasses.dataclass(frozen=True)
class GPTQ(QuadraticMethod):
    """Integers by successive rounding with error feedback, scales as they are.

    In the form of Babai's nearest plane (arXiv 2507.18553), which gives the same integers: with ``G = L L^T`` the error
    is ``|(W' - T) L|^2``, and from the last channel to the first each takes the integer that makes its own component
    least. One Cholesky factor serves; nothing is inverted. ``damping`` is relative to G's mean diagonal. With
    ``act_order`` channels are taken in order of their energy, largest first; channels of both scales are taken alike.
    """

    damping: float = 0.003
    act_order: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise RecipeError(f"GPTQ: damping = {self.damping}, expected 0..1")

    def solving(self, width: int, outputs: int) -> float:
        """A Cholesky factor and one product of the errors with it."""
        return width**3 / 3 + 2.0 * outputs * width**2

    def solve(self, problem: LayerProblem, form: Quadratic, start: Solution) -> Solution:
        """Integers of all channels for the scales of ``start``."""
        width, outputs = len(form.gram), len(form.weight)
        order = form.gram.diagonal().argsort(stable=True) if self.act_order else torch.arange(width).flip(0)
        order = order.to(form.gram.device)
        factor = cholesky(form.gram, self.damping, order)
        found, errors = torch.empty_like(form.target), form.target.new_empty(outputs, width)
        for stop in range(width, 0, -BLOCK):
            begin = max(0, stop - BLOCK)
            channels, block = order[begin:stop], factor[begin:stop, begin:stop].contiguous()
            target, step = by_channel(form.target, channels), start.grid.of_channels(channels)
            low, high = bounds(by_channel(form.weight, channels), step, problem.scheme.weight_bits)
            # What the errors of the channels behind add to each component of the block.
            behind = (errors[:, stop:] @ factor[stop:, begin:stop]).T.contiguous()
            integers, wrong = torch.empty_like(target), torch.empty_like(target)
            for k in reversed(range(stop - begin)):
                wanted = target[k] + behind[k] / block[k, k]
                integers[k] = (wanted / step[k]).round_().clamp_(low[k], high[k])
                wrong[k] = target[k] - integers[k] * step[k]
                behind[:k].addr_(block[k, :k], wrong[k])
            found[:, channels], errors[:, begin:stop] = integers.T, wrong.T
        return dataclasses.replace(start, integers=found)
