"""Activations quantized with a scale per token, measured at run time, and the matrix product that goes with them.

Symmetric, or asymmetric with a zero point per token behind its scale, which the product takes off: the offset of a
layer is its bias. A dual-scale layer has two of each per token, of its normal and of its outlier channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxq import numerics
from fxq.kernels import native
from fxq.kernels.arguments import (
    ActivationQuantizePerToken,
    DualScaleLinearPerToken,
    NormQuantizePerToken,
    Operands,
    QuantizePerToken,
)
from fxq.kernels.gemm import op as gemm
from fxq.kernels.gemm import triton_per_token as per_token_triton
from fxq.kernels.jit import HAS_TRITON
from fxq.kernels.op import declare
from fxq.kernels.quantize import triton_per_token as per_token_rows
from fxq.kernels.quantize.op import CHUNK, FLOATS

LEAST = {False: numerics.LEAST_MAGNITUDE, True: numerics.LEAST_HALF_RANGE}
"""What a row spans at least, whether it has a zero point or not; less counts as zero."""


def _unfit_quantize(a: QuantizePerToken) -> str:
    x = a.x
    if x.ndim < 1 or x.dtype not in FLOATS:
        return f"x is {x.dtype} {tuple(x.shape)}: expected float32, bfloat16 or float16 [..., K]; cast it first"
    return unfit_tokens(x.shape[-1], a.perm, a.split, a.bits)


Measured = QuantizePerToken | NormQuantizePerToken | ActivationQuantizePerToken
"""Arguments of what gives integers and the scales it measures."""


def unfit_tokens(width: int, perm: Tensor | None, split: int, bits: int) -> str:
    """Why tokens of ``width`` channels cannot be quantized so, or ""."""
    if not 2 <= bits <= 8:
        return f"bits = {bits}: expected 2..8"
    if not 0 < split <= width:
        return f"split = {split}: expected 1..{width}, the number of normal channels of x"
    if perm is not None and (perm.dtype != torch.int32 or perm.shape != (width,)):
        return f"perm is {perm.dtype} {tuple(perm.shape)}: expected int32 ({width},), or None to keep the order"
    return ""


def _groups(width: int, split: int) -> int:
    return 1 if split == width else 2


def empty(a: Measured, columns: int = 1) -> tuple[Tensor, Tensor]:
    """Unfilled integers int8 [..., K], and float32 [..., ``columns`` * G] of what is measured."""
    shape = (*a.x.shape[:-1], columns * _groups(a.x.shape[-1], a.split))
    return a.x.new_empty(a.x.shape, dtype=torch.int8), a.x.new_empty(shape, dtype=torch.float32)


def empty_asymmetric(a: Measured) -> tuple[Tensor, Tensor]:
    """As :func:`empty`, with zero points."""
    return empty(a, 2)


def _ordered(a: QuantizePerToken) -> Tensor:
    return a.x if a.perm is None else a.x.index_select(-1, a.perm)


def _quantize_samples() -> Sequence[QuantizePerToken]:
    random = torch.Generator().manual_seed(0)
    cases: list[QuantizePerToken] = []
    for shape, split, bits, dtype, gather in (
        ((5, 96), 96, 8, torch.float32, False),
        ((2, 7, 96), 64, 8, torch.bfloat16, True),
        ((33, 130), 97, 4, torch.float16, True),
        ((1, 40), 8, 6, torch.float32, True),
        ((0, 64), 32, 8, torch.bfloat16, False),
        ((48,), 48, 2, torch.float32, False),
    ):
        x = torch.randn(shape, generator=random, dtype=torch.float32).to(dtype)
        if x.ndim > 1:
            x[..., :1, :] = 0
        perm = torch.randperm(shape[-1], generator=random).to(torch.int32) if gather else None
        cases.append(QuantizePerToken(x, perm, split, bits))
    return cases


@declare(QuantizePerToken, fake=empty, samples=_quantize_samples, supports=_unfit_quantize, results=("q", "scale"))
def quantize_per_token(a: QuantizePerToken) -> tuple[Tensor, Tensor]:
    """Symmetric quantization of activations with one scale per token, or with one per token and channel group.

    Every implementation returns the same integers and scales as :func:`fxq.numerics.quantize_per_token`: what is not
    finite has the scale NaN.

    Returns:
        int8 [..., K] and the scales float32 [..., G], contiguous; G = 2 when ``split < K``, else 1.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    q, scale = numerics.quantize_per_token(_ordered(a), a.split, a.bits)
    return q.contiguous(), scale.contiguous()


