"""Attention in 8-bit integers in Triton: scores of int8 codes, weights and values in 16 bits, float32 sums.

Codes, scales and means are those of :mod:`fxq.kernels.attention.eight_bits.int8`; the second product
takes the values as they are, with weights in their dtype (float32 ones as tf32), so what it gives is nearer to exact
attention than the reference is.
A launch takes one piece of keys and values, and goes on from the result of the one before it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxq import numerics
from fxq.kernels.arguments import Attention
from fxq.kernels.attention.triton import LOG2_E, State, Tile
from fxq.kernels.device import to_int8
from fxq.kernels.jit import Block, Pointer, Scalar, constexpr, jit, tl, triton

LEAST_SIZE = 32
"""Channels that a product of int8 takes at least."""

LEAST_SCALE = 2.0**-80
"""Least scale of a channel's values where sums count in it: those of other tokens must fit float32 beside it."""

CODE_ROWS = 32
"""Tokens of a program that makes codes."""


def tile_of(dtype: torch.dtype) -> Tile:
    """The tile that spills nothing and fits 99 KiB of shared memory, heads of 128 channels."""
    return Tile(64, 32, 4, 1) if dtype == torch.float32 else Tile(128, 64, 8, 2)


@jit
def columns(base: Pointer, token: Block, row: Scalar, channel: Block, mask: Block) -> Block:
    """[tokens, D] of rows that lie ``row`` elements apart."""
    return tl.load(base + token.to(tl.int64)[:, None] * row + channel[None, :], mask=mask, other=0)


@jit
def begun(out: Pointer, lse: Pointer, inside: Block, tile: Block, FIRST: constexpr) -> tuple[Block, Block, Block]:
    """The largest score of each row, the sum of its weights, and those of its values [rows, D], of what came before.

    Of the pieces before ``out`` and ``lse`` are read: a sum of weights that is 1, at the largest score ``lse``.
    """
    zero = tl.zeros(inside.shape, tl.float32)
    if FIRST:
        most, weight, sums = zero - float("inf"), zero, tl.zeros(tile.shape, tl.float32)
    else:
        most, weight = tl.load(lse, mask=inside, other=0.0), zero + 1.0
        sums = tl.load(out, mask=tile, other=0.0)
    return most, weight, sums


@jit
def weights_of(scores: Block, most: Block) -> tuple[Block, Block, Block]:
    """Weights of scores [rows, tokens], the factor of the sums before, and the largest scores so far, of base 2."""
    above = tl.maximum(most, tl.max(scores, 1))
    # Where no key has a score yet nothing may be subtracted: infinity less infinity is NaN.
    base = tl.where(above == float("-inf"), 0.0, above)
    return tl.exp2(scores - base[:, None]), tl.exp2(most - base), above


@jit
def attention_int8_kernel(
    q_ptr: Pointer,
    q_scale_ptr: Pointer,
    bias_ptr: Pointer,
    k_ptr: Pointer,
    k_scale_ptr: Pointer,
    v_ptr: Pointer,
    out_ptr: Pointer,
    lse_ptr: Pointer,
    S: Scalar,
    tokens: Scalar,
    heads: Scalar,
    v_batch: Scalar,
    v_row: Scalar,
    v_head: Scalar,
    SIZE: constexpr,
    D: constexpr,
    FIRST: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
) -> None:
    """BLOCK_M rows of one head over all tokens of a piece; scores and ``lse`` [B, S, heads] are in base 2.

    ``q`` int8 [B, S, heads, SIZE] with the scale of its scores and the bias of the piece, [B, S, heads]; ``k`` int8
    [B, tokens, heads, SIZE] with scales [B, tokens, heads]. Unless it is the first piece, ``out`` [B, S, heads, SIZE]
    and ``lse`` hold what the pieces before gave: a sum of weights that is 1, at the largest score ``lse``.
    """
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, D)
    tile = (row < S)[:, None] & (channel < SIZE)[None, :]
    line = (batch * S + row) * heads + head
    q = tl.load(q_ptr + line[:, None] * SIZE + channel[None, :], mask=tile, other=0)  # [BLOCK_M, D]
    factor = tl.load(q_scale_ptr + line, mask=row < S, other=0.0)
    bias = tl.load(bias_ptr + line, mask=row < S, other=0.0)
    out = out_ptr + line[:, None] * SIZE + channel[None, :]
    most, weight, sums = begun(out, lse_ptr + line, row < S, tile, FIRST)
    for start in range(0, tokens, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        inside = token < tokens
        mask = inside[:, None] & (channel < SIZE)[None, :]
        first = batch * tokens * heads + head
        keys = columns(k_ptr + first * SIZE, token, heads * SIZE, channel, mask)  # [BLOCK_N, D]
        scale = tl.load(k_scale_ptr + first + token.to(tl.int64) * heads, mask=inside, other=0.0)
        sums_of_codes = tl.dot(q, tl.trans(keys), out_dtype=tl.int32)  # [BLOCK_M, BLOCK_N]
        scores = sums_of_codes.to(tl.float32) * (factor[:, None] * scale[None, :]) + bias[:, None]
        scores = tl.where(inside[None, :], scores, float("-inf"))
        chance, shrink, most = weights_of(scores, most)
        values = columns(v_ptr + batch * v_batch + head * v_head, token, v_row, channel, mask)  # [BLOCK_N, D]
        weight = weight * shrink + tl.sum(chance, 1)
        sums = tl.dot(chance.to(values.dtype), values, sums * shrink[:, None], input_precision="tf32")
    tl.store(out, sums / weight[:, None], mask=tile)
    tl.store(lse_ptr + line, most + tl.log2(weight), mask=row < S)


@jit
def codes_kernel(
    x_ptr: Pointer,
    mean_ptr: Pointer,
    code_ptr: Pointer,
    scale_ptr: Pointer,
    tokens: Scalar,
    heads: Scalar,
    x_batch: Scalar,
    x_row: Scalar,
    x_head: Scalar,
    least: Scalar,
    SIZE: constexpr,
    D: constexpr,
    BLOCK: constexpr,
) -> None:
    """int8 [B, tokens, heads, SIZE] and scales [B, tokens, heads] of BLOCK tokens of a head, as numerics.token_scale.

    ``mean`` [B, heads, SIZE] is taken off before, None: nothing is.
    """
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, D)
    mask = (token < tokens)[:, None] & (channel < SIZE)[None, :]
    x = columns(x_ptr + batch * x_batch + head * x_head, token, x_row, channel, mask).to(tl.float32)  # [BLOCK, D]
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + (batch * heads + head) * SIZE + channel, mask=channel < SIZE, other=0.0)
        x = tl.where(mask, x - mean[None, :], 0.0)
    # The bits of NaN are above those of infinity, and these above all others.
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)  # [BLOCK]
    top = bits.to(tl.float32, bitcast=True)
    scale = tl.where(top <= least, 1.0, tl.div_rn(top, tl.full((BLOCK,), 127.0, tl.float32)))
    inverse = tl.div_rn(tl.full((BLOCK,), 1.0, tl.float32), scale)
    codes = to_int8(x, inverse[:, None], tl.full((), 0, tl.int32), -127, 127)
    line = (batch * tokens + token) * heads + head
    tl.store(code_ptr + line[:, None] * SIZE + channel[None, :], codes, mask=mask)
    scale = tl.where(bits < 0x7F800000, scale, float("nan"))
    tl.store(scale_ptr + line, scale, mask=token < tokens)


