"""Activations quantized with a scale per token, measured at run time, and the matrix product that goes with them.

Symmetric: no zero points, so the offset of a layer is its bias. A dual-scale layer has two scales per token, of its
normal and of its outlier channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fxq import numerics
from fxq.kernels import native
from fxq.kernels.gemm import op as gemm
from fxq.kernels.gemm import triton_per_token as per_token_triton
from fxq.kernels.jit import HAS_TRITON
from fxq.kernels.op import Arguments, declare
from fxq.kernels.operands import Operands
from fxq.kernels.quantize import triton_per_token as per_token_rows
from fxq.kernels.quantize.op import CHUNK, FLOATS

Quantized: TypeAlias = Any
"""``tuple[Tensor, Tensor]``: integers and scales. An :class:`~fxq.kernels.op.Op` is typed for one tensor."""


def _unfit_quantize(x: Tensor, perm: Tensor | None, split: int, bits: int) -> str:
    if x.ndim < 1 or x.dtype not in FLOATS:
        return f"x is {x.dtype} {tuple(x.shape)}: expected float32, bfloat16 or float16 [..., K]; cast it first"
    if not 2 <= bits <= 8:
        return f"bits = {bits}: expected 2..8"
    width = x.shape[-1]
    if not 0 < split <= width:
        return f"split = {split}: expected 1..{width}, the number of normal channels of x"
    if perm is not None and (perm.dtype != torch.int32 or perm.shape != (width,)):
        return f"perm is {perm.dtype} {tuple(perm.shape)}: expected int32 ({width},), or None to keep the order"
    return ""


def _groups(width: int, split: int) -> int:
    return 1 if split == width else 2


def _empty(x: Tensor, split: int) -> tuple[Tensor, Tensor]:
    scale = x.new_empty((*x.shape[:-1], _groups(x.shape[-1], split)), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scale


def _fake_quantize(x: Tensor, perm: Tensor | None, split: int, bits: int) -> Quantized:
    return _empty(x, split)


def _quantize_samples() -> Sequence[Arguments]:
    random = torch.Generator().manual_seed(0)
    cases: list[Arguments] = []
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
        cases.append((x, perm, split, bits))
    return cases


@declare(
    "quantize_per_token(Tensor x, Tensor? perm, int split, int bits) -> (Tensor q, Tensor scale)",
    fake=_fake_quantize,
    samples=_quantize_samples,
    supports=_unfit_quantize,
)
def quantize_per_token(x: Tensor, perm: Tensor | None, split: int, bits: int) -> Quantized:
    """Symmetric quantization of activations with one scale per token, or with one per token and channel group.

    Every implementation returns the same integers and scales as :func:`fxq.numerics.quantize_per_token`: what is not
    finite has the scale NaN.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        perm: int32 [K], ``x[..., perm]`` is quantized; None keeps the order.
        split: number of normal channels, 1..K.
        bits: 2..8.

    Returns:
        int8 [..., K] and the scales float32 [..., G], contiguous; G = 2 when ``split < K``, else 1.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    q, scale = numerics.quantize_per_token(x if perm is None else x.index_select(-1, perm), split, bits)
    return q.contiguous(), scale.contiguous()


@quantize_per_token.on("cpu", native.or_else("eager"))
def quantize_chunks(x: Tensor, perm: Tensor | None, split: int, bits: int) -> Quantized:
    """Native kernel, else the reference's float operations in its order, in place on chunks of rows."""
    q, scale = _empty(x, split)
    if x.dtype != torch.float16 and native.ready():
        return native.quantize_per_token(x, perm, split, bits, numerics.LEAST_MAGNITUDE, q, scale)
    width, high = x.shape[-1], numerics.integer_range(bits)[1]
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
        for g, part in enumerate(numerics.group_slices(width, split)):
            flat_scale[here, g] = _round_rows(values[:, part], high)
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


def _unfit_linear(
    q: Tensor,
    input_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    offset: Tensor,
    split: int,
    bits: int,
    dtype: torch.dtype,
) -> str:
    if dtype not in gemm.OUTPUTS:
        return f"dtype = {dtype}: expected float32, bfloat16 or float16"
    groups = weight_scale.shape[0] if weight_scale.ndim else 0
    one_row = weight_scale.new_empty(groups, dtype=torch.float32)
    if reason := gemm.unfit(Operands(q, weight, weight_scale, one_row, offset, split, bits)):
        return reason
    wanted = (*q.shape[:-1], groups)
    if input_scale.dtype != torch.float32 or input_scale.shape != wanted:
        return f"input_scale is {input_scale.dtype} {tuple(input_scale.shape)}: expected float32 {tuple(wanted)}"
    return ""