@declare(
    QuantizePerToken,
    fake=empty_asymmetric,
    samples=_quantize_samples,
    supports=_unfit_quantize,
    results=("q", "scale"),
)
def quantize_per_token_asymmetric(a: QuantizePerToken) -> tuple[Tensor, Tensor]:
    """Quantization of activations with one scale and zero point per token, or with one per token and channel group.

    Every implementation returns the same numbers as :func:`fxq.numerics.quantize_per_token`: what is not finite has the
    scale NaN.

    Returns:
        int8 [..., K] and float32 [..., 2 G], contiguous: the scales and behind them the zero points, whole numbers in
        the range of the integers; G = 2 when ``split < K``, else 1.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    q, scale = numerics.quantize_per_token(_ordered(a), a.split, a.bits, asymmetric=True)
    return q.contiguous(), scale.contiguous()


@quantize_per_token.on("cpu", native.or_else("eager"))
def quantize_chunks(a: QuantizePerToken) -> tuple[Tensor, Tensor]:
    """Native kernel, else the reference's float operations in its order, in place on chunks of rows."""
    return _quantize_on_cpu(a, *empty(a), asymmetric=False)


@quantize_per_token_asymmetric.on("cpu", native.or_else("eager"))
def quantize_asymmetric_chunks(a: QuantizePerToken) -> tuple[Tensor, Tensor]:
    """As :func:`quantize_chunks`."""
    return _quantize_on_cpu(a, *empty_asymmetric(a), asymmetric=True)


