"""The Triton kernel behind ``dual_scale_linear`` and the operators fused with it.

It keeps one accumulator. It adds up the outlier segment first, multiplies the accumulator by
``ratio[n] = (s_x1 * s_w1[n]) / (s_x0 * s_w0[n])``, and goes on with the normal segment: a second accumulator would
spill. Integers are rounded after the multiplication, which costs at most half a unit of ``s_x0 * s_w0[n]``, and their
sum must stay inside int32: ``2**14 * (K_normal + max(ratio) * K_outlier) < 2**31``, for packed weights too, which
enter as 16 times their value. :func:`fxq.numerics.ratio_limit` is that bound.
"""

from __future__ import annotations

from fxq.kernels.device import poison, poisoned, round_to_int32
from fxq.kernels.gemm.triton_epilogue import finish
from fxq.kernels.jit import Block, Pointer, Scalar, constexpr, jit, tl


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
def _load(rows: Pointer, columns: Block, inside: Block, TRANSPOSED: constexpr) -> Block:
    """Elements [rows, columns], or [columns, rows]."""
    # Only channels are masked, with zeros, which add nothing to a sum. Rows wrap around (``% M``), so they are inside.
    if TRANSPOSED:
        # [columns, rows]
        tile = tl.load(rows[None, :] + columns[:, None], mask=inside[:, None], other=0.0)
    else:
        # [rows, columns]
        tile = tl.load(rows[:, None] + columns[None, :], mask=inside[None, :], other=0.0)
    return tile


@jit
def _multiply(q: Block, w: Block, acc: Block, SWAPPED: constexpr) -> Block:
    # [BLOCK_M, k] @ [k, BLOCK_N] -> [BLOCK_M, BLOCK_N], or SWAPPED [BLOCK_N, k] @ [k, BLOCK_M] -> [BLOCK_N, BLOCK_M].
    # int8 products are at most 2**14 and rows have fewer than 2**17 channels: their int32 sum is exact. With two scales
    # the module's bound on the ratio takes the place of the latter.
    acc = tl.dot(w, q, acc, out_dtype=acc.dtype) if SWAPPED else tl.dot(q, w, acc, out_dtype=acc.dtype)
    return acc


