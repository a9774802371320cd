"""The Triton kernel behind ``quantize_per_token`` and ``quantize_per_token_asymmetric``.

A row stays in registers from its load to the store of its integers. Rows that are too wide for that are read twice, the
second time from the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq import numerics
from fxq.kernels.arguments import QuantizePerToken
from fxq.kernels.device import to_int8
from fxq.kernels.jit import Block, Pointer, Scalar, constexpr, jit, tl
from fxq.kernels.rows import flat_rows, warps_of

MAX_BLOCK = 16384
"""Widest row that is loaded once; with a gather its float32 values are 64 KiB of shared memory."""


@jit
def _part_of_row(x_row: Pointer, perm_ptr: Pointer, columns: Block, K: Scalar, GATHER: constexpr) -> Block:
    """Float32 channels at ``columns`` of a row that is too wide for one block, 0 beyond the last."""
    # [BLOCK], as ``columns``
    inside = columns < K
    source = tl.load(perm_ptr + columns, mask=inside, other=0) if GATHER else columns
    return tl.load(x_row + source, mask=inside, other=0.0).to(tl.float32)


@jit
def whole_row(x_row: Pointer, perm_ptr: Pointer, columns: Block, K: Scalar, GATHER: constexpr) -> Block:
    """Float32 channels of a row, loaded in order and exchanged through shared memory, 0 beyond the last."""
    inside = columns < K
    x = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    if GATHER:
        # The exchange repeats channel 0 beyond K: zero it, or it would count as an outlier.
        x = tl.where(inside, tl.gather(x, tl.load(perm_ptr + columns, mask=inside, other=0), 0), 0.0)
    return x


@jit
def largest(x: Block, columns: Block, split: Scalar, DUAL: constexpr) -> tuple[Scalar, Scalar]:
    """Bits of the largest magnitude of the normal channels, and of the outliers; as integers NaN is the largest."""
    # [BLOCK] -> scalars. Bits of floats without a sign are ordered as the floats are, with infinity and NaN on top.
    magnitude = tl.abs(x).to(tl.int32, bitcast=True)
    if DUAL:
        normal = columns < split
        result = tl.max(tl.where(normal, magnitude, 0)), tl.max(tl.where(normal, 0, magnitude))
    else:
        result = tl.max(magnitude), 0
    return result


@jit
def _measured(
    x: Block, columns: Block, split: Scalar, DUAL: constexpr, ASYMMETRIC: constexpr
) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """:func:`_range`, or for rows without a zero point :func:`largest` with 0 for what is below."""
    if ASYMMETRIC:
        result = _range(x, columns, split, DUAL)
    else:
        top, outlier_top = largest(x, columns, split, DUAL)
        result = top, 0, outlier_top, 0
    return result


@jit
def _range(x: Block, columns: Block, split: Scalar, DUAL: constexpr) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """Bits of the largest value and of the least one without its sign, of the normal channels and of the outliers."""
    # [BLOCK] -> scalars. Bits of floats whose sign is set are negative: they count as 0 does. NaN is on top.
    bits = x.to(tl.int32, bitcast=True)
    negated = bits ^ -2147483648
    if DUAL:
        normal = columns < split
        result = (
            tl.maximum(tl.max(tl.where(normal, bits, 0)), 0),
            tl.maximum(tl.max(tl.where(normal, negated, 0)), 0),
            tl.maximum(tl.max(tl.where(normal, 0, bits)), 0),
            tl.maximum(tl.max(tl.where(normal, 0, negated)), 0),
        )
    else:
        result = tl.maximum(tl.max(bits), 0), tl.maximum(tl.max(negated), 0), 0, 0
    return result


@jit
def _store_range(
    scale_ptr: Pointer, top: Scalar, below: Scalar, least: Scalar, LOW: constexpr, HIGH: constexpr, GROUPS: constexpr
) -> tuple[Scalar, Scalar]:
    """As :func:`store_scale` of a row from ``-below`` to ``top``, with its zero point behind; returns that too."""
    below = below.to(tl.float32, bitcast=True)
    half = top.to(tl.float32, bitcast=True) * 0.5 + below * 0.5
    finite = half < float("inf")
    spans = half > least
    scale = tl.where(spans, tl.div_rn(half, (HIGH - LOW) / 2), 1.0)
    inverse = tl.where(finite, tl.div_rn(1.0, scale), 0.0)
    # Steps from the least value to 0, half to even as in to_int8: at most 255, which the mantissa holds.
    steps = (below * inverse + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    zero = tl.where(spans & finite, LOW + steps, 0)
    tl.store(scale_ptr, tl.where(finite, scale, float("nan")))
    tl.store(scale_ptr + GROUPS, zero.to(tl.float32))
    return inverse, zero


@jit
def store_scale(scale_ptr: Pointer, top: Scalar, least: Scalar, HIGH: constexpr) -> Scalar:
    """Store the scale of a row and group, NaN where it is not finite; returns its reciprocal, 0 for NaN."""
    top = top.to(tl.float32, bitcast=True)
    finite = top < float("inf")  # False for NaN too
    # Value of one integer step. A row of (nearly) nothing has the scale 1: its reciprocal stays finite.
    scale = tl.where(top > least, tl.div_rn(top, HIGH), 1.0)
    tl.store(scale_ptr, tl.where(finite, scale, float("nan")))
    return tl.where(finite, tl.div_rn(1.0, scale), 0.0)


@jit
def _integers(x: Block, factor: Block, zero: Block, LOW: constexpr, HIGH: constexpr) -> Block:
    """int8 of a row's channels, the zero point where the factor is 0."""
    # Where the scale is NaN the factor is 0; x is zeroed there because 0 * infinity is NaN, which to_int8 makes LOW.
    return to_int8(tl.where(factor == 0.0, 0.0, x), factor, zero, LOW, HIGH)