def _quantize_on_cpu(a: QuantizePerToken, q: Tensor, scale: Tensor, asymmetric: bool) -> tuple[Tensor, Tensor]:
    x, perm, split, bits = a
    if x.dtype != torch.float16 and native.ready():
        return native.quantize_per_token(a, LEAST[asymmetric], q, scale)
    width, groups = x.shape[-1], numerics.group_slices(x.shape[-1], split)
    rows = x.reshape(-1, width)
    flat_q, flat_scale = q.view(-1, width), scale.view(-1, scale.shape[-1])
    step = max(1, min(len(rows), CHUNK // width))
    buffer = torch.empty(step, width, dtype=torch.float32, device=x.device)
    gathered = buffer if perm is None else torch.empty_like(buffer)
    for start in range(0, len(rows), step):
        here = slice(start, min(start + step, len(rows)))
        values = gathered[: here.stop - start]
        if perm is None:
            values.copy_(rows[here])
        else:
            torch.index_select(buffer[: len(values)].copy_(rows[here]), 1, perm, out=values)
        for g, part in enumerate(groups):
            if asymmetric:
                flat_scale[here, g], flat_scale[here, len(groups) + g] = _round_ranges(values[:, part], bits)
            else:
                flat_scale[here, g] = _round_rows(values[:, part], numerics.integer_range(bits)[1])
        flat_q[here] = values
    return q, scale


def _round_rows(values: Tensor, high: int) -> Tensor:
    """Replace float32 rows by their integers; returns the scale of each."""
    top = torch.maximum(values.amax(1), values.amin(1).neg_())  # aminmax takes forty times as long
    scale = numerics.token_scale(top, high)
    values.mul_(scale.reciprocal().unsqueeze(1)).clamp_(-high, high).round_()
    if bool(scale.isnan().any()):
        values[scale.isnan()] = 0
    return scale


def _round_ranges(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Replace float32 rows by their integers; returns the scale and the zero point of each."""
    low, high = numerics.integer_range(bits)
    scale, zero = numerics.token_range(values.amin(1), values.amax(1), bits)
    column = zero.unsqueeze(1)
    values.mul_(scale.reciprocal().unsqueeze(1)).clamp_(low - column, high - column).round_().add_(column)
    if bool(scale.isnan().any()):
        values[scale.isnan()] = 0
    return scale, zero


def _unfit_linear(a: DualScaleLinearPerToken) -> str:
    if a.dtype not in gemm.OUTPUTS:
        return f"dtype = {a.dtype}: expected float32, bfloat16 or float16"
    return unfit(a.operands)


def unfit(a: Operands) -> str:
    """Why the operands, with input scales [..., G or 2 G], do not fit each other, or ""."""
    groups = a.weight_scale.shape[0] if a.weight_scale.ndim else 0
    one_row = a.weight_scale.new_empty(groups, dtype=torch.float32)
    if reason := gemm.unfit(a._replace(input_scale=one_row)):
        return reason
    wanted = (*a.q.shape[:-1], groups)
    zeros = a.input_scale.shape == (*a.q.shape[:-1], 2 * groups)
    if a.input_scale.dtype != torch.float32 or not (zeros or a.input_scale.shape == wanted):
        return f"input_scale is {a.input_scale.dtype} {tuple(a.input_scale.shape)}: expected float32 {tuple(wanted)}"
    width, most = a.q.shape[-1], numerics.MAX_WIDTH_ASYMMETRIC
    if zeros and width > most:
        return f"q has {width} channels: with zero points their sum can overflow int32; at most {most} cannot"
    return ""


def _fake_linear(a: DualScaleLinearPerToken) -> Tensor:
    return a.operands.empty(a.dtype)


def sample_arguments(
    shape: tuple[int, ...],
    outputs: int,
    split: int,
    bits: int,
    dtype: torch.dtype,
    random: torch.Generator,
    panels: bool = False,
    asymmetric: bool = False,
) -> DualScaleLinearPerToken:
    """Random arguments of :func:`dual_scale_linear_per_token`, for tests and samples."""
    q, weight, weight_scale, _, offset, *_ = gemm.sample_operands(shape, outputs, split, bits, random, panels)
    scale = torch.rand((*shape[:-1], _groups(shape[-1], split)), generator=random, dtype=torch.float32) * 0.05 + 0.005
    if asymmetric:
        scale = torch.cat((scale, torch.randint(-128, 128, scale.shape, generator=random).float()), dim=-1)
    return DualScaleLinearPerToken(q, scale, weight, weight_scale, offset, split, bits, dtype)


def _linear_samples() -> Sequence[DualScaleLinearPerToken]:
    random = torch.Generator().manual_seed(0)
    forms = [(case, asymmetric) for asymmetric in (False, True) for case in gemm.SAMPLE_CASES]
    return [sample_arguments(*case, random, asymmetric=asymmetric) for case, asymmetric in forms]


@declare(DualScaleLinearPerToken, fake=_fake_linear, samples=_linear_samples, supports=_unfit_linear, max_error=2**-8)
def dual_scale_linear_per_token(a: DualScaleLinearPerToken) -> Tensor:
    """Linear layer on integers with scales per token, as :func:`fxq.numerics.per_token_matmul`.

    Zero points are taken off the integer sums, which is exact.

    Returns:
        ``dtype`` [..., N], contiguous.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    return in_chunks(gemm.exact_matmul, a.operands, a.dtype)


@dual_scale_linear_per_token.on("cpu", gemm.ON_CPU)
def linear_chunks(a: DualScaleLinearPerToken) -> Tensor:
    """Native kernel for panels, else the reference on ``cpu_matmul``; packed weights are unpacked on every call."""
    if a.weight.ndim == 4 and a.dtype != torch.float16 and native.ready():
        return native.linear_per_token(a.operands, _fake_linear(a))
    return in_chunks(cpu_matmul(a.operands), a.operands, a.dtype)


def cpu_matmul(operands: Operands) -> Callable[[Tensor, Tensor], Tensor]:
    """What multiplies integers on a CPU; zero points need int32."""
    return gemm.cpu_integers if operands.asymmetric else gemm.cpu_matmul


def in_chunks(
    matmul: Callable[[Tensor, Tensor], Tensor],
    operands: Operands,
    dtype: torch.dtype,
    finish: gemm.Finish | None = None,
) -> Tensor:
    """``numerics.per_token_matmul`` over chunks of rows, the same float operations in the same order.

    Zero points need the int32 of a ``matmul``. ``finish`` as in :func:`fxq.kernels.gemm.op.in_chunks`.
    """
    q, width, outputs = operands.q, operands.width, operands.outputs
    rows, scales = q.reshape(-1, width), operands.input_scale.reshape(-1, operands.input_scale.shape[-1])
    w, groups = gemm.plain_weight(operands), len(operands.weight_scale)
    parts = numerics.group_slices(width, operands.split)
    sums = [w[:, part].sum(1, dtype=torch.int32) for part in parts if operands.asymmetric]
    y = torch.empty(len(rows), outputs, dtype=dtype, device=q.device)
    step = max(1, gemm.CHUNK // max(1, outputs))
    for start in range(0, len(rows), step):
        here, total = slice(start, min(start + step, len(rows))), operands.offset
        for g, part in enumerate(parts):
            integers = matmul(rows[here, part], w[:, part])
            if sums:
                integers.addr_(scales[here, groups + g].to(torch.int32), sums[g], alpha=-1)
            product = integers * operands.weight_scale[g]
            total = product.mul_(scales[here, g, None]).add_(total)
        y[here] = total if finish is None else finish(total, here)
    return y.reshape(*q.shape[:-1], outputs)


if HAS_TRITON:

    @quantize_per_token.on("cuda", "triton")
    def quantize_cuda(a: QuantizePerToken) -> tuple[Tensor, Tensor]:
        """Launch on the device that holds x."""
        with torch.cuda.device(a.x.device):
            return per_token_rows.quantize(a)

    @quantize_per_token_asymmetric.on("cuda", "triton")
    def quantize_asymmetric_cuda(a: QuantizePerToken) -> tuple[Tensor, Tensor]:
        """As :func:`quantize_cuda`."""
        with torch.cuda.device(a.x.device):
            return per_token_rows.quantize(a, asymmetric=True)

    @dual_scale_linear_per_token.on("cuda", "triton")
    def linear_cuda(a: DualScaleLinearPerToken) -> Tensor:
        """Launch on the device that holds q, with the tiles of its architecture."""
        return per_token_triton.linear_tiled(a.operands, _fake_linear(a))
