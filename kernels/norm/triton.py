"""The Triton kernel behind ``norm_quantize``, and the norm of its twins with scales per token.

A row stays in registers from its only load to the store of its integers.
The gather into ``[normal | outlier]`` order exchanges float32 values through shared memory, so that loads and stores
of global memory keep their 16 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq import numerics
from fxq.kernels.arguments import NormQuantize, NormQuantizePerToken
from fxq.kernels.device import inverse_root, poison, to_int8
from fxq.kernels.jit import Block, Pointer, Scalar, constexpr, jit, tl, triton
from fxq.kernels.rows import MAX_WIDTH, flat_rows, warps_of


@jit
def normed_row(
    x_row: Pointer,
    weight_ptr: Pointer,
    bias_ptr: Pointer,
    gain_ptr: Pointer,
    shift_ptr: Pointer,
    perm_ptr: Pointer,
    row: Scalar,
    columns: Block,
    K: Scalar,
    gain_stride: Scalar,
    shift_stride: Scalar,
    frame_rows: Scalar,
    eps: Scalar,
    WEIGHT: constexpr,
    BIAS: constexpr,
    MODULATED: constexpr,
    GATHER: constexpr,
) -> Block:
    """Float32 channels of a row after its norm and modulation, gathered; beyond K what is not stored."""
    inside = columns < K
    # All blocks here are [BLOCK], all sums scalars; zeros beyond K leave the sums over BLOCK those over K.
    x = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x) / K
    centered = tl.where(inside, x - mean, 0.0)  # zeros again: -mean beyond K would enter the variance
    # NaN where the squares overflow: torch would take such a row for zeros.
    y = centered * inverse_root(tl.sum(centered * centered) / K + eps)
    if WEIGHT:
        y = y * tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y = y + tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if MODULATED:
        # gain and shift are [B * F, K]: frame_rows rows after each other read the same one of them.
        frame = (row // frame_rows).to(tl.int64)
        gain = tl.load(gain_ptr + frame * gain_stride + columns, mask=inside, other=0.0).to(tl.float32)
        y = y * (1.0 + gain)
        y = y + tl.load(shift_ptr + frame * shift_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if GATHER:
        # Beyond K it repeats channel 0, which neither is stored nor makes a sound row look broken.
        y = tl.gather(y, tl.load(perm_ptr + columns, mask=inside, other=0), 0)
    return y


@jit
def norm_quantize_kernel(
    x_ptr: Pointer,
    weight_ptr: Pointer,
    bias_ptr: Pointer,
    gain_ptr: Pointer,
    shift_ptr: Pointer,
    perm_ptr: Pointer,
    scale_ptr: Pointer,
    zero_ptr: Pointer,
    q_ptr: Pointer,
    K: Scalar,
    split: Scalar,
    x_stride: Scalar,
    gain_stride: Scalar,
    shift_stride: Scalar,
    frame_rows: Scalar,
    eps: Scalar,
    WEIGHT: constexpr,
    BIAS: constexpr,
    MODULATED: constexpr,
    GATHER: constexpr,
    DUAL: constexpr,
    LOW: constexpr,
    HIGH: constexpr,
    BLOCK: constexpr,
) -> None:
    """One row; frame_rows consecutive rows share a row of gain and of shift; unused pointers are None."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    y = normed_row(
        x_ptr + row.to(tl.int64) * x_stride,
        weight_ptr,
        bias_ptr,
        gain_ptr,
        shift_ptr,
        perm_ptr,
        row,
        columns,
        K,
        gain_stride,
        shift_stride,
        frame_rows,
        eps,
        WEIGHT,
        BIAS,
        MODULATED,
        GATHER,
    )
    # Integers per unit of y, a scalar or [BLOCK]; rounded to nearest as the reference's reciprocal.
    inverse = tl.div_rn(1.0, tl.load(scale_ptr))
    zero = tl.load(zero_ptr)
    if DUAL:
        inverse = tl.where(columns < split, inverse, tl.div_rn(1.0, tl.load(scale_ptr + 1)))
        zero = tl.where(columns < split, zero, tl.load(zero_ptr + 1))
    # int8 has no NaN: a row with anything that is not finite (0 * y is then NaN) begins with a mark instead.
    broken = tl.max(tl.where(tl.abs(y * 0.0 + inverse * 0.0) == 0.0, 0, 1)) == 1
    q = poison(to_int8(y, inverse, zero, LOW, HIGH), columns, broken, K)
    tl.store(q_ptr + row.to(tl.int64) * K + columns, q, mask=columns < K)


def launch(a: NormQuantize, *, out: Tensor | None = None) -> Tensor:
    """Run the Triton kernel on the current device; see :func:`fxq.kernels.norm.op.norm_quantize`.

    ``out``, int8 contiguous of x's shape, is allocated when it is not given.

    Raises:
        ValueError: when a row is wider than ``MAX_WIDTH``.
    """
    x, perm, scale, zero_point, split, bits = a.x, *a.quantization
    width, (low, high) = x.shape[-1], numerics.integer_range(bits)
    row_of = norm_arguments(a)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device) if out is None else out
    block = max(16, triton.next_power_of_2(width))
    if q.numel():
        norm_quantize_kernel[(q.numel() // width,)](
            perm_ptr=None if perm is None else perm.contiguous(),
            scale_ptr=scale.contiguous(),
            zero_ptr=zero_point.contiguous(),
            q_ptr=q,
            split=split,
            GATHER=perm is not None,
            DUAL=split < width,
            LOW=low,
            HIGH=high,
            BLOCK=block,
            num_warps=warps_of(block),
            **row_of,
        )
    return q


def norm_arguments(a: NormQuantize | NormQuantizePerToken) -> dict[str, object]:
    """What :func:`normed_row` reads, by its names, but for the gather.

    Raises:
        ValueError: when a row is wider than ``MAX_WIDTH``.
    """
    width = a.x.shape[-1]
    if width > MAX_WIDTH:
        raise ValueError(f"x has {width} channels: expected at most {MAX_WIDTH}; quantize after the norm instead")
    rows = flat_rows(a.x)
    gains, shifts = (None if t is None else flat_rows(t) for t in (a.gain, a.shift))
    return {
        "x_ptr": rows,
        "weight_ptr": None if a.weight is None else a.weight.contiguous(),
        "bias_ptr": None if a.bias is None else a.bias.contiguous(),
        "gain_ptr": gains,
        "shift_ptr": shifts,
        "K": width,
        "x_stride": rows.stride(0),
        "gain_stride": 0 if gains is None else gains.stride(0),
        "shift_stride": 0 if shifts is None else shifts.stride(0),
        "frame_rows": 1 if gains is None else rows.shape[0] // gains.shape[0],
        "eps": a.eps,
        "WEIGHT": a.weight is not None,
        "BIAS": a.bias is not None,
        "MODULATED": gains is not None,
    }
