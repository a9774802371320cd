"""LayerNorm, modulation and quantization with a scale per token in one pass: ``norm_quantize`` without calibration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxq.kernels import native
from fxq.kernels.arguments import NormQuantizePerToken, QuantizePerToken
from fxq.kernels.gemm.per_token import (
    LEAST,
    empty,
    empty_asymmetric,
    quantize_asymmetric_chunks,
    quantize_chunks,
    quantize_per_token,
    quantize_per_token_asymmetric,
    unfit_tokens,
)
from fxq.kernels.jit import HAS_TRITON
from fxq.kernels.norm import triton_per_token
from fxq.kernels.norm.op import modulated_norm, modulated_norm_in_place, norm_samples, unfit_norm
from fxq.kernels.op import declare


def _supports(a: NormQuantizePerToken) -> str:
    return unfit_norm(a) or unfit_tokens(a.x.shape[-1], a.perm, a.split, a.bits)


def _samples() -> Sequence[NormQuantizePerToken]:
    quantizations = [(a, a.quantization) for a in norm_samples()]
    return [
        NormQuantizePerToken(*a[:6], quantized.perm, quantized.split, quantized.bits) for a, quantized in quantizations
    ]


def _normed(a: NormQuantizePerToken, values: Tensor) -> QuantizePerToken:
    return QuantizePerToken(values, a.perm, a.split, a.bits)


@declare(
    NormQuantizePerToken, fake=empty, samples=_samples, supports=_supports, max_error=2**-6, results=("q", "scale")
)
def norm_quantize_per_token(a: NormQuantizePerToken) -> tuple[Tensor, Tensor]:
    """``quantize_per_token(layer_norm(x) * (1 + gain) + shift)``, in float32 up to the store.

    What is not finite, or has a variance that overflows, has the scale NaN. Kernels may differ from the reference by
    one integer where the value lies within their float error of a rounding boundary, and by that error in the scales.

    Returns:
        int8 [B, S, K] and the scales float32 [B, S, G], contiguous; G = 2 when ``split < K``, else 1.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    return quantize_per_token.compute(_normed(a, modulated_norm(a)))


@declare(
    NormQuantizePerToken,
    fake=empty_asymmetric,
    samples=_samples,
    supports=_supports,
    max_error=2**-6,
    results=("q", "scale"),
)
def norm_quantize_per_token_asymmetric(a: NormQuantizePerToken) -> tuple[Tensor, Tensor]:
    """``quantize_per_token_asymmetric(layer_norm(x) * (1 + gain) + shift)``, as :func:`norm_quantize_per_token`.

    Returns:
        int8 [B, S, K] and float32 [B, S, 2 G], contiguous: the scales and behind them the zero points.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    return quantize_per_token_asymmetric.compute(_normed(a, modulated_norm(a)))


@norm_quantize_per_token.on("cpu", native.or_else("eager"))
def norm_quantize_cpu(a: NormQuantizePerToken) -> tuple[Tensor, Tensor]:
    """Native kernel, else the norm in eager and the quantization in chunks."""
    if a.x.dtype != torch.float16 and native.ready():
        return native.quantize_per_token(a, LEAST[False], *empty(a))
    return quantize_chunks(_normed(a, modulated_norm_in_place(a)))


@norm_quantize_per_token_asymmetric.on("cpu", native.or_else("eager"))
def norm_quantize_asymmetric_cpu(a: NormQuantizePerToken) -> tuple[Tensor, Tensor]:
    """As :func:`norm_quantize_cpu`."""
    if a.x.dtype != torch.float16 and native.ready():
        return native.quantize_per_token(a, LEAST[True], *empty_asymmetric(a))
    return quantize_asymmetric_chunks(_normed(a, modulated_norm_in_place(a)))


if HAS_TRITON:

    @norm_quantize_per_token.on("cuda", "triton")
    def norm_quantize_cuda(a: NormQuantizePerToken) -> tuple[Tensor, Tensor]:
        """Launch on the device that holds x."""
        with torch.cuda.device(a.x.device):
            return triton_per_token.launch(a, empty(a))

    @norm_quantize_per_token_asymmetric.on("cuda", "triton")
    def norm_quantize_asymmetric_cuda(a: NormQuantizePerToken) -> tuple[Tensor, Tensor]:
        """As :func:`norm_quantize_cuda`."""
        with torch.cuda.device(a.x.device):
            return triton_per_token.launch(a, empty_asymmetric(a), asymmetric=True)
