"""The Triton kernel that encodes blocks of channels: codes are rounded and packed in one pass over the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fxq.kernels.attention.triton_numbers import as_float32
from fxq.kernels.jit import Pointer, Scalar, constexpr, jit, tl, triton

ROWS = 32
"""Heads of tokens that a program rounds."""


@jit
def pack_kernel(
    x_ptr: Pointer,
    scale_ptr: Pointer,
    zero_ptr: Pointer,
    y_ptr: Pointer,
    N: Scalar,
    SIZE: constexpr,
    D: constexpr,
    CHANNELS: constexpr,
    BITS: constexpr,
    ROWS: constexpr,
) -> None:
    """ROWS of the N rows of SIZE channels, D the next power of two; a scale, and a zero if any, for each CHANNELS."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    channel = tl.arange(0, D)
    inside = (row < N)[:, None] & (channel < SIZE)[None, :]
    x = tl.load(x_ptr + row[:, None] * SIZE + channel[None, :], mask=inside, other=0.0)  # [ROWS, D]
    place = row[:, None] * (SIZE // CHANNELS) + (channel // CHANNELS)[None, :]
    scale = tl.where(inside, as_float32(tl.load(scale_ptr + place, mask=inside, other=0)), 1.0)
    LOW: constexpr = 0 if zero_ptr is not None else 1 - 2 ** (BITS - 1)
    if zero_ptr is not None:
        x = x - as_float32(tl.load(zero_ptr + place, mask=inside, other=0))
    steps = tl.minimum(tl.maximum(tl.div_rn(x, scale), LOW), LOW + 2**BITS - (1 if zero_ptr is not None else 2))
    # Adding 1.5 * 2**23 rounds half to even and leaves the integer in the low bits of the mantissa.
    codes = (steps + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000 - LOW
    codes = tl.where(inside, codes, 0)
    PER: constexpr = 8 // BITS
    if PER > 1:
        # [ROWS, D / PER, PER]: the codes of a byte have no bit in common, so that their sum is all of them.
        parts = tl.reshape(codes, (ROWS, D // PER, PER)) << (tl.arange(0, PER) * BITS)[None, None, :]
        codes = tl.sum(parts, 2)
    PACKED: constexpr = (SIZE + PER - 1) // PER
    byte = tl.arange(0, D // PER)
    mask = (row < N)[:, None] & (byte < PACKED)[None, :]
    tl.store(y_ptr + row[:, None] * PACKED + byte[None, :], codes.to(tl.uint8), mask=mask)


def pack_blocks(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Packed codes uint8 [..., ceil(size * bits / 8)] of blocks of channels, the first code in the lowest bits.

    Args:
        x: float32 [..., size], on a GPU.
        scale: float [..., size / channels], float8_e4m3fn included, positive.
        zero: as ``scale``, the number of code 0, or None where code 0 is the least multiple of the scale.
        bits: 2, 4 or 8.
    """
    size = x.shape[-1]
    y = torch.empty((*x.shape[:-1], -(-size * bits // 8)), dtype=torch.uint8, device=x.device)
    small = [None if t is None else _plain(t) for t in (scale, zero)]
    if y.numel():
        rows = x.numel() // size
        pack_kernel[(triton.cdiv(rows, ROWS),)](
            x.contiguous(),
            *small,
            y,
            N=rows,
            SIZE=size,
            D=max(8, triton.next_power_of_2(size)),
            CHANNELS=size // scale.shape[-1],
            BITS=bits,
            ROWS=ROWS,
            num_warps=4,
        )
    return y


def _plain(x: Tensor) -> Tensor:
    """Contiguous, float8 as bytes."""
    x = x.contiguous()
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
