"""AdaRound with a learned activation scale: round weights to fit the layer's output (arXiv 2004.10568, 2605.21072)."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fxq import numerics
from fxq.core.method import LayerUpdate
from fxq.passes.methods import LayerProblem, Units, simulated_input, subsample
from fxq.passes.methods.units import TINY

_ZETA, _GAMMA = 1.1, -0.1
_JUDGED = 4096  # rows that say whether what was learned is better


def rectified_sigmoid(a: Tensor) -> Tensor:
    """``clip(1.2 sigmoid(a) - 0.1, 0, 1)``: the soft choice between rounding down (0) and up (1)."""
    return (torch.sigmoid(a) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The ``a`` for which :func:`rectified_sigmoid` gives ``h``, 0 <= h <= 1."""
    p = (h - _GAMMA) / (_ZETA - _GAMMA)
    return torch.log(p / (1 - p))


class _RoundSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0]


def fake_quantize_input(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize ``x``; differentiable in ``scale`` [] by a straight-through estimator."""
    low, high = numerics.integer_range(bits)
    rounded: Tensor = _RoundSTE.apply(x / scale)  # type: ignore[no-untyped-call]
    return (rounded.clamp(low - zero_point, high - zero_point)) * scale


def _learned_input(problem: LayerProblem, update: LayerUpdate, x: Tensor, gain: Tensor) -> Tensor:
    """Rows ``x`` quantized and dequantized with scales ``exp(gain)`` [G] times those of the update, or per token."""
    if update.input_scale is None or update.input_zero_point is None:
        return simulated_input(problem, update, x)
    scales, zeros = update.input_scale * torch.exp(gain), update.input_zero_point
    parts = [
        fake_quantize_input(x[:, part], scales[g], zeros[g], problem.scheme.input_bits)
        for g, part in enumerate(problem.groups)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@dataclasses.dataclass(frozen=True)
class AdaRound:
    """Layer reconstruction ``min E[w_i ||X W - Q(X) Q(W)||^2]`` over rounding and activation scales.

    Published settings: 2000 iterations, rounding rate 2e-3, activation rate 4e-5 with cosine decay, regulariser 0.01
    with its exponent going 20 -> 2 after 20 % of the iterations. Two are expressed without units here, so that they fit
    layers of any size: the regulariser is relative to the layer's round-to-nearest error, and the activation rate is
    relative to the scale. ``rows`` calibration rows make one step. Where input scales are measured per token, rounding
    alone is learned.
    """

    iterations: int = 2000
    rows: int = 1024
    rounding_rate: float = 1e-2
    scale_rate: float = 5e-4
    regulariser: float = 0.01
    warmup: float = 0.2

    def apply(self, problem: LayerProblem, update: LayerUpdate | None) -> LayerUpdate:
        """Refine ``update``; layers without rows or whose scheme says ``reconstruct=False`` pass unchanged.

        Raises:
            ValueError: when no method has chosen scales before.
        """
        if update is None:
            raise ValueError("AdaRound refines scales chosen before it: put RangeSearch or MinMax first in the recipe")
        if not problem.scheme.reconstruct or not len(problem.rows):
            return update
        units = Units.of(problem)
        problem, start = units.problem(problem), units.update(update)
        learned = self._learn(problem, start)
        return update if learned is start else _in_units(learned, update, units)

    def _learn(self, problem: LayerProblem, update: LayerUpdate) -> LayerUpdate:
        """:meth:`apply` on a problem whose squares stay inside of float32; ``update`` itself where it is not better."""
        bits = problem.scheme.weight_bits
        low, high = numerics.integer_range(bits)
        generator = torch.Generator(device="cpu").manual_seed(problem.seed)
        # Weights are [N, K], rows of the input [R, K]; step is the value of one integer of each weight, [N, K].
        step = torch.cat(
            [s[:, None].expand(-1, p.stop - p.start) for s, p in zip(update.weight_scale, problem.groups, strict=True)],
            1,
        )
        scaled = problem.weight / step
        floor = scaled.floor()
        # At the start every weight inside of the range is exactly what it was: h is its fraction.
        a = inverse_rectified_sigmoid(scaled - floor).requires_grad_()
        # Logarithms: no step makes a scale negative, and one rate fits scales of any size.
        gain = torch.zeros(len(problem.groups), dtype=torch.float32, device=a.device, requires_grad=True)
        target = problem.rows @ problem.weight.T  # [R, N]
        judged = subsample(problem.rows, problem.row_weights, _JUDGED, problem.seed)
        reference = _error(problem, update, target, *judged)
        if reference == 0:
            return update
        optimizer = torch.optim.Adam(
            [{"params": [a], "lr": self.rounding_rate}, {"params": [gain], "lr": self.scale_rate}]
        )
        warm = int(self.warmup * self.iterations)
        for i in range(self.iterations):
            optimizer.param_groups[1]["lr"] = self.scale_rate * 0.5 * (1 + math.cos(math.pi * i / self.iterations))
            index = torch.randint(len(problem.rows), (self.rows,), generator=generator, device="cpu")
            x_hat = _learned_input(problem, update, problem.rows[index], gain)
            h = rectified_sigmoid(a)
            # Outside of the range the clamp has no gradient: such a weight stays at the end of it.
            w_hat = (floor + h).clamp(low, high) * step
            error = (x_hat @ w_hat.T - target[index]).square().sum(1)  # [rows]
            # Relative to the error of what was there before, so that the regulariser weighs alike in every layer.
            loss = (error * problem.row_weights[index]).mean() / reference
            if i >= warm:
                progress = (i - warm) / max(1, self.iterations - warm)
                # 1 - |2 h - 1|^e is 0 at h = 0 and 1. A large e is flat between; as it falls, all h are driven there.
                exponent = 20 + (2 - 20) * progress
                loss = loss + self.regulariser * (1 - (2 * h - 1).abs().pow(exponent)).sum() / math.sqrt(h.numel())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        # h >= 1/2 where a >= 0.
        rounded = (floor + (a.detach() >= 0)).clamp(low, high).to(torch.int8)
        learned = dataclasses.replace(update, weight=rounded)
        if update.input_scale is not None:
            scales = (update.input_scale * torch.exp(gain.detach())).float()
            learned = dataclasses.replace(learned, input_scale=scales)
        return learned if _error(problem, learned, target, *judged) < reference else update


def _in_units(learned: LayerUpdate, update: LayerUpdate, units: Units) -> LayerUpdate:
    """What was learned in the model's units, with the weight scales that were not learned as they are in ``update``."""
    if (scales := units.update(learned, back=True).input_scale) is not None:
        scales = scales.clamp(min=TINY)
    return dataclasses.replace(update, weight=learned.weight, input_scale=scales)


def _error(problem: LayerProblem, update: LayerUpdate, target: Tensor, index: Tensor, weights: Tensor) -> float:
    """Weighted squared error of the layer's output with integers, per weighted row."""
    x_hat = simulated_input(problem, update, problem.rows[index])
    w_hat = numerics.dequantize_weight(update.weight, update.weight_scale, problem.split)
    error = (x_hat @ w_hat.T - target[index]).square().sum(1)
    return float((error * weights).sum() / weights.sum())
