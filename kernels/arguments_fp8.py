"""What the float8 operators take; as :mod:`fxq.kernels.arguments`, whose words these are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxq.kernels.arguments import Operands


class QuantizeFp8(NamedTuple):
    """Arguments of :func:`fxq.kernels.gemm.fp8.quantize_fp8`.

    Attributes:
        x: float32, bfloat16 or float16 [..., K].
        perm: int32 [K], ``x[..., perm]`` is quantized; None keeps the order.
        scale: float32 [G], positive.
        split: number of normal channels, 1..K.
    """

    x: Tensor
    perm: Tensor | None
    scale: Tensor
    split: int


class QuantizeFp8PerToken(NamedTuple):
    """Arguments of :func:`fxq.kernels.gemm.fp8.quantize_fp8_per_token`.

    Attributes:
        x: float32, bfloat16 or float16 [..., K].
        perm: int32 [K], ``x[..., perm]`` is quantized; None keeps the order.
        split: number of normal channels, 1..K.
    """

    x: Tensor
    perm: Tensor | None
    split: int


class DualScaleLinearFp8(NamedTuple):
    """Arguments of :func:`fxq.kernels.gemm.fp8.dual_scale_linear_fp8`.

    Attributes:
        q: float8_e4m3fn [..., K] in ``[normal | outlier]`` order.
        weight: float8_e4m3fn [N, K].
        weight_scale: float32 [G, N], positive.
        input_scale: float32 [G], positive.
        offset: float32 [N], the bias.
        split: number of normal channels, 1..K.
        dtype: of the result: float32, bfloat16 or float16.
    """

    q: Tensor
    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    offset: Tensor
    split: int
    dtype: torch.dtype

    @property
    def operands(self) -> Operands:
        """Of the product; a weight has 8 bits."""
        return Operands(self.q, self.weight, self.weight_scale, self.input_scale, self.offset, self.split, 8)


class DualScaleLinearFp8PerToken(NamedTuple):
    """Arguments of :func:`fxq.kernels.gemm.fp8.dual_scale_linear_fp8_per_token`.

    Attributes:
        q: float8_e4m3fn [..., K] in ``[normal | outlier]`` order.
        input_scale: float32 [..., G], positive, of :func:`fxq.kernels.gemm.fp8.quantize_fp8_per_token`.
        weight: float8_e4m3fn [N, K].
        weight_scale: float32 [G, N], positive.
        offset: float32 [N], the bias.
        split: number of normal channels, 1..K.
        dtype: of the result: float32, bfloat16 or float16.
    """

    q: Tensor
    input_scale: Tensor
    weight: Tensor
    weight_scale: Tensor
    offset: Tensor
    split: int
    dtype: torch.dtype

    @property
    def operands(self) -> Operands:
        """Of the product, with the input scales [..., G]; a weight has 8 bits."""
        return Operands(self.q, self.weight, self.weight_scale, self.input_scale, self.offset, self.split, 8)