@jit
def accumulate(
    acc: Block,
    q_rows: Pointer,
    w_rows: Pointer,
    start: Scalar,
    stop: Scalar,
    BLOCK_K: constexpr,
    PACKED: constexpr,
    SWAPPED: constexpr,
    PTX: constexpr,
) -> Block:
    """Add one segment of the product; start and stop count the stored elements of a weight row."""
    if PACKED:
        # Byte j of a block of 16 holds channels j and j + 16 of a block of 32; both nibbles stay 16 times too large,
        # which keeps them inside int8: -128..112. K and split are multiples of 32: a byte that is inside a segment has
        # both of its channels there, so one mask [BLOCK_K / 2] serves the weight and both halves of q.
        byte = tl.arange(0, BLOCK_K // 2)
        channel = byte // 16 * 32 + byte % 16
        for k in range(start, stop, BLOCK_K // 2):
            inside = k + byte < stop
            # w [BLOCK_K / 2, BLOCK_N] or SWAPPED its transpose; low and high [BLOCK_M, BLOCK_K / 2] or its transpose.
            w = _load(w_rows, k + byte, inside, not SWAPPED).to(tl.int8, bitcast=True)
            low = _load(q_rows, 2 * k + channel, inside, SWAPPED)
            high = _load(q_rows, 2 * k + channel + 16, inside, SWAPPED)
            acc = _multiply(low, _low_nibble_x16(w, PTX), acc, SWAPPED)
            acc = _multiply(high, (w & -16).to(tl.int8), acc, SWAPPED)
    else:
        offsets = tl.arange(0, BLOCK_K)
        for k in range(start, stop, BLOCK_K):
            inside = k + offsets < stop
            w = _load(w_rows, k + offsets, inside, not SWAPPED)  # [BLOCK_K, BLOCK_N], SWAPPED [BLOCK_N, BLOCK_K]
            q = _load(q_rows, k + offsets, inside, SWAPPED)  # [BLOCK_M, BLOCK_K], SWAPPED [BLOCK_K, BLOCK_M]
            acc = _multiply(q, w, acc, SWAPPED)
    return acc


@jit
def broken_constants(
    weight_scale_ptr: Pointer,
    input_scale_ptr: Pointer,
    offset_ptr: Pointer,
    out_scale_ptr: Pointer,
    N: Scalar,
    DUAL: constexpr,
    OUT_DUAL: constexpr,
) -> Scalar:
    """1 where a scale or an offset of any output channel is not finite, so that no row is; else 0."""
    # watch [1024] is 0, or NaN from the first number on that is not finite: 0 * x is 0 for every other.
    columns = tl.arange(0, 1024)
    watch = columns * 0.0 + tl.load(input_scale_ptr) * 0.0 + tl.div_rn(1.0, tl.load(out_scale_ptr)) * 0.0
    if DUAL:
        watch += tl.load(input_scale_ptr + 1) * 0.0
    if OUT_DUAL:
        watch += tl.div_rn(1.0, tl.load(out_scale_ptr + 1)) * 0.0
    for start in range(0, N, 1024):
        inside = start + columns < N
        watch += tl.load(offset_ptr + start + columns, mask=inside, other=0.0) * 0.0
        watch += tl.load(weight_scale_ptr + start + columns, mask=inside, other=0.0) * 0.0
        if DUAL:
            watch += tl.load(weight_scale_ptr + N + start + columns, mask=inside, other=0.0) * 0.0
    return tl.max((watch != watch).to(tl.int32))


@jit
def spoil(
    y_ptr: Pointer,
    rows: Block,
    columns: Block,
    broken: Block,
    M: Scalar,
    N: Scalar,
    EPILOGUE: constexpr,
    LOW: constexpr,
) -> None:
    """Overwrite the rows of a tile that are not finite: NaN, or what NaN is quantized to and the mark."""
    mask = ((rows < M) & broken)[:, None] & (columns < N)[None, :]  # [BLOCK_M, BLOCK_N], as the pointers
    pointers = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    if EPILOGUE == "quantize":
        low = tl.full((1, columns.shape[0]), LOW, tl.int8)  # [1, BLOCK_N], under the mark [BLOCK_M, BLOCK_N]
        tl.store(pointers, poison(low, columns[None, :], broken[:, None], N), mask=mask)
    else:
        tl.store(pointers, float("nan"), mask=mask)


@jit
def tile_of(M: Scalar, N: Scalar, BLOCK_M: constexpr, BLOCK_N: constexpr, GROUP_M: constexpr) -> tuple[Block, Scalar]:
    """Rows of this program's tile, [BLOCK_M], and the number of its block of columns."""
    # GROUP_M blocks of rows go through the columns side by side, so that a block of the weight is read from the cache.
    program = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    first = program // (GROUP_M * blocks_n) * GROUP_M
    height = min(blocks_m - first, GROUP_M)
    within = program % (GROUP_M * blocks_n)
    return (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M), within // height


@jit
def finish_halves(
    acc: Block,
    rows: Block,
    block: Scalar,
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
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
) -> None:
    """The epilogue of one half after the other: what it needs does not fit beside the sums of so large a tile."""
    # [BLOCK_M, BLOCK_N] -> [BLOCK_M, BLOCK_N / 2, 2]: the two halves of the columns.
    left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    finish(
        left, rows, columns, weight_scale_ptr, input_scale_ptr, offset_ptr, y_ptr,
        out_scale_ptr, out_zero_ptr, residual_ptr, gate_ptr, M, N, out_split, residual_stride, gate_stride,
        frame_rows, PACKED, EPILOGUE, ACTIVATION, OUT_DUAL, LOW, HIGH, GATED,
    )  # fmt: skip
    finish(
        right, rows, columns + BLOCK_N // 2, weight_scale_ptr, input_scale_ptr, offset_ptr, y_ptr,
        out_scale_ptr, out_zero_ptr, residual_ptr, gate_ptr, M, N, out_split, residual_stride, gate_stride,
        frame_rows, PACKED, EPILOGUE, ACTIVATION, OUT_DUAL, LOW, HIGH, GATED,
    )  # fmt: skip


@jit
def sums_of(
    q_rows: Pointer,
    w_rows: Pointer,
    columns: Block,
    weight_scale_ptr: Pointer,
    input_scale_ptr: Pointer,
    N: Scalar,
    w_width: Scalar,
    w_split: Scalar,
    INTEGER: constexpr,
    DUAL: constexpr,
    PACKED: constexpr,
    SWAPPED: constexpr,
    PTX: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_K: constexpr,
    BLOCK_OUTLIER: constexpr,
) -> Block:
    """Products of both segments, [BLOCK_M, BLOCK_N], in integers of the normal one."""
    TOTAL: constexpr = tl.int32 if INTEGER else tl.float32
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=TOTAL) if SWAPPED else tl.zeros((BLOCK_M, BLOCK_N), dtype=TOTAL)
    if DUAL:
        in_columns = columns < N
        # [BLOCK_N]: result per integer of the normal segment; 1 beyond N, where it is divided by.
        unit = tl.load(input_scale_ptr) * tl.load(weight_scale_ptr + columns, mask=in_columns, other=1.0)
        acc = accumulate(acc, q_rows, w_rows, w_split, w_width, BLOCK_OUTLIER, PACKED, SWAPPED, PTX)
        outlier = tl.load(input_scale_ptr + 1) * tl.load(weight_scale_ptr + N + columns, mask=in_columns, other=1.0)
        ratio = tl.div_rn(outlier, unit)  # [BLOCK_N], normal integers per outlier integer
        scaled = acc.to(tl.float32) * ratio[:, None] if SWAPPED else acc.to(tl.float32) * ratio[None, :]
        # Rounding costs at most half a normal integer; float8 sums are float32 and need none.
        acc = round_to_int32(scaled, PTX) if INTEGER else scaled
    acc = accumulate(acc, q_rows, w_rows, 0, w_split, BLOCK_K, PACKED, SWAPPED, PTX)
    if SWAPPED:
        acc = tl.trans(acc)  # [BLOCK_M, BLOCK_N]
    return acc


@jit
def linear_kernel(
    q_ptr: Pointer,
    w_ptr: Pointer,
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
    q_stride: Scalar,
    w_stride: Scalar,
    w_width: Scalar,
    w_split: Scalar,
    out_split: Scalar,
    residual_stride: Scalar,
    gate_stride: Scalar,
    frame_rows: Scalar,
    DUAL: constexpr,
    PACKED: constexpr,
    SWAPPED: constexpr,
    PTX: constexpr,
    EPILOGUE: constexpr,
    ACTIVATION: constexpr,
    OUT_DUAL: constexpr,
    LOW: constexpr,
    HIGH: constexpr,
    GATED: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_K: constexpr,
    BLOCK_OUTLIER: constexpr,
    GROUP_M: constexpr,
) -> None:
    """One [BLOCK_M, BLOCK_N] tile of y; w_width and w_split are a weight row's elements, all and of the normal part.

    SWAPPED computes the transposed tile: the weight is then the operand that Hopper's tensor cores read from
    registers, so that an unpacked weight never goes through shared memory. EPILOGUE is "store", "quantize" or "add";
    the pointers that it does not need are None.
    """
    rows, block = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    # [BLOCK_M] and [BLOCK_N] pointers. Beyond the last row or column they wrap around: loads need no mask for them, and
    # what is computed there is not stored.
    q_rows = q_ptr + (rows % M).to(tl.int64) * q_stride
    w_rows = w_ptr + (columns % N).to(tl.int64) * w_stride
    INTEGER: constexpr = q_ptr.dtype.element_ty == tl.int8
    acc = sums_of(
        q_rows, w_rows, columns, weight_scale_ptr, input_scale_ptr, N, w_width, w_split,
        INTEGER, DUAL, PACKED, SWAPPED, PTX, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_OUTLIER,
    )  # fmt: skip
    if BLOCK_N > 128:
        finish_halves(
            acc, rows, block, weight_scale_ptr, input_scale_ptr, offset_ptr, y_ptr,
            out_scale_ptr, out_zero_ptr, residual_ptr, gate_ptr, M, N, out_split, residual_stride, gate_stride,
            frame_rows, PACKED, EPILOGUE, ACTIVATION, OUT_DUAL, LOW, HIGH, GATED, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        finish(
            acc, rows, columns, weight_scale_ptr, input_scale_ptr, offset_ptr, y_ptr,
            out_scale_ptr, out_zero_ptr, residual_ptr, gate_ptr, M, N, out_split, residual_stride, gate_stride,
            frame_rows, PACKED, EPILOGUE, ACTIVATION, OUT_DUAL, LOW, HIGH, GATED,
        )  # fmt: skip
    if INTEGER:
        # At the end, where the sums no longer need the registers.
        columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        broken = poisoned(q_rows, w_width * 2 if PACKED else w_width).to(tl.int32)  # [BLOCK_M]
        if EPILOGUE == "quantize":  # noqa: SIM102
            # The mark lies in the first channels of a row: other blocks of columns need not know.
            if block == 0:
                broken += broken_constants(
                    weight_scale_ptr, input_scale_ptr, offset_ptr, out_scale_ptr, N, DUAL, OUT_DUAL
                )
        if tl.max(broken) > 0:
            # Another thread may have stored the element that this one overwrites.
            tl.debug_barrier()
            spoil(y_ptr, rows, columns, broken > 0, M, N, EPILOGUE, LOW)
