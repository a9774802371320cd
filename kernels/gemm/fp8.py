"""The float8 twins of quantize_act and dual_scale_linear: e4m3 activations and weights, for GPUs from sm_89 on.

Blackwell's data-centre GPUs have no fast int8 path in Triton, and Hopper overlaps float8 products with their loads but
not int8 ones. Values are symmetric: a float format gains nothing from a zero point.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxq import numerics
from fxq.kernels.gemm import triton_fp8 as fp8_triton
from fxq.kernels.gemm.op import OUTPUTS
from fxq.kernels.jit import HAS_TRITON
from fxq.kernels.op import Arguments, declare
from fxq.kernels.quantize.op import FLOATS

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""Largest finite float8_e4m3fn."""


def _unfit_scales(width: int, split: int, scales: Sequence[tuple[str, Tensor, tuple[int, ...]]]) -> str:
    """Why split or one of (name, scale, shape after the groups) is not well formed, or ""."""
    if not 0 < split <= width:
        return f"split = {split}: expected 1..{width}, the number of normal channels"
    groups = 1 if split == width else 2
    for name, scale, rest in scales:
        if scale.dtype != torch.float32 or scale.shape != (groups, *rest):
            form = f"float32 {(groups, *rest)} for split = {split}"
            return f"{name} is {scale.dtype} {tuple(scale.shape)}: expected {form}"
    return ""


def _quantize_supports(x: Tensor, perm: Tensor | None, scale: Tensor, split: int) -> str:
    if x.ndim < 1 or x.dtype not in FLOATS:
        return f"x is {x.dtype} {tuple(x.shape)}: expected float32, bfloat16 or float16 [..., K]; cast it first"
    width = x.shape[-1]
    if perm is not None and (perm.dtype != torch.int32 or perm.shape != (width,)):
        return f"perm is {perm.dtype} {tuple(perm.shape)}: expected int32 ({width},), or None to keep the order"
    return _unfit_scales(width, split, [("scale", scale, ())])


def _quantize_fake(x: Tensor, perm: Tensor | None, scale: Tensor, split: int) -> Tensor:
    return x.new_empty(x.shape, dtype=FP8)


def _quantize_samples() -> Sequence[Arguments]:
    random = torch.Generator().manual_seed(5)
    cases: list[Arguments] = []
    for shape, split, dtype, gather in (
        ((5, 96), 96, torch.float32, False),
        ((2, 7, 130), 64, torch.bfloat16, True),
        ((0, 64), 32, torch.float16, False),
    ):
        x = torch.randn(shape, generator=random, dtype=torch.float32).to(dtype)
        perm = torch.randperm(shape[-1], generator=random).to(torch.int32) if gather else None
        scale = torch.rand(1 if split == shape[-1] else 2, generator=random, dtype=torch.float32) * 0.01 + 0.002
        cases.append((x, perm, scale, split))
    return cases


@declare(
    "quantize_fp8(Tensor x, Tensor? perm, Tensor scale, int split) -> Tensor",
    fake=_quantize_fake,
    samples=_quantize_samples,
    supports=_quantize_supports,
)
def quantize_fp8(x: Tensor, perm: Tensor | None, scale: Tensor, split: int) -> Tensor:
    """``x * (1 / scale[g])`` in float8_e4m3fn, rounded half to even, saturating at +-448; NaN where x is not finite.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        perm: int32 [K], ``x[..., perm]`` is quantized; None keeps the order.
        scale: float32 [G], positive; G = 2 when ``split < K``, else 1.
        split: number of normal channels, 1..K.

    Returns:
        float8_e4m3fn [..., K], contiguous.

    Raises:
        ValueError: on a wrong dtype or shape; on a GPU older than sm_89.
    """
    ordered = x if perm is None else x.index_select(-1, perm)
    parts = []
    for g, part in enumerate(numerics.group_slices(x.shape[-1], split)):
        values, inverse = ordered[..., part].float(), scale[g].reciprocal()
        finite = values.isfinite() & inverse.isfinite()
        parts.append(torch.where(finite, (values * inverse).clamp(-LARGEST, LARGEST), torch.nan))
    return torch.cat(parts, dim=-1).to(FP8)


