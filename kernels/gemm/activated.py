"""An activation and quantization with a scale per token in one pass: what stands between the linears of an FFN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxq.kernels import native
from fxq.kernels.arguments import ActivationQuantizePerToken, QuantizePerToken
from fxq.kernels.gemm.activations import ACTIVATIONS
from fxq.kernels.gemm.per_token import (
    LEAST,
    empty,
    empty_asymmetric,
    quantize_asymmetric_chunks,
    quantize_chunks,
    quantize_per_token,
    quantize_per_token_asymmetric,
)
from fxq.kernels.jit import HAS_TRITON
from fxq.kernels.op import declare
from fxq.kernels.quantize import triton_per_token as per_token_rows


def _supports(a: ActivationQuantizePerToken) -> str:
    if a.activation not in ACTIVATIONS:
        return f"activation = {a.activation!r}: expected one of {', '.join(ACTIVATIONS)}"
    return quantize_per_token.unfit(_tokens(a, a.x))


def _samples() -> Sequence[ActivationQuantizePerToken]:
    names = ("gelu", "gelu_tanh", "none")
    return [
        ActivationQuantizePerToken(a.x, names[i % len(names)], a.perm, a.split, a.bits)
        for i, a in enumerate(quantize_per_token.examples())
    ]


def _tokens(a: ActivationQuantizePerToken, values: Tensor) -> QuantizePerToken:
    return QuantizePerToken(values, a.perm, a.split, a.bits)


def _activated(a: ActivationQuantizePerToken) -> QuantizePerToken:
    return _tokens(a, ACTIVATIONS[a.activation].reference(a.x.float()))


def _is_native(a: ActivationQuantizePerToken) -> bool:
    return a.x.dtype != torch.float16 and native.ready() and native.activation_code(a.activation) >= 0


@declare(
    ActivationQuantizePerToken,
    fake=empty,
    samples=_samples,
    supports=_supports,
    max_error=2**-6,
    results=("q", "scale"),
)
def activation_quantize_per_token(a: ActivationQuantizePerToken) -> tuple[Tensor, Tensor]:
    """``quantize_per_token(activation(x))``, in float32 up to the store.

    What is not finite has the scale NaN. Kernels may differ from the reference by one integer where the value lies
    within their float error of a rounding boundary, and by that error in the scales.

    Returns:
        int8 [..., K] and the scales float32 [..., G], contiguous; G = 2 when ``split < K``, else 1.

    Raises:
        ValueError: on a wrong dtype or shape, or an activation that is not known.
    """
    return quantize_per_token.compute(_activated(a))


@declare(
    ActivationQuantizePerToken,
    fake=empty_asymmetric,
    samples=_samples,
    supports=_supports,
    max_error=2**-6,
    results=("q", "scale"),
)
def activation_quantize_per_token_asymmetric(a: ActivationQuantizePerToken) -> tuple[Tensor, Tensor]:
    """``quantize_per_token_asymmetric(activation(x))``, as :func:`activation_quantize_per_token`.

    Returns:
        int8 [..., K] and float32 [..., 2 G], contiguous: the scales and behind them the zero points.

    Raises:
        ValueError: on a wrong dtype or shape, or an activation that is not known.
    """
    return quantize_per_token_asymmetric.compute(_activated(a))


@activation_quantize_per_token.on("cpu", native.or_else("eager"))
def quantize_cpu(a: ActivationQuantizePerToken) -> tuple[Tensor, Tensor]:
    """Native kernel, else the activation in torch and the quantization in chunks."""
    if _is_native(a):
        return native.quantize_per_token(a, LEAST[False], *empty(a))
    return quantize_chunks(_activated(a))


@activation_quantize_per_token_asymmetric.on("cpu", native.or_else("eager"))
def quantize_asymmetric_cpu(a: ActivationQuantizePerToken) -> tuple[Tensor, Tensor]:
    """As :func:`quantize_cpu`."""
    if _is_native(a):
        return native.quantize_per_token(a, LEAST[True], *empty_asymmetric(a))
    return quantize_asymmetric_chunks(_activated(a))


if HAS_TRITON:

    def _on_cuda(a: ActivationQuantizePerToken, asymmetric: bool) -> tuple[Tensor, Tensor]:
        function = ACTIVATIONS[a.activation].triton
        with torch.cuda.device(a.x.device):
            tokens = _activated(a) if function is None else _tokens(a, a.x)
            return per_token_rows.quantize(tokens, asymmetric=asymmetric, activation=function)

    @activation_quantize_per_token.on("cuda", "triton")
    def quantize_cuda(a: ActivationQuantizePerToken) -> tuple[Tensor, Tensor]:
        """Launch on the device that holds x, after torch where the activation is torch's alone."""
        return _on_cuda(a, asymmetric=False)

    @activation_quantize_per_token_asymmetric.on("cuda", "triton")
    def quantize_asymmetric_cuda(a: ActivationQuantizePerToken) -> tuple[Tensor, Tensor]:
        """As :func:`quantize_cuda`."""
        return _on_cuda(a, asymmetric=True)
