"""Stored keys or values inside Triton kernels: a tile of one head's tokens as float32, decoded in registers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxq.kernels.attention.forms import Blocks, Numbers
from fxq.kernels.jit import Block, Pointer, Scalar, constant, constexpr, jit, tl


class Stored(NamedTuple):
    """One side of attention, keys or values, as a kernel takes it: a tuple whose upper-case fields are compile-time.

    Float8 comes as its bytes. Inner axes are contiguous, so tensors have a stride of their own for the batch alone.

    Attributes:
        x: numbers [B, tokens, heads, SIZE] in a float dtype, or bytes of codes [B, tokens, heads, packed].
        scale: [B, tokens / TOKENS, heads, SIZE / CHANNELS] or None.
        zero: as ``scale`` or None.
        ids: bytes [B, tokens, packed] of ``heads * STAGES`` numbers, or None.
        centroids: bfloat16 [B, spans, STAGES, heads, CENTROIDS, SIZE] or None.
        x_batch: stride.
        scale_batch: stride.
        zero_batch: stride.
        ids_batch: stride.
        ids_row: bytes of a token's ids.
        centroids_batch: stride.
        first: token of ``x`` that a kernel's token 0 is.
        span: tokens of a span.
        BITS: of a code; 0: numbers.
        OFFSET: of a code.
        CHANNELS: that share a scale.
        TOKENS: that share a scale.
        STAGES: of centroids.
        CENTROIDS: of a stage.
        ID_BITS: of an id.
    """

    x: Any
    scale: Any
    zero: Any
    ids: Any
    centroids: Any
    x_batch: Any
    scale_batch: Any
    zero_batch: Any
    ids_batch: Any
    ids_row: Any
    centroids_batch: Any
    first: Any
    span: Any
    BITS: Any
    OFFSET: Any
    CHANNELS: Any
    TOKENS: Any
    STAGES: Any
    CENTROIDS: Any
    ID_BITS: Any


def stored(form: Numbers | Blocks, tensors: Mapping[str, Tensor], span: int, first: int = 0) -> Stored:
    """What a kernel takes for the tensors of a form, from token ``first`` on.

    Args:
        form: of the codec, or ``Numbers()`` of dense tokens.
        tensors: by name, as the form names them.
        span: tokens of a span.
        first: number of tokens to leave out.
    """
    x = as_it_lies(tensors["x" if isinstance(form, Numbers) else "codes"])
    batch, _, heads, size = x.shape
    scale, zero, ids, centroids = (tensors.get(name) for name in ("scale", "zero", "ids", "centroids"))
    if isinstance(form, Numbers):
        blocks = Blocks(0, 0, size, form.tokens or 1, id_bits=8)
        scale = None if scale is None else scale.view(batch, -1, heads, 1)
    else:
        blocks = form
        lead = 1 if form.tokens == 1 else 2  # groups of tokens lie in an axis behind the spans
        scale, zero = (None if t is None else t.flatten(1, lead) for t in (scale, zero))
    parts = [None if t is None else as_it_lies(t) for t in (scale, zero, ids, centroids)]
    strides = [0 if t is None else t.stride(0) for t in (x, *parts)]
    row = 0 if ids is None else ids.shape[2]
    return Stored._make((x, *parts, *strides[:4], row, strides[4], first, span, *map(constant, blocks)))


def as_it_lies(x: Tensor) -> Tensor:
    """The tensor [B, rows, ...], float8 as bytes, with all axes but the batch contiguous; a copy where they are not."""
    x = x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
    return x if x[:1].is_contiguous() else x.contiguous()


@jit
def as_float32(x: Block) -> Block:
    """Float32 of numbers, of float8_e4m3fn in bytes too, which not every architecture converts itself."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.int32)
        most = bits & 0x7F
        # Exponent and mantissa as in float32, whose bias is 120 more; what is subnormal counts steps of 2**-9.
        value = ((most << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        value = tl.where(most < 8, most.to(tl.float32) * 0.001953125, value)
        value = tl.where(most == 0x7F, float("nan"), value)
        result = tl.where(bits > 0x7F, -value, value)
    else:
        result = x.to(tl.float32)
    return result


@jit
def _unpacked(
    pointer: Pointer, x: Stored, row: Block, head: Scalar, inside: Block, SIZE: constexpr, D: constexpr
) -> Block:
    """int32 codes [BLOCK, D] of the rows of bytes [BLOCK]."""
    PER: constexpr = 8 // x.BITS
    PACKED: constexpr = (SIZE + PER - 1) // PER
    byte = tl.arange(0, D // PER)
    place = row[:, None] * PACKED + head * PACKED + byte[None, :]
    # [BLOCK, D / PER] whole bytes, then the codes inside each: [BLOCK, D / PER, PER].
    codes = tl.load(pointer + place, mask=inside[:, None] & (byte < PACKED)[None, :], other=0).to(tl.int32)
    if PER > 1:
        shift = tl.arange(0, PER) * x.BITS
        codes = (codes[:, :, None] >> shift[None, None, :]) & (2**x.BITS - 1)
        codes = tl.reshape(codes, (row.shape[0], D))
    return codes


@jit
def _factors(
    pointer: Pointer, x: Stored, row: Block, head: Scalar, heads: Scalar, inside: Block, SIZE: constexpr, D: constexpr
) -> Block:
    """Float32 scales, or zeros, [BLOCK, D] of the rows of scales [BLOCK]."""
    COLUMNS: constexpr = SIZE // x.CHANNELS
    start = (row * heads + head) * COLUMNS
    if (x.CHANNELS & (x.CHANNELS - 1)) == 0:
        # Each once, [BLOCK, D / CHANNELS], then spread over its channels.
        WIDE: constexpr = D // x.CHANNELS
        column = tl.arange(0, WIDE)
        mask = inside[:, None] & (column < COLUMNS)[None, :]
        one = as_float32(tl.load(pointer + start[:, None] + column[None, :], mask=mask, other=0))
        spread = tl.broadcast_to(one[:, :, None], (row.shape[0], WIDE, x.CHANNELS))
        result = tl.reshape(spread, (row.shape[0], D))
    else:
        column = tl.arange(0, D)
        mask = inside[:, None] & (column < SIZE)[None, :]
        result = as_float32(tl.load(pointer + start[:, None] + (column // x.CHANNELS)[None, :], mask=mask, other=0))
    return result


@jit
def numbers(
    x: Stored, batch: Scalar, token: Block, head: Scalar, heads: Scalar, inside: Block, SIZE: constexpr, D: constexpr
) -> Block:
    """Float32 [BLOCK, D] of the tokens [BLOCK] of a head, 0 where not ``inside`` and from channel SIZE on.

    Args:
        x: what is stored.
        batch: int64 number of the video.
        token: counted from ``x.first`` on.
        head: number.
        heads: how many.
        inside: [BLOCK].
        SIZE: channels of a head.
        D: the next power of two.
    """
    token = (token + x.first).to(tl.int64)
    channel = tl.arange(0, D)
    mask = inside[:, None] & (channel < SIZE)[None, :]
    if x.BITS == 0:
        place = (token * heads)[:, None] * SIZE + head * SIZE + channel[None, :]
        value = as_float32(tl.load(x.x + batch * x.x_batch + place, mask=mask, other=0))
    else:
        codes = _unpacked(x.x + batch * x.x_batch, x, token * heads, head, inside, SIZE, D)
        value = (codes - x.OFFSET).to(tl.float32)
    if x.scale is not None:
        row = token // x.TOKENS
        value = value * _factors(x.scale + batch * x.scale_batch, x, row, head, heads, inside, SIZE, D)
        if x.zero is not None:
            value = value + _factors(x.zero + batch * x.zero_batch, x, row, head, heads, inside, SIZE, D)
    for stage in tl.static_range(x.STAGES):
        # A token's ids of all heads and stages lie together; an id is followed to a row of bfloat16: [BLOCK, D].
        bit = (head * x.STAGES + stage) * x.ID_BITS
        packed = tl.load(x.ids + batch * x.ids_batch + token * x.ids_row + bit // 8, mask=inside, other=0).to(tl.int32)
        name = tl.minimum((packed >> (bit % 8)) & (2**x.ID_BITS - 1), x.CENTROIDS - 1)
        row = ((token // x.span * x.STAGES + stage) * heads + head) * x.CENTROIDS + name
        place = batch * x.centroids_batch + row[:, None] * SIZE + channel[None, :]
        value = value + tl.load(x.centroids + place, mask=mask, other=0).to(tl.float32)
    return value