def _linear_supports(
    q: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    offset: Tensor,
    split: int,
    dtype: torch.dtype,
) -> str:
    if dtype not in OUTPUTS:
        return f"dtype = {dtype}: expected float32, bfloat16 or float16"
    if q.ndim < 1 or q.dtype != FP8:
        return f"q is {q.dtype} {tuple(q.shape)}: expected {FP8} [..., K] from quantize_fp8"
    if offset.dtype != torch.float32 or offset.ndim != 1:
        return f"offset is {offset.dtype} {tuple(offset.shape)}: expected float32 [N]"
    outputs, width = offset.shape[0], q.shape[-1]
    if weight.dtype != FP8 or weight.shape != (outputs, width):
        form = f"{FP8} ({outputs}, {width}) for an offset of {outputs}"
        return f"weight is {weight.dtype} {tuple(weight.shape)}: expected {form}"
    return _unfit_scales(width, split, [("weight_scale", weight_scale, (outputs,)), ("input_scale", input_scale, ())])


def _linear_fake(
    q: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    offset: Tensor,
    split: int,
    dtype: torch.dtype,
) -> Tensor:
    return q.new_empty((*q.shape[:-1], offset.shape[0]), dtype=dtype)


def _linear_samples() -> Sequence[Arguments]:
    random = torch.Generator().manual_seed(6)
    cases: list[Arguments] = []
    for shape, outputs, split, dtype in (
        ((5, 96), 40, 96, torch.float32),
        ((2, 9, 160), 33, 128, torch.bfloat16),
        ((17, 75), 19, 50, torch.float32),
        ((0, 64), 16, 32, torch.float16),
    ):
        groups = 1 if split == shape[-1] else 2
        q = torch.randn(shape, generator=random, dtype=torch.float32).mul(60).to(FP8)
        weight = torch.randn(outputs, shape[-1], generator=random, dtype=torch.float32).mul(60).to(FP8)
        weight_scale = torch.rand(groups, outputs, generator=random, dtype=torch.float32) * 0.01 + 0.001
        input_scale = torch.rand(groups, generator=random, dtype=torch.float32) * 0.05 + 0.005
        cases.append(
            (
                q,
                weight,
                weight_scale,
                input_scale,
                torch.randn(outputs, generator=random, dtype=torch.float32),
                split,
                dtype,
            )
        )
    return cases


@declare(
    "dual_scale_linear_fp8(Tensor q, Tensor weight, Tensor weight_scale, Tensor input_scale, Tensor offset, int split,"
    " ScalarType dtype) -> Tensor",
    fake=_linear_fake,
    samples=_linear_samples,
    supports=_linear_supports,
    max_error=2**-7,
)
def dual_scale_linear_fp8(
    q: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    offset: Tensor,
    split: int,
    dtype: torch.dtype,
) -> Tensor:
    """Linear layer on float8, ``sum_g s_x[g] s_w[g, n] sum_k q w + offset[n]``, accumulated in float32.

    Hopper's tensor cores keep about 14 bits of a float8 sum within a product; the others keep all of float32.

    Args:
        q: float8_e4m3fn [..., K] in ``[normal | outlier]`` order.
        weight: float8_e4m3fn [N, K].
        weight_scale: float32 [G, N], positive; G = 2 when ``split < K``, else 1.
        input_scale: float32 [G], positive.
        offset: float32 [N], the bias.
        split: number of normal channels, 1..K.
        dtype: of the result: float32, bfloat16 or float16.

    Returns:
        ``dtype`` [..., N], contiguous.

    Raises:
        ValueError: on a wrong dtype or shape; on a GPU older than sm_89.
    """
    rows = q.reshape(-1, q.shape[-1]).float()
    y = offset.expand(rows.shape[0], -1)
    with torch.autocast(q.device.type, enabled=False):
        for g, part in enumerate(numerics.group_slices(q.shape[-1], split)):
            y = y + rows[:, part] @ weight[:, part].float().T * (input_scale[g] * weight_scale[g])
    return y.to(dtype).reshape(*q.shape[:-1], offset.shape[0]).contiguous()


if HAS_TRITON:

    @quantize_fp8.on("cuda", "triton")
    def quantize_fp8_cuda(x: Tensor, perm: Tensor | None, scale: Tensor, split: int) -> Tensor:
        """Launch on the device that holds x."""
        with torch.cuda.device(x.device):
            fp8_triton.check_device()
            return fp8_triton.launch(x, perm, scale, split)

    @dual_scale_linear_fp8.on("cuda", "triton")
    def linear_fp8_cuda(
        q: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        input_scale: Tensor,
        offset: Tensor,
        split: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """Launch on the device that holds q."""
        with torch.cuda.device(q.device):
            fp8_triton.check_device()
            return fp8_triton.launch_linear(q, weight, weight_scale, input_scale, offset, split, dtype)
