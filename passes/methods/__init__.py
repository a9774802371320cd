"""Methods choose the integers and scales of one linear. A method is one file: pure math, then a dataclass."""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fxq import numerics
from fxq.config import Scheme
from fxq.ir import LayerUpdate


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerProblem:
    """One linear as methods see it, on the device of its weight; input channels in ``[normal | outlier]`` order.

    ``weight`` float32 [N, K], ``low``/``high`` float32 [K] exact input extremes, ``rows`` float32 [R, K] sampled
    inputs, ``row_weights`` float32 [R] loss weights, ``split`` normal channels, ``seed`` of random choices. Without
    calibration data, which per-token schemes do not need, R is 0 and the extremes are zeros.
    """

    layer: str
    weight: Tensor
    low: Tensor
    high: Tensor
    rows: Tensor
    row_weights: Tensor
    scheme: Scheme
    split: int
    seed: int

    @property
    def groups(self) -> tuple[slice, ...]:
        """Channel slices, normal first."""
        return numerics.group_slices(self.weight.shape[1], self.split)


@runtime_checkable
class Method(Protocol):
    """Turns a problem and the update of the method before it into a better update."""

    def apply(self, problem: LayerProblem, update: LayerUpdate | None) -> LayerUpdate:
        """Choose integers and scales; ``update`` is None for the first method of a recipe."""
        ...


def simulated_input(problem: LayerProblem, update: LayerUpdate, x: Tensor) -> Tensor:
    """float32 [R, K]: rows ``x`` quantized as the scheme says, and dequantized."""
    split, bits = problem.split, problem.scheme.input_bits
    if update.input_scale is None or update.input_zero_point is None:
        return numerics.dequantize_per_token(*numerics.quantize_per_token(x, split, bits), split)
    q = numerics.quantize_input(x, update.input_scale, update.input_zero_point, split, bits)
    return numerics.dequantize_input(q, update.input_scale, update.input_zero_point, split)


def output_sqnr(problem: LayerProblem, update: LayerUpdate, limit: int = 2048) -> float:
    """Signal to quantization-noise ratio of the layer's output in dB on up to ``limit`` calibration rows.

    Raises:
        ValueError: when the problem has no rows.
    """
    if not len(problem.rows):
        raise ValueError(f"layer {problem.layer}: without calibration rows its output has no measured SQNR")
    x = problem.rows[:limit]
    w_hat = numerics.dequantize_weight(update.weight, update.weight_scale, problem.split)
    want = x @ problem.weight.T
    noise = (want - simulated_input(problem, update, x) @ w_hat.T).square().sum().clamp_min(1e-30)
    return float(10 * torch.log10(want.square().sum().clamp_min(1e-30) / noise))


if __name__ != "fxq.passes.methods":
    raise ImportError("import fxq.passes.methods")
