"""The Triton kernel behind ``dual_scale_linear_per_token`` and its float8 twin.

It multiplies int8, with weights of 4 bits too, or float8, whose sums are float32.
With two groups it has two sums: that of the outliers becomes float32, scaled, before the normal channels begin. Row
scales forbid the rescaled integer of :mod:`fxq.kernels.gemm.triton_kernel`: its ratio has no bound known in advance.
Zero points of rows need the sums of the weight's integers, which a kernel of its own adds up before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq.kernels.arguments import Operands
from fxq.kernels.gemm.tiles import Tiles, choose
from fxq.kernels.gemm.triton import STORE, Epilogue, weight_rows
from fxq.kernels.gemm.triton_epilogue import gated_sum
from fxq.kernels.gemm.triton_kernel import accumulate
from fxq.kernels.jit import Block, Pointer, Scalar, constexpr, jit, tl, triton
from fxq.kernels.rows import flat_rows

SUMS_BLOCK = (8, 256)
"""Outputs, and stored elements of each, that a program adds up at a time."""

ADDS = ("residual_ptr", "gate_ptr", "residual_stride", "gate_stride", "frame_rows", "GATED")
"""Arguments of an epilogue that the kernel has."""


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
def weight_sums_kernel(
    w_ptr: Pointer,
    sums_ptr: Pointer,
    N: Scalar,
    w_stride: Scalar,
    w_width: Scalar,
    w_split: Scalar,
    PACKED: constexpr,
    BLOCK_N: constexpr,
    BLOCK_K: constexpr,
) -> None:
    """Sums of the integers of BLOCK_N outputs and one group, of int32 [G, N]."""
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    start = tl.where(group == 0, 0, w_split)
    stop = tl.where(group == 0, w_split, w_width)
    rows = w_ptr + outputs.to(tl.int64)[:, None] * w_stride
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.int32)
    for k in range(start, stop, BLOCK_K):
        stored = k + tl.arange(0, BLOCK_K)
        w = tl.load(rows + stored[None, :], mask=(outputs < N)[:, None] & (stored < stop)[None, :], other=0)
        if PACKED:
            # Both nibbles are in two's complement.
            high = w.to(tl.int8, bitcast=True).to(tl.int32)
            total += (high >> 4) + ((high << 28) >> 28)
        else:
            total += w.to(tl.int32)
    tl.store(sums_ptr + group * N + outputs, tl.sum(total, 1), mask=outputs < N)


@jit
def _without_zeros(acc: Block, zero: Block, sums: Block, SWAPPED: constexpr) -> Block:
    """A tile of sums less its rows' zero points times the sums of the weight."""
    # As ``_scaled``. Integers wrap around, and the difference fits: at most 255 * 128 * 2**16.
    zero = zero.to(tl.int32)
    return acc - (sums[:, None] * zero[None, :] if SWAPPED else sums[None, :] * zero[:, None])


@jit
def _in_units(
    acc: Block,
    weight_scale_ptr: Pointer,
    input_scale_ptr: Pointer,
    sums_ptr: Pointer,
    rows: Block,
    columns: Block,
    M: Scalar,
    N: Scalar,
    GROUP: constexpr,
    GROUPS: constexpr,
    ASYMMETRIC: constexpr,
    PACKED: constexpr,
    SWAPPED: constexpr,
) -> Block:
    """Float32 of a tile of sums of one group, without the zero points of its rows, in units of the result."""
    # input_scale is [M, COLUMNS], weight_scale [G, N]: value of an integer of a row, and of one of a column.
    COLUMNS: constexpr = 2 * GROUPS if ASYMMETRIC else GROUPS
    if ASYMMETRIC:
        STEPS: constexpr = 16 if PACKED else 1
        zero = tl.load(input_scale_ptr + rows * COLUMNS + GROUPS + GROUP, mask=rows < M, other=0.0)  # [BLOCK_M]
        sums = tl.load(sums_ptr + GROUP * N + columns, mask=columns < N, other=0) * STEPS  # [BLOCK_N]
        acc = _without_zeros(acc, zero, sums, SWAPPED)
    UNIT: constexpr = 0.0625 if PACKED else 1.0  # nibbles enter the product 16 times too large
    # A row that is not finite has the scale NaN, and so is all of its result: it needs no mark.
    row_scale = tl.load(input_scale_ptr + rows * COLUMNS + GROUP, mask=rows < M, other=0.0)  # [BLOCK_M]
    column_scale = tl.load(weight_scale_ptr + GROUP * N + columns, mask=columns < N, other=0.0) * UNIT  # [BLOCK_N]
    return _scaled(acc, row_scale, column_scale, SWAPPED)


