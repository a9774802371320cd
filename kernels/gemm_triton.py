"""The Triton kernel behind ``dual_scale_linear`` and its launch.

It keeps one int32 accumulator. It adds up the outlier segment first, multiplies the accumulator by
``ratio[n] = (s_x1 * s_w1[n]) / (s_x0 * s_w0[n])``, rounds, and goes on with the normal segment: a second accumulator
would spill. The rounding costs at most half a unit of ``s_x0 * s_w0[n]``, and the sum must stay inside int32:
``2**14 * (K_normal + max(ratio) * K_outlier) < 2**31``, for packed weights too, which enter as 16 times their value.
:func:`fxq.numerics.ratio_limit` is that bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq.kernels.jit import Block, Pointer, Scalar, constexpr, jit, tl, triton
from fxq.kernels.tiles import Tiles, choose


@jit
def _round(x: Block, PTX: constexpr) -> Block:
    """Nearest int32; floor(x + 0.5) would move integers above 2**23."""
    if PTX:
        result = tl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1)
    else:
        below = tl.floor(x)
        result = below.to(tl.int32) + (x - below >= 0.5).to(tl.int32)
    return result


@jit
def _low_nibble_x16(packed: Block, PTX: constexpr) -> Block:
    """16 * low nibble, int8. LLVM takes int8 shifts apart byte by byte; on four packed bytes it is two instructions."""
    if PTX:
        result = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
            "=r,r",
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        result = (packed << 4).to(tl.int8)
    return result


@jit
def _accumulate(
    acc: Block,
    q_rows: Pointer,
    w_rows: Pointer,
    start: Scalar,
    stop: Scalar,
    BLOCK_K: constexpr,
    PACKED: constexpr,
    PTX: constexpr,
) -> Block:
    """Add one segment of the product; start and stop count the stored bytes of a weight row."""
    if PACKED:
        # Byte j of a block of 16 holds channels j and j + 16 of a block of 32; both nibbles stay 16 times too large.
        byte = tl.arange(0, BLOCK_K // 2)
        channel = byte // 16 * 32 + byte % 16
        for k in range(start, stop, BLOCK_K // 2):
            inside = k + byte < stop
            w = tl.load(w_rows[None, :] + (k + byte)[:, None], mask=inside[:, None], other=0).to(tl.int8, bitcast=True)
            low = tl.load(q_rows[:, None] + (2 * k + channel)[None, :], mask=inside[None, :], other=0)
            high = tl.load(q_rows[:, None] + (2 * k + channel + 16)[None, :], mask=inside[None, :], other=0)
            acc = tl.dot(low, _low_nibble_x16(w, PTX), acc, out_dtype=tl.int32)
            acc = tl.dot(high, (w & -16).to(tl.int8), acc, out_dtype=tl.int32)
    else:
        offsets = tl.arange(0, BLOCK_K)
        for k in range(start, stop, BLOCK_K):
            inside = k + offsets < stop
            w = tl.load(w_rows[None, :] + (k + offsets)[:, None], mask=inside[:, None], other=0)
            q = tl.load(q_rows[:, None] + (k + offsets)[None, :], mask=inside[None, :], other=0)
            acc = tl.dot(q, w, acc, out_dtype=tl.int32)
    return acc


@jit
def linear_kernel(
    q_ptr: Pointer,
    w_ptr: Pointer,
    weight_scale_ptr: Pointer,
    input_scale_ptr: Pointer,
    offset_ptr: Pointer,
    y_ptr: Pointer,
    M: Scalar,
    N: Scalar,
    q_stride: Scalar,
    w_stride: Scalar,
    w_width: Scalar,
    w_split: Scalar,
    DUAL: constexpr,
    PACKED: constexpr,
    PTX: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_K: constexpr,
    BLOCK_OUTLIER: constexpr,
    GROUP_M: constexpr,
) -> None:
    """One [BLOCK_M, BLOCK_N] tile of y; w_width and w_split are a weight row's bytes, all and of the normal part."""
    program = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first = program // (GROUP_M * blocks_n) * GROUP_M
    height = min(blocks_m - first, GROUP_M)
    within = program % (GROUP_M * blocks_n)
    rows = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    q_rows = q_ptr + (rows % M).to(tl.int64) * q_stride
    w_rows = w_ptr + (columns % N).to(tl.int64) * w_stride
    in_columns = columns < N

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    unit = tl.load(input_scale_ptr) * tl.load(weight_scale_ptr + columns, mask=in_columns, other=1.0)
    if DUAL:
        acc = _accumulate(acc, q_rows, w_rows, w_split, w_width, BLOCK_OUTLIER, PACKED, PTX)
        outlier = tl.load(input_scale_ptr + 1) * tl.load(weight_scale_ptr + N + columns, mask=in_columns, other=1.0)
        scaled = acc.to(tl.float32) * tl.div_rn(outlier, unit)[None, :]
        acc = _round(scaled, PTX)
    acc = _accumulate(acc, q_rows, w_rows, 0, w_split, BLOCK_K, PACKED, PTX)
    if PACKED:
        unit = unit * 0.0625
    y = acc.to(tl.float32) * unit[None, :] + tl.load(offset_ptr + columns, mask=in_columns, other=0.0)[None, :]
    mask = (rows[:, None] < M) & in_columns[None, :]
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def launch(
    q: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    offset: Tensor,
    split: int,
    bits: int,
    dtype: torch.dtype,
    *,
    tiles: Tiles,
    out: Tensor | None = None,
) -> Tensor:
    """Run the Triton kernel on the current device; ``out`` [M, N] is allocated when it is not given."""
    width, outputs = q.shape[-1], weight.shape[0]
    rows = q.reshape(-1, width)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    y = torch.empty(rows.shape[0], outputs, dtype=dtype, device=q.device) if out is None else out
    if y.numel():
        grid = (triton.cdiv(rows.shape[0], tiles.block_m) * triton.cdiv(outputs, tiles.block_n),)
        linear_kernel[grid](
            rows,
            weight,
            weight_scale.contiguous(),
            input_scale.contiguous(),
            offset.contiguous(),
            y,
            rows.shape[0],
            outputs,
            rows.stride(0),
            weight.stride(0),
            weight.shape[1],
            split // 2 if bits <= 4 else split,
            DUAL=split < width,
            PACKED=bits <= 4,
            PTX=q.is_cuda,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            BLOCK_OUTLIER=tiles.block_outlier,
            GROUP_M=tiles.group_m,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return y.reshape(*q.shape[:-1], outputs)


def launch_chosen(
    q: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    offset: Tensor,
    split: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """:func:`launch` on the device that holds q, with the tiles of its architecture."""
    with torch.cuda.device(q.device):
        major, minor = torch.cuda.get_device_capability()
        tiles = choose(q.numel() // q.shape[-1], weight.shape[0], q.shape[-1], 10 * major + minor)
        return launch(q, weight, weight_scale, input_scale, offset, split, bits, dtype, tiles=tiles)
