"""Cyclic coordinate descent on the integers: each weight in turn takes the integer of least output error."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fxq.core.config import RecipeError
from fxq.passes.methods import LayerProblem
from fxq.passes.methods.grid import Grid
from fxq.passes.methods.moments import strips
from fxq.passes.methods.quadratic import (
    BLOCK,
    Quadratic,
    QuadraticMethod,
    Solution,
    bounds,
    by_channel,
    reordered,
)

_FEWEST = 16  # rows of a product of matrices; fewer are summed in another order
_MANY = 4096  # outputs of which those that change are worth looking for
_FEW = 0.75  # of the outputs: to pick them out costs less than it saves


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
        gram, slope = reordered(form.gram, order), torch.empty_like(form.target)
        for at in strips(len(slope)):  # half the derivative by each weight, [N, K]
            wrong = start.weight(at).sub_(form.target[at])
            slope[at] = wrong[:, order] @ gram
        state = _State.of(problem, form, start, order)
        active = torch.arange(len(slope), device=slope.device)  # outputs that the last sweep changed
        for sweep in range(self.sweeps):
            part = state if len(active) == state.integers.shape[1] else state.of_outputs(active)
            changes = _sweep(part, slope, gram, last=sweep == self.sweeps - 1)
            if part is not state:
                state.integers[:, active] = part.integers
            if not bool(changes.any()):
                break
            if not bool(changes.all()):
                active, slope = active[changes], slope[changes]
        del gram, slope
        result = torch.empty_like(start.integers)
        for at in strips(len(order)):
            result[:, order[at]] = state.integers[at].T.float()
        return dataclasses.replace(start, integers=result)


@dataclasses.dataclass(frozen=True)
class _State:
    """Integers and their limits by channels in the ``order`` int64 [K] of the descent, int8 [K, N], and their grid.

    A channel's values lie side by side.
    """

    integers: Tensor
    low: Tensor
    high: Tensor
    grid: Grid
    order: Tensor

    @classmethod
    def of(cls, problem: LayerProblem, form: Quadratic, start: Solution, order: Tensor) -> _State:
        shape = len(order), len(start.integers)
        integers, low, high = (torch.empty(shape, dtype=torch.int8, device=order.device) for _ in range(3))
        for at in strips(len(order)):
            channels = order[at]
            integers[at] = by_channel(start.integers, channels)
            step = start.grid.of_channels(channels)
            low[at], high[at] = bounds(by_channel(form.weight, channels), step, problem.scheme.weight_bits)
        return cls(integers, low, high, start.grid, order)

    def of_outputs(self, index: Tensor) -> _State:
        """A copy of the part of some outputs."""
        integers, low, high = (t[:, index] for t in (self.integers, self.low, self.high))
        return _State(integers, low, high, self.grid.of_outputs(index), self.order)


def _sweep(state: _State, slope: Tensor, gram: Tensor, *, last: bool) -> Tensor:
    """Give every integer its best value in turn, in place, and bring ``slope`` [N, K] up to date.

    Args:
        state: of N outputs.
        slope: float32 [N, K], half the derivative by each weight.
        gram: float32 [K, K].
        last: whether no sweep follows, and slopes of channels that are through do not matter.

    Returns:
        bool [N], the outputs that changed.
    """
    diagonal = gram.diagonal()
    changed = torch.zeros(len(slope), dtype=torch.bool, device=slope.device)
    for begin in range(0, len(gram), BLOCK):
        stop = min(len(gram), begin + BLOCK)
        here = slice(begin, stop)
        before, low, high = (t[here].float() for t in (state.integers, state.low, state.high))
        step, integers = state.grid.of_channels(state.order[here]), before.clone()
        inside, near = slope[:, here].T.contiguous(), gram[here, here]
        curvature = diagonal[here, None] * step
        for k in range(stop - begin):
            wanted = integers[k] - inside[k] / curvature[k]
            change = wanted.round_().clamp_(low[k], high[k]) - integers[k]
            integers[k] += change
            _add_outer(inside[k + 1 :], near[k, k + 1 :], change * step[k])
        difference = integers - before
        state.integers[here] = integers
        moving = difference.any(0)
        changed |= moving
        _move(slope, difference * step, moving, gram[here], 0 if not last else stop)
    return changed


def _add_outer(values: Tensor, factors: Tensor, moved: Tensor) -> None:
    """Add ``factors`` [C] times ``moved`` [N] to values [C, N], in place."""
    if len(moved) >= _MANY and moved.device.type == "cpu":
        index = moved.nonzero().flatten()
        if 8 * len(index) < len(moved):
            part = values.index_select(1, index)
            values.index_copy_(1, index, part.addr_(factors, moved[index]))
            return
    values.addr_(factors, moved)


def _move(slope: Tensor, difference: Tensor, moving: Tensor, gram: Tensor, first: int) -> None:
    """Add to ``slope`` [N, K] what ``difference`` [BLOCK, N] of some channels' weights makes of it, from ``first`` on.

    Args:
        slope: float32 [N, K], changed in place.
        difference: float32 [BLOCK, N].
        moving: bool [N], the outputs with any; of the others nothing is computed where that saves something.
        gram: float32 [BLOCK, K], the channels' rows.
        first: channel.
    """
    some = int(moving.sum())
    if not some:
        return
    if _FEWEST <= some < _FEW * len(slope):
        index = moving.nonzero().flatten()
        moved = difference[:, index].T.contiguous()
        for at in strips(slope.shape[1]):
            if at.stop > first:
                slope[:, at].index_add_(0, index, moved @ gram[:, at])
        return
    moved = difference.T.contiguous()
    for at in strips(slope.shape[1]):
        if at.stop > first:
            slope[:, at] += moved @ gram[:, at]