@jit
def linear_per_token_kernel(
    q_ptr: Pointer,
    w_ptr: Pointer,
    weight_scale_ptr: Pointer,
    input_scale_ptr: Pointer,
    offset_ptr: Pointer,
    sums_ptr: Pointer,
    y_ptr: Pointer,
    residual_ptr: Pointer,
    gate_ptr: Pointer,
    M: Scalar,
    N: Scalar,
    q_stride: Scalar,
    w_stride: Scalar,
    w_width: Scalar,
    w_split: Scalar,
    residual_stride: Scalar,
    gate_stride: Scalar,
    frame_rows: Scalar,
    DUAL: constexpr,
    ASYMMETRIC: constexpr,
    ADDED: constexpr,
    GATED: constexpr,
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

    Sizes and SWAPPED as in :func:`fxq.kernels.gemm.triton_kernel.linear_kernel`. ``sums_ptr`` is None but for
    ASYMMETRIC, residual and gate but for ADDED.
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
    GROUPS: constexpr = 2 if DUAL else 1
    HEIGHT: constexpr = BLOCK_N if SWAPPED else BLOCK_M
    WIDTH: constexpr = BLOCK_M if SWAPPED else BLOCK_N

    TOTAL: constexpr = tl.int32 if q_ptr.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.zeros((HEIGHT, WIDTH), dtype=TOTAL)
    if DUAL:
        acc = accumulate(acc, q_rows, w_rows, w_split, w_width, BLOCK_OUTLIER, PACKED, SWAPPED, PTX)
        outlier = _in_units(
            acc, weight_scale_ptr, input_scale_ptr, sums_ptr, rows, columns, M, N,
            1, GROUPS, ASYMMETRIC, PACKED, SWAPPED,
        )  # fmt: skip
        acc = tl.zeros((HEIGHT, WIDTH), dtype=TOTAL)
    acc = accumulate(acc, q_rows, w_rows, 0, w_split, BLOCK_K, PACKED, SWAPPED, PTX)
    y = _in_units(
        acc, weight_scale_ptr, input_scale_ptr, sums_ptr, rows, columns, M, N,
        0, GROUPS, ASYMMETRIC, PACKED, SWAPPED,
    )  # fmt: skip
    if DUAL:
        y += outlier
    if SWAPPED:
        y = tl.trans(y)  # [BLOCK_M, BLOCK_N]
    y += tl.load(offset_ptr + columns, mask=columns < N, other=0.0)[None, :]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    if ADDED:
        y = gated_sum(y, mask, rows, columns, residual_ptr, gate_ptr, residual_stride, gate_stride, frame_rows, GATED)
    pointers = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(pointers, y.to(y_ptr.dtype.element_ty), mask=mask)


def weight_sums(weight: Tensor, width: int, split: int) -> Tensor:
    """int32 [G, N], on the current device: sums of an int8 [N, K] or packed uint8 [N, K / 2] weight of contiguous rows.

    Args:
        weight: as it is stored.
        width: input channels K.
        split: number of normal channels.
    """
    outputs, stored = weight.shape
    sums = torch.empty(1 if split == width else 2, outputs, dtype=torch.int32, device=weight.device)
    weight_sums_kernel[(triton.cdiv(outputs, SUMS_BLOCK[0]), len(sums))](
        weight,
        sums,
        N=outputs,
        w_stride=weight.stride(0),
        w_width=stored,
        w_split=split * stored // width,
        PACKED=stored < width,
        BLOCK_N=SUMS_BLOCK[0],
        BLOCK_K=SUMS_BLOCK[1],
    )
    return sums


def linear(a: Operands, out: Tensor, *, tiles: Tiles, epilogue: Epilogue = STORE) -> Tensor:
    """Run the Triton kernel on the current device.

    Args:
        a: of the product, with the input scales [..., G or 2 G].
        out: contiguous [..., N], filled and returned.
        tiles: of the programs.
        epilogue: :data:`fxq.kernels.gemm.triton.STORE` or that of :func:`fxq.kernels.gemm.triton.adding`.

    Raises:
        ValueError: when the weight is laid out for the CPU kernel.
    """
    rows, weight = flat_rows(a.q), weight_rows(a)
    if out.numel():
        grid = (triton.cdiv(rows.shape[0], tiles.block_m) * triton.cdiv(a.outputs, tiles.block_n),)
        linear_per_token_kernel[grid](
            rows,
            weight,
            a.weight_scale.contiguous(),
            a.input_scale.contiguous(),
            a.offset.contiguous(),
            weight_sums(weight, a.width, a.split) if a.asymmetric else None,
            out,
            M=rows.shape[0],
            N=a.outputs,
            q_stride=rows.stride(0),
            w_stride=weight.stride(0),
            w_width=weight.shape[1],
            w_split=a.split // 2 if a.packed else a.split,
            DUAL=a.split < a.width,
            ASYMMETRIC=a.asymmetric,
            PACKED=a.packed,
            PTX=rows.is_cuda,
            ADDED=epilogue.operation == "add",
            **{name: epilogue.arguments[name] for name in ADDS},
            **tiles.constants(),
        )
    return out


def linear_tiled(a: Operands, out: Tensor, epilogue: Epilogue = STORE) -> Tensor:
    """:func:`linear` on the device that holds q, with the tiles of its architecture."""
    with torch.cuda.device(a.q.device):
        major, minor = torch.cuda.get_device_capability()
        single = "asymmetric" if a.asymmetric else "per_token"
        single = single if a.q.dtype == torch.int8 else "fp8_per_token"
        operation = "per_token_dual" if a.split < a.width else single
        operation += "_add" if epilogue.operation == "add" else ""
        rows = out.numel() // max(1, a.outputs)
        tiles = choose(rows, a.outputs, a.width, 10 * major + minor, packed=a.packed, operation=operation)
        return linear(a, out, tiles=tiles, epilogue=epilogue)
