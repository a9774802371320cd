"""The Triton kernel behind ``dual_scale_linear_per_token``.

With two groups it has two sums: that of the outliers becomes float32, scaled, before the normal channels begin. Row
scales forbid the rescaled integer of :mod:`fxq.kernels.gemm.triton_kernel`: its ratio has no bound known in advance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq.kernels.arguments import Operands
from fxq.kernels.gemm.tiles import Tiles, choose
from fxq.kernels.gemm.triton_kernel import accumulate
from fxq.kernels.jit import Block, Pointer, Scalar, constexpr, jit, tl, triton
from fxq.kernels.rows import flat_rows


@jit
def _scaled(acc: Block, row_scale: Block, column_scale: Block, SWAPPED: constexpr) -> Block:
    """Float32 of a tile of sums in units of the result, in the tile's own orientation."""
    # [BLOCK_N, BLOCK_M] or [BLOCK_M, BLOCK_N]; the column's scale first, as the reference multiplies.
    if SWAPPED:
        y = acc.to(tl.float32) * column_scale[:, None] * row_scale[None, :]
    else:
        y = acc.to(tl.float32) * column_scale[None, :] * row_scale[:, None]
    return y


@jit
def linear_per_token_kernel(
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
    SWAPPED: constexpr,
    PTX: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_K: constexpr,
    BLOCK_OUTLIER: constexpr,
    GROUP_M: constexpr,
) -> None:
    """One [BLOCK_M, BLOCK_N] tile of y.

    Sizes and SWAPPED as in :func:`fxq.kernels.gemm.triton_kernel.linear_kernel`.
    """
    program = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first = program // (GROUP_M * blocks_n) * GROUP_M
    height = min(blocks_m - first, GROUP_M)
    within = program % (GROUP_M * blocks_n)
    rows = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    # [BLOCK_M] and [BLOCK_N] pointers that wrap around, so that the loads of the product need no mask for them.
    q_rows = q_ptr + (rows % M).to(tl.int64) * q_stride
    w_rows = w_ptr + (columns % N).to(tl.int64) * w_stride
    in_rows = rows < M
    in_columns = columns < N
    GROUPS: constexpr = 2 if DUAL else 1
    UNIT: constexpr = 0.0625 if PACKED else 1.0  # nibbles enter the product 16 times too large
    HEIGHT: constexpr = BLOCK_N if SWAPPED else BLOCK_M
    WIDTH: constexpr = BLOCK_M if SWAPPED else BLOCK_N

    acc = tl.zeros((HEIGHT, WIDTH), dtype=tl.int32)
    if DUAL:
        acc = accumulate(acc, q_rows, w_rows, w_split, w_width, BLOCK_OUTLIER, PACKED, SWAPPED, PTX)
        # input_scale is [M, 2], weight_scale [2, N]: value of an integer of a row, and of one of a column.
        row_scale = tl.load(input_scale_ptr + rows * 2 + 1, mask=in_rows, other=0.0)
        column_scale = tl.load(weight_scale_ptr + N + columns, mask=in_columns, other=0.0) * UNIT
        outlier = _scaled(acc, row_scale, column_scale, SWAPPED)  # [HEIGHT, WIDTH] float32
        acc = tl.zeros((HEIGHT, WIDTH), dtype=tl.int32)
    acc = accumulate(acc, q_rows, w_rows, 0, w_split, BLOCK_K, PACKED, SWAPPED, PTX)
    # A row that is not finite has the scale NaN, and so is all of its result: it needs no mark.
    row_scale = tl.load(input_scale_ptr + rows * GROUPS, mask=in_rows, other=0.0)  # [BLOCK_M]
    column_scale = tl.load(weight_scale_ptr + columns, mask=in_columns, other=0.0) * UNIT  # [BLOCK_N]
    y = _scaled(acc, row_scale, column_scale, SWAPPED)
    if DUAL:
        y += outlier
    if SWAPPED:
        y = tl.trans(y)  # [BLOCK_M, BLOCK_N]
    y += tl.load(offset_ptr + columns, mask=in_columns, other=0.0)[None, :]
    pointers = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(pointers, y.to(y_ptr.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def linear(a: Operands, out: Tensor, *, tiles: Tiles) -> Tensor:
    """Run the Triton kernel on the current device.

    Args:
        a: of the product, with the input scales [..., G].
        out: contiguous [..., N], filled and returned.
        tiles: of the programs.
    """
    rows = flat_rows(a.q)
    weight = a.weight if a.weight.stride(1) == 1 else a.weight.contiguous()
    if out.numel():
        grid = (triton.cdiv(rows.shape[0], tiles.block_m) * triton.cdiv(a.outputs, tiles.block_n),)
        linear_per_token_kernel[grid](
            rows,
            weight,
            a.weight_scale.contiguous(),
            a.input_scale.contiguous(),
            a.offset.contiguous(),
            out,
            M=rows.shape[0],
            N=a.outputs,
            q_stride=rows.stride(0),
            w_stride=weight.stride(0),
            w_width=weight.shape[1],
            w_split=a.split // 2 if a.packed else a.split,
            DUAL=a.split < a.width,
            PACKED=a.packed,
            PTX=rows.is_cuda,
            **tiles.constants(),
        )
    return out


def linear_tiled(a: Operands, out: Tensor) -> Tensor:
    """:func:`linear` on the device that holds q, with the tiles of its architecture."""
    with torch.cuda.device(a.q.device):
        major, minor = torch.cuda.get_device_capability()
        operation = "per_token_dual" if a.split < a.width else "per_token"
        rows = out.numel() // max(1, a.outputs)
        tiles = choose(rows, a.outputs, a.width, 10 * major + minor, packed=a.packed, operation=operation)
        return linear(a, out, tiles=tiles)
