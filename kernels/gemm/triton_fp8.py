"""The Triton kernels behind ``quantize_fp8`` and ``quantize_fp8_per_token``.

The products are the GEMMs of :mod:`fxq.kernels.gemm.triton_kernel` and of :mod:`fxq.kernels.gemm.triton_per_token` on
float8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq.kernels import float8
from fxq.kernels.arguments_fp8 import QuantizeFp8, QuantizeFp8PerToken
from fxq.kernels.jit import Pointer, Scalar, constexpr, jit, tl, triton
from fxq.kernels.quantize.triton_per_token import largest, store_scale, whole_row
from fxq.kernels.rows import MAX_WIDTH, flat_rows, warps_of

OLDEST = (8, 9)
"""First compute capability whose tensor cores take float8."""


@jit
def quantize_fp8_kernel(
    x_ptr: Pointer,
    perm_ptr: Pointer,
    scale_ptr: Pointer,
    q_ptr: Pointer,
    K: Scalar,
    split: Scalar,
    x_stride: Scalar,
    GATHER: constexpr,
    DUAL: constexpr,
    BLOCK: constexpr,
) -> None:
    """One row, gathered through shared memory so that loads and stores keep their 16 bytes."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    if GATHER:
        # Beyond K it repeats channel 0, which is not stored.
        x = tl.gather(x, tl.load(perm_ptr + columns, mask=inside, other=0), 0)
    # float8 units per unit of x, a scalar or [BLOCK]; rounded to nearest as the reference's reciprocal.
    inverse = tl.div_rn(1.0, tl.load(scale_ptr))
    if DUAL:
        inverse = tl.where(columns < split, inverse, tl.div_rn(1.0, tl.load(scale_ptr + 1)))
    # 448 is the largest finite e4m3. The clamp hides NaN and infinity: they are put back as bits below.
    scaled = tl.minimum(tl.maximum(x * inverse, -448.0), 448.0)
    bits = scaled.to(q_ptr.dtype.element_ty).to(tl.uint8, bitcast=True)
    finite = tl.abs(x * 0.0 + inverse * 0.0) == 0.0  # 0 * x is 0 or NaN
    bits = tl.where(finite, bits, tl.full((), 127, tl.uint8))  # S.1111.111, e4m3's NaN
    tl.store(q_ptr + row * K + columns, bits.to(q_ptr.dtype.element_ty, bitcast=True), mask=inside)


@jit
def quantize_fp8_per_token_kernel(
    x_ptr: Pointer,
    perm_ptr: Pointer,
    q_ptr: Pointer,
    scale_ptr: Pointer,
    K: Scalar,
    split: Scalar,
    x_stride: Scalar,
    least: Scalar,
    GATHER: constexpr,
    DUAL: constexpr,
    BLOCK: constexpr,
) -> None:
    """One row, which stays in registers from its load to the store of its values."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = whole_row(x_ptr + row * x_stride, perm_ptr, columns, K, GATHER)  # [BLOCK], 0 beyond K
    top, outlier_top = largest(x, columns, split, DUAL)
    GROUPS: constexpr = 2 if DUAL else 1
    inverse = store_scale(scale_ptr + row * GROUPS, top, least, 448.0)
    factor = inverse
    if DUAL:
        # float8 units per unit of x, [BLOCK]
        factor = tl.where(
            columns < split, inverse, store_scale(scale_ptr + row * GROUPS + 1, outlier_top, least, 448.0)
        )
    # Where the scale is NaN the factor is 0, and the values are too: 0 * infinity would be NaN.
    scaled = tl.where(factor == 0.0, 0.0, x) * factor
    q = tl.minimum(tl.maximum(scaled, -448.0), 448.0).to(q_ptr.dtype.element_ty)
    tl.store(q_ptr + row * K + columns, q, mask=columns < K)


def too_old(capability: tuple[int, int]) -> str:
    """Why a GPU has no float8 tensor cores, or ""."""
    return "" if capability >= OLDEST else f"float8 needs sm_89, this GPU is sm_{capability[0]}{capability[1]}"


def check_device() -> None:
    """Raise ValueError when the current device has no float8 tensor cores."""
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        name = f"sm_{capability[0]}{capability[1]}"
        raise ValueError(f"{torch.cuda.get_device_name()} is {name}: float8 needs sm_89; quantize to int8 instead")


def launch(a: QuantizeFp8, *, out: Tensor | None = None) -> Tensor:
    """Run the Triton kernel on the current device; see :func:`fxq.kernels.gemm.fp8.quantize_fp8`.

    Raises:
        ValueError: when a row is wider than ``MAX_WIDTH``.
    """
    x, perm, scale, split = a
    width = x.shape[-1]
    if width > MAX_WIDTH:
        raise ValueError(f"x has {width} channels: expected at most {MAX_WIDTH}")
    rows = flat_rows(x)
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device) if out is None else out
    block = max(16, triton.next_power_of_2(width))
    if q.numel():
        quantize_fp8_kernel[(rows.shape[0],)](
            rows,
            None if perm is None else perm.contiguous(),
            scale.contiguous(),
            q,
            K=width,
            split=split,
            x_stride=rows.stride(0),
            GATHER=perm is not None,
            DUAL=split < width,
            BLOCK=block,
            num_warps=warps_of(block),
        )
    return q


def launch_per_token(a: QuantizeFp8PerToken) -> tuple[Tensor, Tensor]:
    """Run the Triton kernel on the current device; see :func:`fxq.kernels.gemm.fp8.quantize_fp8_per_token`.

    Raises:
        ValueError: when a row is wider than ``MAX_WIDTH``.
    """
    x, perm, split = a
    width = x.shape[-1]
    if width > MAX_WIDTH:
        raise ValueError(f"x has {width} channels: expected at most {MAX_WIDTH}")
    rows, dual = flat_rows(x), split < width
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((*x.shape[:-1], 2 if dual else 1), dtype=torch.float32, device=x.device)
    block = max(16, triton.next_power_of_2(width))
    if q.numel():
        quantize_fp8_per_token_kernel[(rows.shape[0],)](
            rows,
            None if perm is None else perm.contiguous(),
            q,
            scale,
            K=width,
            split=split,
            x_stride=rows.stride(0),
            least=float8.LEAST_MAGNITUDE,
            GATHER=perm is not None,
            DUAL=dual,
            BLOCK=block,
            num_warps=warps_of(block),
        )
    return q, scale
