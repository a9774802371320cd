"""Attention to stored keys and values in Triton: tiles are decoded, rotated and multiplied in registers.

One pass of the kernel takes dense tokens, or all encoded tokens that it can read itself, or one span that was decoded
before, and goes on from the result of the pass before it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxq.kernels.arguments import AttentionPacked
from fxq.kernels.attention.codecs import codecs_of
from fxq.kernels.attention.forms import Blocks, Form, Numbers, Planes
from fxq.kernels.attention.spans import Part, decoded, parts
from fxq.kernels.attention.triton_numbers import Stored, numbers, stored
from fxq.kernels.attention.triton_planes import dense
from fxq.kernels.jit import Block, Pointer, Scalar, constexpr, jit, tl, triton

MOST_SIZE = 128
"""Widest head whose sums, keys and values a program holds without spilling."""

LOG2_E = 1.4426950408889634


class Tile(NamedTuple):
    """Rows of queries and of keys that a program holds, its warps and the stages of its loads."""

    rows: int
    keys: int
    warps: int
    stages: int


def tile_of(dtype: torch.dtype, stages: int, fine: bool) -> Tile:
    """The tile that spills nothing and fits 99 KiB of shared memory.

    Args:
        dtype: of the queries; float32 is multiplied as three products of tf32, whose operands take registers.
        stages: of centroids, most of keys and values; loads of many are not pipelined.
        fine: whether keys or values are codes of 8 bits with a scale for less than FINE channels.
    """
    if dtype == torch.float32:
        return Tile(16, 16, 8, 1)
    return Tile(64, 32, 8, 1) if fine else Tile(128, 32, 8, 1 if stages > 1 else 2)


FINE = 16
"""Fewer channels than a thread loads codes of 8 bits at once."""


@jit
def rotated(
    x: Block, cos_ptr: Pointer, sin_ptr: Pointer, token: Block, inside: Block, SIZE: constexpr, D: constexpr
) -> Block:
    """The float32 tile [BLOCK, D] with neighbouring channels rotated by the tables [tokens, SIZE / 2]."""
    pair = tl.arange(0, D // 2)
    place = token.to(tl.int64)[:, None] * (SIZE // 2) + pair[None, :]
    mask = inside[:, None] & (pair < SIZE // 2)[None, :]
    cos = tl.load(cos_ptr + place, mask=mask, other=0.0)  # [BLOCK, D / 2]
    sin = tl.load(sin_ptr + place, mask=mask, other=0.0)
    even, odd = tl.split(tl.reshape(x, (token.shape[0], D // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (token.shape[0], D))


@jit
def attention_part_kernel(
    q_ptr: Pointer,
    cos_ptr: Pointer,
    sin_ptr: Pointer,
    out_ptr: Pointer,
    lse_ptr: Pointer,
    k: Stored,
    v: Stored,
    S: Scalar,
    tokens: Scalar,
    heads: Scalar,
    q_batch: Scalar,
    q_row: Scalar,
    q_head: Scalar,
    factor: Scalar,
    SIZE: constexpr,
    D: constexpr,
    ROTATE: constexpr,
    FIRST: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
) -> None:
    """BLOCK_M rows of one head over all tokens of a part; ``lse`` [B, S, heads] is in base 2.

    Unless it is the first part, ``out`` [B, S, heads, SIZE] and ``lse`` hold what the parts before gave: a sum of
    weights that is 1, at the largest score ``lse``.
    """
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, D)
    tile = (row < S)[:, None] & (channel < SIZE)[None, :]
    place = batch * q_batch + row.to(tl.int64)[:, None] * q_row + head * q_head + channel[None, :]
    q = tl.load(q_ptr + place, mask=tile, other=0.0)  # [BLOCK_M, D]
    line = (batch * S + row) * heads + head
    out = out_ptr + line[:, None] * SIZE + channel[None, :]
    if FIRST:
        most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        weight = tl.zeros((BLOCK_M,), tl.float32)
        sums = tl.zeros((BLOCK_M, D), tl.float32)
    else:
        most = tl.load(lse_ptr + line, mask=row < S, other=0.0)
        weight = tl.full((BLOCK_M,), 1.0, tl.float32)
        sums = tl.load(out, mask=tile, other=0.0)
    for start in range(0, tokens, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        inside = token < tokens
        # A key is rounded as it would be in a dense cache, before its rotation and after it.
        keys = numbers(k, batch, token, head, heads, inside, SIZE, D).to(q.dtype)  # [BLOCK_N, D]
        if ROTATE:
            keys = rotated(keys.to(tl.float32), cos_ptr, sin_ptr, token, inside, SIZE, D).to(q.dtype)
        scores = tl.dot(q, tl.trans(keys), input_precision="tf32x3") * factor  # [BLOCK_M, BLOCK_N]
        scores = tl.where(inside[None, :], scores, float("-inf"))
        above = tl.maximum(most, tl.max(scores, 1))
        # Where no key has a score yet nothing may be subtracted: infinity less infinity is NaN.
        base = tl.where(above == float("-inf"), 0.0, above)
        chance = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(most - base)
        values = numbers(v, batch, token, head, heads, inside, SIZE, D).to(q.dtype)  # [BLOCK_N, D]
        weight = weight * shrink + tl.sum(chance, 1)
        sums = tl.dot(chance.to(q.dtype), values, sums * shrink[:, None], input_precision="tf32x3")
        most = above
    tl.store(out, sums / weight[:, None], mask=tile)
    tl.store(lse_ptr + line, most + tl.log2(weight), mask=row < S)


class State(NamedTuple):
    """What the parts so far gave: float32 [B, S, heads, size], base-2 logarithms of all weights [B, S, heads]."""

    out: Tensor
    lse: Tensor

    @classmethod
    def empty(cls, q: Tensor) -> State:
        """Of nothing yet."""
        return cls(q.new_empty(q.shape, dtype=torch.float32), q.new_empty(q.shape[:3], dtype=torch.float32))


def launch(
    q: Tensor, k: Stored, v: Stored, tokens: int, state: State, first: bool, tables: tuple[Tensor, Tensor] | None
) -> None:
    """Add a part to the state on the current device.

    Args:
        q: float [B, S, heads, size].
        k: stored keys.
        v: stored values.
        tokens: of the part, counted from those that ``k`` and ``v`` begin with; at least one.
        state: written; read before unless it is the first part.
        first: whether it is.
        tables: cos and sin, float32 [tokens, size / 2], of keys that are not rotated yet; None: they are.
    """
    batch, rows, heads, size = q.shape
    q = q if q.stride(3) == 1 else q.contiguous()
    width = max(16, triton.next_power_of_2(size))
    fine = any(side.BITS.value == 8 and side.CHANNELS.value < FINE for side in (k, v))
    tile = tile_of(q.dtype, max(k.STAGES.value, v.STAGES.value), fine)
    cos, sin = (None, None) if tables is None else (t.contiguous() for t in tables)
    attention_part_kernel[(triton.cdiv(rows, tile.rows), batch * heads)](
        q,
        cos,
        sin,
        *state,
        k,
        v,
        S=rows,
        tokens=tokens,
        heads=heads,
        q_batch=q.stride(0),
        q_row=q.stride(1),
        q_head=q.stride(2),
        factor=size**-0.5 * LOG2_E,
        SIZE=size,
        D=width,
        ROTATE=tables is not None,
        FIRST=first,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def attend(a: AttentionPacked) -> Tensor:
    """As :func:`fxq.kernels.attention.encoded.packed.attention_packed`, for heads of at most MOST_SIZE channels."""
    if not a.q.numel():
        return a.q.new_empty((*a.q.shape[:2], a.q.shape[2] * a.q.shape[3]))
    state, first, plain = State.empty(a.q), True, Numbers()
    for k, v in zip(a.k, a.v, strict=True):
        if k.shape[1]:
            launch(a.q, stored(plain, {"x": k}, 1), stored(plain, {"x": v}, 1), k.shape[1], state, first, None)
            first = False
    for part in _passes(a):
        tables = (a.cos[part.first : part.last], a.sin[part.first : part.last]) if _rotates(a) else None
        keys, values = (_side(a, kind, part) for kind in ("keys", "values"))
        launch(a.q, keys, values, part.last - part.first, state, first, tables)
        first = False
    out = torch.zeros_like(state.out) if first else state.out
    return out.to(a.q.dtype).flatten(2)


def _rotates(a: AttentionPacked) -> bool:
    codec = codecs_of(a.codec)[0]
    return codec is not None and not codec.rotated


def _form(a: AttentionPacked, kind: str) -> Form | None:
    codec = codecs_of(a.codec)[kind == "values"]
    return Numbers() if codec is None else codec.form(a.q.shape[2], a.q.shape[3], a.span)


def _passes(a: AttentionPacked) -> list[Part]:
    """The spans, or all of them as one part where the kernel reads both what keys and what values store."""
    each = list(parts(a))
    if len(each) > 1 and all(isinstance(_form(a, kind), Numbers | Blocks) for kind in ("keys", "values")):
        return [each[0]._replace(last=each[-1].last)]
    return each


def _side(a: AttentionPacked, kind: str, part: Part) -> Stored:
    """Keys or values of a part from the span it begins with; decoded where the kernel cannot read them."""
    codec, form = codecs_of(a.codec)[kind == "values"], _form(a, kind)
    tensors = a.packed_k if kind == "keys" else a.packed_v
    if codec is None:
        return stored(Numbers(), {"x": tensors[0]}, a.span, part.first)
    if form is None:
        return stored(Numbers(), {"x": decoded(a, kind, part)}, a.span)
    batch, _, heads, size = a.q.shape
    named = {field.name: t for field, t in zip(codec.stored(heads, size, a.span), tensors, strict=True)}
    if isinstance(form, Planes):
        x = dense(form, named, part.number, (batch, a.span, heads, size), a.q)
        return stored(Numbers(), {"x": x}, a.span, part.skip)
    return stored(form, named, a.span, part.number * a.span + part.skip)
