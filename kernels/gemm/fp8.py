"""The float8 twins of quantize_act and dual_scale_linear: e4m3 activations and weights, for GPUs from sm_89 on.

Blackwell's data-centre GPUs have no fast int8 path in Triton, and Hopper overlaps float8 products with their loads but
not int8 ones. Values are symmetric: a float format gains nothing from a zero point.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxq import numerics
from fxq.kernels.arguments import DualScaleLinearFp8, QuantizeFp8
from fxq.kernels.gemm import triton as gemm_triton
from fxq.kernels.gemm import triton_fp8 as fp8_triton
from fxq.kernels.gemm.op import OUTPUTS
from fxq.kernels.jit import HAS_TRITON
from fxq.kernels.op import declare
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


def _quantize_supports(a: QuantizeFp8) -> str:
    x, perm, scale, split = a
    if x.ndim < 1 or x.dtype not in FLOATS:
        return f"x is {x.dtype} {tuple(x.shape)}: expected float32, bfloat16 or float16 [..., K]; cast it first"
    width = x.shape[-1]
    if perm is not None and (perm.dtype != torch.int32 or perm.shape != (width,)):
        return f"perm is {perm.dtype} {tuple(perm.shape)}: expected int32 ({width},), or None to keep the order"
    return _unfit_scales(width, split, [("scale", scale, ())])


def _quantize_fake(a: QuantizeFp8) -> Tensor:
    return a.x.new_empty(a.x.shape, dtype=FP8)


def _quantize_samples() -> Sequence[QuantizeFp8]:
    random = torch.Generator().manual_seed(5)
    cases: list[QuantizeFp8] = []
    for shape, split, dtype, gather in (
        ((5, 96), 96, torch.float32, False),
        ((2, 7, 130), 64, torch.bfloat16, True),
        ((0, 64), 32, torch.float16, False),
    ):
        x = torch.randn(shape, generator=random, dtype=torch.float32).to(dtype)
        perm = torch.randperm(shape[-1], generator=random).to(torch.int32) if gather else None
        scale = torch.rand(1 if split == shape[-1] else 2, generator=random, dtype=torch.float32) * 0.01 + 0.002
        cases.append(QuantizeFp8(x, perm, scale, split))
    return cases


@declare(QuantizeFp8, fake=_quantize_fake, samples=_quantize_samples, supports=_quantize_supports)
def quantize_fp8(a: QuantizeFp8) -> Tensor:
    """``x * (1 / scale[g])`` in float8_e4m3fn, rounded half to even, saturating at +-448; NaN where x is not finite.

    Returns:
        float8_e4m3fn [..., K], contiguous.

    Raises:
        ValueError: on a wrong dtype or shape; on a GPU older than sm_89.
    """
    ordered = a.x if a.perm is None else a.x.index_select(-1, a.perm)
    parts = []
    for g, part in enumerate(numerics.group_slices(a.x.shape[-1], a.split)):
        values, inverse = ordered[..., part].float(), a.scale[g].reciprocal()
        finite = values.isfinite() & inverse.isfinite()
        parts.append(torch.where(finite, (values * inverse).clamp(-LARGEST, LARGEST), torch.nan))
    return torch.cat(parts, dim=-1).to(FP8)


def _linear_supports(a: DualScaleLinearFp8) -> str:
    q, weight, weight_scale, input_scale, offset, split, dtype = a
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


def _linear_fake(a: DualScaleLinearFp8) -> Tensor:
    return a.operands.empty(a.dtype)


def _linear_samples() -> Sequence[DualScaleLinearFp8]:
    random = torch.Generator().manual_seed(6)
    cases: list[DualScaleLinearFp8] = []
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
        offset = torch.randn(outputs, generator=random, dtype=torch.float32)
        cases.append(DualScaleLinearFp8(q, weight, weight_scale, input_scale, offset, split, dtype))
    return cases


@declare(DualScaleLinearFp8, fake=_linear_fake, samples=_linear_samples, supports=_linear_supports, max_error=2**-7)
def dual_scale_linear_fp8(a: DualScaleLinearFp8) -> Tensor:
    """Linear layer on float8, ``sum_g s_x[g] s_w[g, n] sum_k q w + offset[n]``, accumulated in float32.

    Hopper's tensor cores keep about 14 bits of a float8 sum within a product; the others keep all of float32.

    Returns:
        ``dtype`` [..., N], contiguous.

    Raises:
        ValueError: on a wrong dtype or shape; on a GPU older than sm_89.
    """
    width = a.q.shape[-1]
    rows = a.q.reshape(-1, width).float()
    y = a.offset.expand(rows.shape[0], -1)
    with torch.autocast(a.q.device.type, enabled=False):
        for g, part in enumerate(numerics.group_slices(width, a.split)):
            y = y + rows[:, part] @ a.weight[:, part].float().T * (a.input_scale[g] * a.weight_scale[g])
    return y.to(a.dtype).reshape(*a.q.shape[:-1], a.offset.shape[0]).contiguous()


if HAS_TRITON:

    @quantize_fp8.on("cuda", "triton")
    def quantize_fp8_cuda(a: QuantizeFp8) -> Tensor:
        """Launch on the device that holds x."""
        with torch.cuda.device(a.x.device):
            fp8_triton.check_device()
            return fp8_triton.launch(a)

    @dual_scale_linear_fp8.on("cuda", "triton")
    def linear_fp8_cuda(a: DualScaleLinearFp8) -> Tensor:
        """Launch on the device that holds q."""
        with torch.cuda.device(a.q.device):
            fp8_triton.check_device()
            return gemm_triton.launch_tiled(a.operands, _linear_fake(a))
