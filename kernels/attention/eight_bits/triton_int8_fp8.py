"""Attention with float8 weights and values in Triton, from sm_89 on: scores of int8 codes, sums of short products.

Codes, scales and means are those of :mod:`fxq.kernels.attention.eight_bits.int8_fp8`. Values are stored with their
tokens side by side, as Hopper's tensor cores want the right side of a float8 product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq.kernels import float8
from fxq.kernels.arguments import Attention
from fxq.kernels.attention.eight_bits.triton_int8 import (
    LEAST_SCALE,
    LEAST_SIZE,
    Queries,
    begun,
    columns,
    quantized,
    result,
)
from fxq.kernels.attention.triton import State, Tile
from fxq.kernels.jit import Block, Pointer, Scalar, constexpr, jit, tl, triton

KEYS = 64
"""Tokens of a tile of keys and values, those of one product, and of a program that makes codes of values."""


def tile_of(arch: int) -> Tile:
    """The tile that spills nothing on ``sm_{arch}`` and fits 99 KiB of shared memory, heads of 128 channels."""
    return Tile(64 if arch >= 120 else 128, KEYS, 8, 2)


@jit
def to_float8(x: Block, PTX: constexpr) -> Block:
    """float8_e4m3fn of float32 within 448, half to even.

    Triton's interpreter loses the carry of a mantissa when it rounds, so there is nothing left to round for it.
    """
    if not PTX:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        # Below 2**-6 numbers are steps of 2**-9: those that 1.5 * 2**14 leaves.
        small = (x + 24576.0) - 24576.0
        x = tl.where(tl.abs(x) < 0.015625, small, bits.to(tl.float32, bitcast=True))
    return x.to(tl.float8e4nv)


@jit
def values_kernel(
    v_ptr: Pointer,
    scale_ptr: Pointer,
    code_ptr: Pointer,
    tokens: Scalar,
    padded: Scalar,
    heads: Scalar,
    v_batch: Scalar,
    v_row: Scalar,
    v_head: Scalar,
    SIZE: constexpr,
    D: constexpr,
    BLOCK: constexpr,
    PTX: constexpr,
) -> None:
    """float8 [B, heads, SIZE, padded] of values by scales [B, heads, SIZE]; 0 behind the tokens and for a scale NaN."""
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, D)
    mask = (token < tokens)[:, None] & (channel < SIZE)[None, :]
    x = columns(v_ptr + batch * v_batch + head * v_head, token, v_row, channel, mask).to(tl.float32)  # [BLOCK, D]
    line = (batch * heads + head) * SIZE + channel
    scale = tl.load(scale_ptr + line, mask=channel < SIZE, other=1.0)
    inverse = tl.div_rn(tl.full((D,), 1.0, tl.float32), scale)[None, :]
    scaled = tl.where((inverse == inverse) & (x == x), x * inverse, 0.0)
    codes = tl.trans(to_float8(tl.minimum(tl.maximum(scaled, -448.0), 448.0), PTX))  # [D, BLOCK]
    tl.store(code_ptr + line[:, None] * padded + token[None, :], codes, mask=(channel < SIZE)[:, None])


@jit
def attention_int8_fp8_kernel(
    q_ptr: Pointer,
    q_scale_ptr: Pointer,
    bias_ptr: Pointer,
    k_ptr: Pointer,
    k_scale_ptr: Pointer,
    v_ptr: Pointer,
    v_scale_ptr: Pointer,
    out_ptr: Pointer,
    lse_ptr: Pointer,
    S: Scalar,
    tokens: Scalar,
    padded: Scalar,
    heads: Scalar,
    SIZE: constexpr,
    D: constexpr,
    FIRST: constexpr,
    PTX: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
) -> None:
    """As :func:`~fxq.kernels.attention.eight_bits.triton_int8.attention_int8_kernel`, with values as float8.

    ``v`` float8 [B, heads, SIZE, padded] with scales [B, heads, SIZE], in which sums count. Weights are relative to the
    largest of a tile, and counted as they are rounded.
    """
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    channel = tl.arange(0, D)
    here = row < S - tl.program_id(0) * BLOCK_M
    tile = here[:, None] & (channel < SIZE)[None, :]
    line = (batch * S + tl.program_id(0) * BLOCK_M) * heads + head
    cell = row[:, None] * (heads * SIZE) + channel[None, :]  # [BLOCK_M, D] from the first row
    q = tl.load(q_ptr + line * SIZE + cell, mask=tile, other=0)
    factor = tl.load(q_scale_ptr + line + row * heads, mask=here, other=0.0)
    bias = tl.load(bias_ptr + line + row * heads, mask=here, other=0.0)
    out = out_ptr + line * SIZE + cell
    lse = lse_ptr + line + row * heads
    most, weight, sums = begun(out, lse, here, tile, FIRST)
    scales = v_scale_ptr + (batch * heads + head) * SIZE + channel
    if not FIRST:
        sums = sums / tl.load(scales, mask=channel < SIZE, other=1.0)[None, :]
    within = tl.arange(0, BLOCK_N)
    place = within[:, None] * (heads * SIZE) + channel[None, :]  # [BLOCK_N, D] from the first token of a tile
    across = channel[:, None] * padded + within[None, :]  # [D, BLOCK_N], as above, of values
    v_ptr += (batch * heads + head) * SIZE * padded
    for start in range(0, tokens, BLOCK_N):
        inside = start + within < tokens
        first = (batch * tokens + start) * heads + head
        keys = tl.load(k_ptr + first * SIZE + place, mask=inside[:, None] & (channel < SIZE)[None, :], other=0)
        scale = tl.load(k_scale_ptr + first + within * heads, mask=inside, other=0.0)
        sums_of_codes = tl.dot(q, tl.trans(keys), out_dtype=tl.int32)  # [BLOCK_M, BLOCK_N]
        scores = sums_of_codes.to(tl.float32) * (factor[:, None] * scale[None, :])
        scores = tl.where(inside[None, :], scores, float("-inf"))
        top = tl.max(scores, 1)
        chance = to_float8(tl.exp2(scores - top[:, None]) * 448.0, PTX)
        above = tl.maximum(most, top + bias)
        shrink = tl.exp2(most - above)
        grow = tl.exp2(top + bias - above)
        weight = weight * shrink + tl.sum(chance.to(tl.float32), 1) * grow
        values = tl.load(v_ptr + start + across, mask=(channel < SIZE)[:, None], other=0.0)  # [D, BLOCK_N]
        product = tl.dot(chance, tl.trans(values))  # [BLOCK_M, D]
        sums = sums * shrink[:, None] + product * grow[:, None]
        most = above
    unit = tl.load(scales, mask=channel < SIZE, other=1.0)
    tl.store(out, sums * unit[None, :] / weight[:, None], mask=tile)
    tl.store(lse, most + tl.log2(weight), mask=here)


def value_scale(v: Tensor) -> Tensor:
    """Scales float32 [B, heads, size] of values [B, L, heads, size], at least one token: NaN of what is not finite."""
    low, high = torch.aminmax(v, dim=1)
    return float8.token_scale(torch.maximum(-low, high).float()).clamp(min=LEAST_SCALE)


def quantized_values(v: Tensor, scale: Tensor) -> Tensor:
    """float8_e4m3fn [B, heads, size, tokens and what fills the last tile] of float values [B, L, heads, size]."""
    batch, tokens, heads, size = v.shape
    v = v if v.stride(3) == 1 else v.contiguous()
    padded = triton.cdiv(tokens, KEYS) * KEYS
    codes = torch.empty((batch, heads, size, padded), dtype=torch.float8_e4m3fn, device=v.device)
    values_kernel[(padded // KEYS, batch * heads)](
        v,
        scale,
        codes,
        tokens=tokens,
        padded=padded,
        heads=heads,
        v_batch=v.stride(0),
        v_row=v.stride(1),
        v_head=v.stride(2),
        SIZE=size,
        D=max(LEAST_SIZE, triton.next_power_of_2(size)),
        BLOCK=KEYS,
        PTX=v.is_cuda,
        num_warps=4,
    )
    return codes


def attend(a: Attention, means: Tensor, arch: int) -> Tensor:
    """As :func:`~fxq.kernels.attention.eight_bits.int8_fp8.attention_int8_fp8`, heads of at most MOST_SIZE channels.

    Args:
        a: queries, and pieces of keys and values.
        means: float32 [pieces, B, heads, head_dim], of the keys.
        arch: of the current device, 90 for sm_90.
    """
    batch, rows, heads, size = a.q.shape
    if not a.q.numel():
        return a.q.new_empty((batch, rows, heads * size))
    queries, state, first, tile = Queries.of(a.q), State.empty(a.q), True, tile_of(arch)
    for k, v, mean in zip(a.k, a.v, means, strict=True):
        if k.shape[1]:
            launch(queries, k, v, mean, state, first, tile)
            first = False
    return result(state, first, a.q.dtype)


def launch(queries: Queries, k: Tensor, v: Tensor, mean: Tensor, state: State, first: bool, tile: Tile) -> None:
    """Add a piece to the state on the current device.

    Args:
        queries: of the call, as codes.
        k: float [B, L, heads, size], at least one token.
        v: as ``k``.
        mean: float32 [B, heads, size], of the keys.
        state: written; read before unless it is the first piece.
        first: whether it is.
        tile: of the device.
    """
    batch, rows, heads, size = queries.x.shape
    key_codes, key_scale = quantized(k, mean)
    scale = value_scale(v)
    codes = quantized_values(v, scale)
    attention_int8_fp8_kernel[(triton.cdiv(rows, tile.rows), batch * heads)](
        queries.codes,
        queries.scale,
        queries.bias(mean.unsqueeze(1)).squeeze(2).transpose(1, 2).contiguous(),
        key_codes,
        key_scale,
        codes,
        scale,
        *state,
        S=rows,
        tokens=k.shape[1],
        padded=codes.shape[3],
        heads=heads,
        SIZE=size,
        D=max(LEAST_SIZE, triton.next_power_of_2(size)),
        FIRST=first,
        PTX=k.is_cuda,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