def _fake_linear(
    q: Tensor,
    input_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    offset: Tensor,
    split: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    return q.new_empty((*q.shape[:-1], offset.shape[0]), dtype=dtype)


def sample_operands(
    shape: tuple[int, ...], outputs: int, split: int, bits: int, random: torch.Generator, panels: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int]:
    """Random arguments of :func:`dual_scale_linear_per_token` but for the dtype, for tests and samples."""
    static = gemm.sample_operands(shape, outputs, split, bits, random, panels)
    scale = torch.rand((*shape[:-1], _groups(shape[-1], split)), generator=random, dtype=torch.float32) * 0.05 + 0.005
    return static.q, scale, static.weight, static.weight_scale, static.offset, split, bits


def _linear_samples() -> Sequence[Arguments]:
    random = torch.Generator().manual_seed(0)
    cases = gemm.SAMPLE_CASES
    return [(*sample_operands(shape, n, split, bits, random), dtype) for shape, n, split, bits, dtype in cases]


@declare(
    "dual_scale_linear_per_token(Tensor q, Tensor input_scale, Tensor weight, Tensor weight_scale, Tensor offset,"
    " int split, int bits, ScalarType dtype) -> Tensor",
    fake=_fake_linear,
    samples=_linear_samples,
    supports=_unfit_linear,
    max_error=2**-8,
)
def dual_scale_linear_per_token(
    q: Tensor,
    input_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    offset: Tensor,
    split: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Linear layer on integers with scales per token, as :func:`fxq.numerics.per_token_matmul`.

    Args:
        q: int8 [..., K] in ``[normal | outlier]`` order.
        input_scale: float32 [..., G], positive, of :func:`quantize_per_token`.
        weight: int8 [N, K] when bits is 5..8, uint8 [N, K / 2] of :func:`fxq.numerics.pack_int4` when it is 2..4, or
            int8 panels of :func:`fxq.kernels.gemm.panels.pack_panels` for any bits.
        weight_scale: float32 [G, N], positive; G = 2 when ``split < K``, else 1.
        offset: float32 [N], the bias.
        split: number of normal channels, 1..K; a multiple of 32, as K, when the weight is packed.
        bits: width of the weights.
        dtype: of the result: float32, bfloat16 or float16.

    Returns:
        ``dtype`` [..., N], contiguous.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    operands = Operands(q, weight, weight_scale, input_scale, offset, split, bits)
    return _in_chunks(gemm.exact_matmul, operands, dtype)


@dual_scale_linear_per_token.on("cpu", gemm.ON_CPU)
def linear_chunks(
    q: Tensor,
    input_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    offset: Tensor,
    split: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Native kernel for panels, else the reference on ``cpu_matmul``; packed weights are unpacked on every call."""
    operands = Operands(q, weight, weight_scale, input_scale, offset, split, bits)
    if weight.ndim == 4 and dtype != torch.float16 and native.ready():
        return native.linear_per_token(operands, q.new_empty((*q.shape[:-1], operands.outputs), dtype=dtype))
    return _in_chunks(gemm.cpu_matmul, operands, dtype)


def _in_chunks(matmul: Callable[[Tensor, Tensor], Tensor], operands: Operands, dtype: torch.dtype) -> Tensor:
    """``numerics.per_token_matmul`` over chunks of rows, the same float operations in the same order."""
    q, width, outputs = operands.q, operands.width, operands.outputs
    rows, scales = q.reshape(-1, width), operands.input_scale.reshape(-1, len(operands.weight_scale))
    w = gemm.plain_weight(operands)
    y = torch.empty(len(rows), outputs, dtype=dtype, device=q.device)
    step = max(1, gemm.CHUNK // max(1, outputs))
    for start in range(0, len(rows), step):
        here, total = slice(start, start + step), operands.offset
        for g, part in enumerate(numerics.group_slices(width, operands.split)):
            product = matmul(rows[here, part], w[:, part]) * operands.weight_scale[g]
            total = product.mul_(scales[here, g, None]).add_(total)
        y[here] = total
    return y.reshape(*q.shape[:-1], outputs)


if HAS_TRITON:

    @quantize_per_token.on("cuda", "triton")
    def quantize_cuda(x: Tensor, perm: Tensor | None, split: int, bits: int) -> Quantized:
        """Launch on the device that holds x."""
        with torch.cuda.device(x.device):
            return per_token_rows.quantize(x, perm, split, bits)

    @dual_scale_linear_per_token.on("cuda", "triton")
    def linear_cuda(
        q: Tensor,
        input_scale: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        offset: Tensor,
        split: int,
        bits: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """Launch on the device that holds q, with the tiles of its architecture."""
        return per_token_triton.linear_tiled(q, input_scale, weight, weight_scale, offset, split, dtype)