def quantized(x: Tensor, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 codes of float x [B, L, heads, size] less a mean [B, heads, size], and scales float32 [B, L, heads]."""
    batch, tokens, heads, size = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:3], dtype=torch.float32, device=x.device)
    codes_kernel[(triton.cdiv(tokens, CODE_ROWS), batch * heads)](
        x,
        None if mean is None else mean.contiguous(),
        codes,
        scale,
        tokens=tokens,
        heads=heads,
        x_batch=x.stride(0),
        x_row=x.stride(1),
        x_head=x.stride(2),
        least=numerics.LEAST_MAGNITUDE,
        SIZE=size,
        D=max(LEAST_SIZE, triton.next_power_of_2(size)),
        BLOCK=CODE_ROWS,
        num_warps=4,
    )
    return codes, scale


class Queries(NamedTuple):
    """Queries of a call as every launch of it takes them.

    Attributes:
        x: float [B, S, heads, size].
        codes: int8, as ``x``.
        scale: float32 [B, S, heads], of scores in base 2.
    """

    x: Tensor
    codes: Tensor
    scale: Tensor

    @classmethod
    def of(cls, q: Tensor) -> Queries:
        """Codes of queries."""
        codes, scale = quantized(q)
        return cls(q, codes, scale * _factor(q))

    def bias(self, means: Tensor) -> Tensor:
        """What means of keys [B, pieces, heads, size] add to scores in base 2: float32 [B, heads, pieces, S]."""
        return (torch.einsum("bshd,bnhd->bhns", self.x.float(), means) * _factor(self.x)).contiguous()


def _factor(q: Tensor) -> float:
    return q.shape[3] ** -0.5 * LOG2_E


def attend(a: Attention, means: Tensor) -> Tensor:
    """As :func:`fxq.kernels.attention.eight_bits.int8.attention_int8`, for heads of at most MOST_SIZE channels.

    Args:
        a: queries, and pieces of keys and values.
        means: float32 [pieces, B, heads, head_dim], of the keys.
    """
    batch, rows, heads, size = a.q.shape
    if not a.q.numel():
        return a.q.new_empty((batch, rows, heads * size))
    queries, state, first = Queries.of(a.q), State.empty(a.q), True
    for k, v, mean in zip(a.k, a.v, means, strict=True):
        if k.shape[1]:
            launch(queries, k, v, mean, state, first)
            first = False
    return result(state, first, a.q.dtype)


def launch(queries: Queries, k: Tensor, v: Tensor, mean: Tensor, state: State, first: bool) -> None:
    """Add a piece to the state on the current device.

    Args:
        queries: of the call, as codes.
        k: float [B, L, heads, size], at least one token.
        v: as ``k``.
        mean: float32 [B, heads, size], of the keys.
        state: written; read before unless it is the first piece.
        first: whether it is.
    """
    batch, rows, heads, size = queries.x.shape
    tile = tile_of(queries.x.dtype)
    key_codes, key_scale = quantized(k, mean)
    values = v if v.stride(3) == 1 else v.contiguous()
    attention_int8_kernel[(triton.cdiv(rows, tile.rows), batch * heads)](
        queries.codes,
        queries.scale,
        queries.bias(mean.unsqueeze(1)).squeeze(2).transpose(1, 2).contiguous(),
        key_codes,
        key_scale,
        values,
        *state,
        S=rows,
        tokens=k.shape[1],
        heads=heads,
        v_batch=values.stride(0),
        v_row=values.stride(1),
        v_head=values.stride(2),
        SIZE=size,
        D=max(LEAST_SIZE, triton.next_power_of_2(size)),
        FIRST=first,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def result(state: State, empty: bool, dtype: torch.dtype) -> Tensor:
    """What a call gives, [B, S, heads * size]; zeros where there was no key."""
    out = torch.zeros_like(state.out) if empty else state.out
    return out.to(dtype).flatten(2)
