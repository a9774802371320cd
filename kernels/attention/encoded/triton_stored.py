"""Attention in Triton to the integers that a cache stores: codes of keys and of values are read where they lie.

What is stored is what :mod:`fxq.kernels.attention.eight_bits.int8` makes of the keys and values of a span. Codes of
values are exact in 16 bits: the second product takes them beside weights in the dtype of the queries (float32 ones as
tf32), and its sums count in their scales. One launch takes all spans, behind the exact pieces.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxq.kernels.arguments import AttentionPacked
from fxq.kernels.attention.codecs import codecs_of
from fxq.kernels.attention.eight_bits.int8 import VALUE_BLOCK, key_mean
from fxq.kernels.attention.eight_bits.triton_int8 import LEAST_SCALE, LEAST_SIZE, Queries, begun, result, weights_of
from fxq.kernels.attention.eight_bits.triton_int8 import launch as launch_piece
from fxq.kernels.attention.spans import tokens_held
from fxq.kernels.attention.triton import State, Tile
from fxq.kernels.attention.triton_numbers import as_it_lies
from fxq.kernels.jit import Block, Pointer, Scalar, constant, constexpr, jit, tl, triton

LEAST_UNIT = constant(LEAST_SCALE)

TO_BFLOAT16 = constant("""{
    .reg .b32 codes, a, b, c, d;
    .reg .f32 e, f, g, h;
    xor.b32 codes, $2, 0x80808080;
    prmt.b32 a, codes, 0x4B000000, 0x7440;
    prmt.b32 b, codes, 0x4B000000, 0x7441;
    prmt.b32 c, codes, 0x4B000000, 0x7442;
    prmt.b32 d, codes, 0x4B000000, 0x7443;
    mov.b32 e, a;
    mov.b32 f, b;
    mov.b32 g, c;
    mov.b32 h, d;
    sub.rn.f32 e, e, 0f4B000080;
    sub.rn.f32 f, f, 0f4B000080;
    sub.rn.f32 g, g, 0f4B000080;
    sub.rn.f32 h, h, 0f4B000080;
    cvt.rn.bf16x2.f32 $0, f, e;
    cvt.rn.bf16x2.f32 $1, h, g;
}""")
"""Four codes become the last bits of ``2**23 + 128 + code``, in float32, from which that number is taken off."""

TO_FLOAT16 = constant("""{
    .reg .b32 codes, a, b, c;
    xor.b32 codes, $2, 0x80808080;
    mov.b32 c, 0x64806480;
    prmt.b32 a, codes, 0x64646464, 0x4140;
    prmt.b32 b, codes, 0x64646464, 0x4342;
    sub.rn.f16x2 $0, a, c;
    sub.rn.f16x2 $1, b, c;
}""")
"""As above, of ``1024 + 128 + code`` in float16, two at a time."""


def tile_of(dtype: torch.dtype, arch: int) -> Tile:
    """The tile that spills nothing on ``sm_{arch}`` and fits 99 KiB of shared memory, heads of 128 channels."""
    if dtype == torch.float32:
        return Tile(64, 32, 4, 1)
    return Tile(64, 64, 4, 2) if 100 <= arch < 120 else Tile(128, 64, 8, 2)


@jit
def floats(codes: Block, TYPE: constexpr, PTX: constexpr) -> Block:
    """Codes int8 as floats, exactly.

    Before sm_90 the compiler would convert the right side of a product behind shared memory, once in every warp. What
    has side effects it does not move there.
    """
    if PTX and tl.bfloat16 == TYPE:
        result = tl.inline_asm_elementwise(TO_BFLOAT16, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=False, pack=4)
    elif PTX and tl.float16 == TYPE:
        result = tl.inline_asm_elementwise(TO_FLOAT16, "=r,=r,r", [codes], dtype=tl.float16, is_pure=False, pack=4)
    else:
        result = codes.to(tl.float32).to(TYPE)
    return result


@jit
def unit_of(scales: Pointer, inside: Block) -> Block:
    """What sums count in while the values with these scales are added."""
    scale = tl.load(scales, mask=inside, other=1.0)
    return tl.where(scale < LEAST_UNIT, LEAST_UNIT, scale)  # NaN stays


@jit
def attention_stored_kernel(
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
    heads: Scalar,
    spans: Scalar,
    span: Scalar,
    skip: Scalar,
    k_batch: Scalar,
    k_scale_batch: Scalar,
    v_batch: Scalar,
    v_scale_batch: Scalar,
    SIZE: constexpr,
    D: constexpr,
    VALUES: constexpr,
    TYPE: constexpr,
    PTX: constexpr,
    FIRST: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
) -> None:
    """BLOCK_M rows of one head over all spans but their first ``skip`` tokens; ``lse`` [B, S, heads] is in base 2.

    ``q`` int8 [B, S, heads, SIZE] with the scale of its scores [B, S, heads], and the bias [B, heads, spans, S] that
    the mean of a span's keys gives; ``k`` and ``v`` int8 [B, spans * span, heads, SIZE], ``k_scale`` [B, spans * span,
    heads], ``v_scale`` [B, spans, blocks of VALUES tokens of a span, heads, SIZE]. A tile of BLOCK_N tokens, a divisor
    of VALUES, is of one block. Sums count in the scales of the block that is read, so one tile of them is enough.
    ``out`` and ``lse`` are those of :func:`~fxq.kernels.attention.eight_bits.triton_int8.attention_int8_kernel`.
    """
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, D)
    tile = (row < S)[:, None] & (channel < SIZE)[None, :]
    line = (batch * S + row) * heads + head
    q = tl.load(q_ptr + line[:, None] * SIZE + channel[None, :], mask=tile, other=0)  # [BLOCK_M, D]
    factor = tl.load(q_scale_ptr + line, mask=row < S, other=0.0)
    out = out_ptr + line[:, None] * SIZE + channel[None, :]
    most, weight, sums = begun(out, lse_ptr + line, row < S, tile, FIRST)
    tiles = (span + BLOCK_N - 1) // BLOCK_N
    blocks = (span + VALUES - 1) // VALUES
    within = tl.arange(0, BLOCK_N)
    place = within[:, None] * (heads * SIZE) + channel[None, :]  # [BLOCK_N, D] from the first token of a tile
    k_ptr += batch * k_batch + head * SIZE
    k_scale_ptr += batch * k_scale_batch + head
    v_ptr += batch * v_batch + head * SIZE
    v_scale_ptr += batch * v_scale_batch + head * SIZE
    bias_ptr += (batch * heads + head) * spans * S
    begin = skip // BLOCK_N
    unit = tl.full((D,), 1.0, tl.float32)
    for step in range(begin, spans * tiles):
        number = step // tiles
        start = (step - number * tiles) * BLOCK_N
        if (start % VALUES == 0) | (step == begin):
            block = v_scale_ptr + (number * blocks + start // VALUES) * heads * SIZE
            before, unit = unit, unit_of(block + channel, channel < SIZE)
            sums = sums * (before / unit)[None, :]
        first = (number * span + start).to(tl.int64) * heads
        inside = (start + within < span) & (number * span + start + within >= skip)
        mask = inside[:, None] & (channel < SIZE)[None, :]
        keys = tl.load(k_ptr + first * SIZE + place, mask=mask, other=0)
        scale = tl.load(k_scale_ptr + first + within * heads, mask=inside, other=0.0)
        bias = tl.load(bias_ptr + number * S + row, mask=row < S, other=0.0)
        sums_of_codes = tl.dot(q, tl.trans(keys), out_dtype=tl.int32)  # [BLOCK_M, BLOCK_N]
        scores = sums_of_codes.to(tl.float32) * (factor[:, None] * scale[None, :]) + bias[:, None]
        scores = tl.where(inside[None, :], scores, float("-inf"))
        chance, shrink, most = weights_of(scores, most)
        weight = weight * shrink + tl.sum(chance, 1)
        values = tl.load(v_ptr + first * SIZE + place, mask=mask, other=0)
        sums = tl.dot(chance.to(TYPE), floats(values, TYPE, PTX), sums * shrink[:, None], input_precision="tf32")
    tl.store(out, sums * unit[None, :] / weight[:, None], mask=tile)
    tl.store(lse_ptr + line, most + tl.log2(weight), mask=row < S)


def attend(a: AttentionPacked, arch: int) -> Tensor:
    """As ``fxq::attention_packed`` of integers, for heads of at most MOST_SIZE channels.

    Args:
        a: the call.
        arch: of the current device, 90 for sm_90.
    """
    batch, rows, heads, size = a.q.shape
    if not a.q.numel():
        return a.q.new_empty((batch, rows, heads * size))
    queries, state, first = Queries.of(a.q), State.empty(a.q), True
    for k, v in zip(a.k, a.v, strict=True):
        if k.shape[1]:
            launch_piece(queries, k, v, key_mean(k), state, first)
            first = False
    if tokens_held(a, "keys"):
        launch(queries, a, state, first, arch)
        first = False
    return result(state, first, a.q.dtype)


def launch(queries: Queries, a: AttentionPacked, state: State, first: bool, arch: int) -> None:
    """Add all spans of a call to the state on the current device.

    Args:
        queries: of the call, as codes.
        a: the call.
        state: written; read before unless ``first``.
        first: whether nothing came before.
        arch: of the device, 90 for sm_90.
    """
    batch, rows, heads, size = a.q.shape
    keys, values = (
        {field.name: tensor for field, tensor in zip(codec.stored(heads, size, a.span), tensors, strict=True)}
        for codec, tensors in zip(codecs_of(a.codec), (a.packed_k, a.packed_v), strict=True)
        if codec is not None
    )
    spans = keys["mean"].shape[1]
    read = [as_it_lies(x) for x in (keys["codes"], keys["scale"], values["codes"], values["scale"])]
    tile = tile_of(a.q.dtype, arch)
    attention_stored_kernel[(triton.cdiv(rows, tile.rows), batch * heads)](
        queries.codes,
        queries.scale,
        queries.bias(keys["mean"]),
        *read,
        *state,
        S=rows,
        heads=heads,
        spans=spans,
        span=a.span,
        skip=-a.cos.shape[0] % a.span,
        k_batch=read[0].stride(0),
        k_scale_batch=read[1].stride(0),
        v_batch=read[2].stride(0),
        v_scale_batch=read[3].stride(0),
        SIZE=size,
        D=max(LEAST_SIZE, triton.next_power_of_2(size)),
        VALUES=VALUE_BLOCK,
        TYPE=type_of(a.q.dtype),
        PTX=a.q.is_cuda,
        FIRST=first,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def type_of(dtype: torch.dtype) -> Any:
    """Triton's name of a float dtype."""
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