@jit
def _store_scales(
    scale_ptr: Pointer,
    row: Scalar,
    top: Scalar,
    below: Scalar,
    outlier_top: Scalar,
    outlier_below: Scalar,
    least: Scalar,
    LOW: constexpr,
    HIGH: constexpr,
    DUAL: constexpr,
    ASYMMETRIC: constexpr,
) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """Store what :func:`_measured` gave as scales; returns reciprocal and zero point of the normal and outlier ones."""
    GROUPS: constexpr = 2 if DUAL else 1
    scale_row = scale_ptr + row * (2 * GROUPS if ASYMMETRIC else GROUPS)
    zero = tl.full((), 0, tl.int32)
    if ASYMMETRIC:
        inverse, zero = _store_range(scale_row, top, below, least, LOW, HIGH, GROUPS)
    else:
        inverse = store_scale(scale_row, top, least, HIGH)
    outlier_inverse = inverse
    outlier_zero = zero
    if DUAL:
        if ASYMMETRIC:
            outlier_inverse, outlier_zero = _store_range(
                scale_row + 1, outlier_top, outlier_below, least, LOW, HIGH, GROUPS
            )
        else:
            outlier_inverse = store_scale(scale_row + 1, outlier_top, least, HIGH)
    return inverse, zero, outlier_inverse, outlier_zero


@jit
def quantize_whole(
    x: Block,
    columns: Block,
    q_row: Pointer,
    scale_ptr: Pointer,
    row: Scalar,
    K: Scalar,
    split: Scalar,
    least: Scalar,
    LOW: constexpr,
    HIGH: constexpr,
    DUAL: constexpr,
    ASYMMETRIC: constexpr,
) -> None:
    """Store integers and scales of a row in registers, float32 [BLOCK], 0 beyond K; ``row`` is its number."""
    top, below, outlier_top, outlier_below = _measured(x, columns, split, DUAL, ASYMMETRIC)
    inverse, zero, outlier_inverse, outlier_zero = _store_scales(
        scale_ptr, row, top, below, outlier_top, outlier_below, least, LOW, HIGH, DUAL, ASYMMETRIC
    )
    factor = tl.where(columns < split, inverse, outlier_inverse)  # [BLOCK], integers per unit of x
    q = _integers(x, factor, tl.where(columns < split, zero, outlier_zero), LOW, HIGH)
    tl.store(q_row + columns, q, mask=columns < K)


