"""What follows the product inside the Triton GEMM: scales and offset, then one of three ways to store."""

from __future__ import annotations

from fxq.kernels.device import to_int8
from fxq.kernels.jit import Block, Pointer, Scalar, constexpr, jit, tl


@jit
def _store_int8(
    y: Block,
    pointers: Pointer,
    mask: Block,
    columns: Block,
    out_scale_ptr: Pointer,
    out_zero_ptr: Pointer,
    out_split: Scalar,
    ACTIVATION: constexpr,
    OUT_DUAL: constexpr,
    LOW: constexpr,
    HIGH: constexpr,
) -> None:
    """Activation and the quantization of the next layer, one group of columns or two."""
    # Integers per unit of y: a scalar, or [1, columns] where the tile may lie across the border of the groups. The
    # quotient is rounded to nearest as the reference's reciprocal is, or integers would differ.
    inverse = tl.div_rn(1.0, tl.load(out_scale_ptr))
    zero = tl.load(out_zero_ptr)
    if OUT_DUAL:
        normal = columns < out_split
        inverse = tl.where(normal, inverse, tl.div_rn(1.0, tl.load(out_scale_ptr + 1)))[None, :]
        zero = tl.where(normal, zero, tl.load(out_zero_ptr + 1))[None, :]
    tl.store(pointers, to_int8(ACTIVATION(y), inverse, zero, LOW, HIGH), mask=mask)


@jit
def gated_sum(
    y: Block,
    mask: Block,
    rows: Block,
    columns: Block,
    residual_ptr: Pointer,
    gate_ptr: Pointer,
    residual_stride: Scalar,
    gate_stride: Scalar,
    frame_rows: Scalar,
    GATED: constexpr,
) -> Block:
    """``residual + gate * y``; frame_rows consecutive rows share a row of the gate."""
    if GATED:
        frames = gate_ptr + (rows // frame_rows).to(tl.int64) * gate_stride
        # [rows, columns]
        y = y * tl.load(frames[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    # int64: rows * stride may leave int32. The sum is float32, so 16-bit residuals are rounded once, at the store.
    residual = residual_ptr + rows.to(tl.int64) * residual_stride
    return y + tl.load(residual[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@jit
def finish(
    total: Block,
    rows: Block,
    columns: Block,
    weight_scale_ptr: Pointer,
    input_scale_ptr: Pointer,
    offset_ptr: Pointer,
    y_ptr: Pointer,
    out_scale_ptr: Pointer,
    out_zero_ptr: Pointer,
    residual_ptr: Pointer,
    gate_ptr: Pointer,
    M: Scalar,
    N: Scalar,
    out_split: Scalar,
    residual_stride: Scalar,
    gate_stride: Scalar,
    frame_rows: Scalar,
    PACKED: constexpr,
    EPILOGUE: constexpr,
    ACTIVATION: constexpr,
    OUT_DUAL: constexpr,
    LOW: constexpr,
    HIGH: constexpr,
    GATED: constexpr,
) -> None:
    """Scale a tile's sums, and all that follows."""
    # total, y, mask and pointers are [BLOCK_M, W], columns, unit and offset [W]; W is BLOCK_N or half of it.
    in_columns = columns < N
    unit = tl.load(input_scale_ptr) * tl.load(weight_scale_ptr + columns, mask=in_columns, other=1.0)
    if PACKED:
        unit = unit * 0.0625  # nibbles entered the product 16 times too large; exact
    offset = tl.load(offset_ptr + columns, mask=in_columns, other=0.0)
    # Sums above 2**24 round to float32 here, as they do in the reference.
    y = total.to(tl.float32) * unit[None, :] + offset[None, :]
    mask = (rows[:, None] < M) & in_columns[None, :]
    pointers = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    if EPILOGUE == "quantize":
        _store_int8(y, pointers, mask, columns, out_scale_ptr, out_zero_ptr, out_split, ACTIVATION, OUT_DUAL, LOW, HIGH)
    else:
        if EPILOGUE == "add":
            y = gated_sum(
                y, mask, rows, columns, residual_ptr, gate_ptr, residual_stride, gate_stride, frame_rows, GATED
            )
        tl.store(pointers, y.to(y_ptr.dtype.element_ty), mask=mask)