@jit
def quantize_per_token_kernel(
    x_ptr: Pointer,
    perm_ptr: Pointer,
    q_ptr: Pointer,
    scale_ptr: Pointer,
    K: Scalar,
    split: Scalar,
    x_stride: Scalar,
    least: Scalar,
    LOW: constexpr,
    HIGH: constexpr,
    GATHER: constexpr,
    DUAL: constexpr,
    WHOLE: constexpr,
    BLOCK: constexpr,
    ASYMMETRIC: constexpr,
    ACTIVATION: constexpr,
) -> None:
    """One row, after ACTIVATION if it is not None.

    WHOLE says that it is not wider than a block, else it is read twice in blocks. LOW is ``-HIGH``, but for ASYMMETRIC,
    which stores zero points behind the scales.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * x_stride
    q_row = q_ptr + row * K
    columns = tl.arange(0, BLOCK)
    # The scales of all groups are known before the first integer is: one pass for what a row spans, then the integers.
    if WHOLE:
        x = whole_row(x_row, perm_ptr, columns, K, GATHER)
        if ACTIVATION is not None:
            x = tl.where(columns < K, ACTIVATION(x), 0.0)
        quantize_whole(x, columns, q_row, scale_ptr, row, K, split, least, LOW, HIGH, DUAL, ASYMMETRIC)
    else:
        # ``below`` is the magnitude of its least value, for ASYMMETRIC alone.
        top = 0
        below = 0
        outlier_top = 0
        outlier_below = 0
        for start in range(0, K, BLOCK):
            x = _part_of_row(x_row, perm_ptr, start + columns, K, GATHER)
            if ACTIVATION is not None:
                x = tl.where(start + columns < K, ACTIVATION(x), 0.0)
            found, under, outlier_found, outlier_under = _measured(x, start + columns, split, DUAL, ASYMMETRIC)
            top = tl.maximum(top, found)
            outlier_top = tl.maximum(outlier_top, outlier_found)
            if ASYMMETRIC:
                below = tl.maximum(below, under)
                outlier_below = tl.maximum(outlier_below, outlier_under)
        inverse, zero, outlier_inverse, outlier_zero = _store_scales(
            scale_ptr, row, top, below, outlier_top, outlier_below, least, LOW, HIGH, DUAL, ASYMMETRIC
        )
        for start in range(0, K, BLOCK):
            x = _part_of_row(x_row, perm_ptr, start + columns, K, GATHER)
            if ACTIVATION is not None:
                x = ACTIVATION(x)
            normal = start + columns < split
            factor = tl.where(normal, inverse, outlier_inverse)
            q = _integers(x, factor, tl.where(normal, zero, outlier_zero), LOW, HIGH)
            tl.store(q_row + start + columns, q, mask=start + columns < K)


def quantize(
    a: QuantizePerToken, *, asymmetric: bool = False, max_block: int = MAX_BLOCK, activation: object = None
) -> tuple[Tensor, Tensor]:
    """Run the Triton kernel on the current device, after an activation; see :mod:`fxq.kernels.gemm.per_token`."""
    x, perm, split, bits = a
    width, (low, high) = x.shape[-1], numerics.integer_range(bits)
    rows, dual = flat_rows(x), split < width
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    columns = (2 if dual else 1) * (2 if asymmetric else 1)
    scale = torch.empty((*x.shape[:-1], columns), dtype=torch.float32, device=x.device)
    block = block_of(width, max_block)
    if q.numel():
        quantize_per_token_kernel[(rows.shape[0],)](
            rows,
            None if perm is None else perm.contiguous(),
            q,
            scale,
            K=width,
            split=split,
            x_stride=rows.stride(0),
            least=numerics.LEAST_HALF_RANGE if asymmetric else numerics.LEAST_MAGNITUDE,
            LOW=low if asymmetric else -high,
            HIGH=high,
            GATHER=perm is not None,
            DUAL=dual,
            WHOLE=width <= block,
            BLOCK=block,
            ASYMMETRIC=asymmetric,
            ACTIVATION=activation,
            num_warps=warps_of(block),
        )
    return q, scale


def block_of(width: int, max_block: int = MAX_BLOCK) -> int:
    """Channels of a row that a program holds at a time."""
    whole = max(16, 1 << (width - 1).bit_length())
    return whole if whole <= max_block else max_block // 4
