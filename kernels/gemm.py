"""Integer matrix product with one activation scale, or two: normal and outlier channels (Q-ARVD, arXiv 2605.21072).

The GPU kernel keeps one int32 accumulator. It adds up the outlier segment first, multiplies the accumulator by
``ratio[n] = (s_x1 * s_w1[n]) / (s_x0 * s_w0[n])``, rounds, and goes on with the normal segment: a second accumulator
would spill. The rounding costs at most half a unit of ``s_x0 * s_w0[n]``, and the sum must stay inside int32:
``2**14 * (K_normal + max(ratio) * K_outlier) < 2**31``, for packed weights too, which enter as 16 times their value.
:func:`fxq.numerics.ratio_limit` is that bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxq import numerics
from fxq.kernels.jit import HAS_TRITON, Block, Pointer, Scalar, constexpr, jit, tl, triton
from fxq.kernels.op import Arguments, declare
from fxq.kernels.tiles import Tiles, choose

OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 1 << 22  # int32 accumulators per pass on a CPU: more leave the cache, fewer repack the weight too often
EXACT_BLOCK = 1024  # products of int8 are at most 2**14: sums of 1024 are exact in float32


def _supports(
    q: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    offset: Tensor,
    split: int,
    bits: int,
    dtype: torch.dtype,
) -> str:
    if q.ndim < 1 or q.dtype != torch.int8:
        return f"q is {q.dtype} {tuple(q.shape)}: expected int8 [..., K] from quantize_act"
    if not 2 <= bits <= 8:
        return f"bits = {bits}: expected 2..8"
    if dtype not in OUTPUTS:
        return f"dtype = {dtype}: expected float32, bfloat16 or float16"
    width = q.shape[-1]
    if not 0 < split <= width:
        return f"split = {split}: expected 1..{width}, the number of normal channels of q"
    packed = bits <= 4
    if packed and (width % numerics.PACK_BLOCK or split % numerics.PACK_BLOCK):
        return f"K = {width}, split = {split}: packed weights need multiples of {numerics.PACK_BLOCK}"
    stored, columns = (torch.uint8, width // 2) if packed else (torch.int8, width)
    if weight.dtype != stored or weight.ndim != 2 or weight.shape[1] != columns:
        form = f"{stored} [N, {columns}] for bits = {bits} and K = {width}"
        return f"weight is {weight.dtype} {tuple(weight.shape)}: expected {form}"
    groups = 1 if split == width else 2
    for name, tensor, shape in (
        ("weight_scale", weight_scale, (groups, weight.shape[0])),
        ("input_scale", input_scale, (groups,)),
        ("offset", offset, (weight.shape[0],)),
    ):
        if tensor.dtype != torch.float32 or tensor.shape != shape:
            return f"{name} is {tensor.dtype} {tuple(tensor.shape)}: expected float32 {shape} for split = {split}"
    return ""


def _fake(
    q: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    offset: Tensor,
    split: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    return q.new_empty((*q.shape[:-1], weight.shape[0]), dtype=dtype)


def _samples() -> Sequence[Arguments]:
    random = torch.Generator().manual_seed(0)
    cases: list[Arguments] = []
    for shape, outputs, split, bits, dtype in (
        ((5, 96), 40, 96, 8, torch.float32),
        ((2, 9, 160), 33, 128, 8, torch.bfloat16),
        ((17, 75), 19, 50, 5, torch.float32),
        ((1, 128), 64, 96, 4, torch.float32),
        ((33, 96), 7, 96, 4, torch.float16),
        ((0, 64), 16, 32, 8, torch.bfloat16),
        ((64,), 1, 64, 3, torch.float32),
    ):
        width = shape[-1]
        groups = 1 if split == width else 2
        low, high = numerics.integer_range(bits)
        q = torch.randint(-128, 128, shape, generator=random, dtype=torch.int8)
        w = torch.randint(low, high + 1, (outputs, width), generator=random, dtype=torch.int8)
        weight_scale = torch.rand(groups, outputs, generator=random) * 0.01 + 0.001
        input_scale = torch.rand(groups, generator=random) * 0.05 + 0.005
        offset = torch.randn(outputs, generator=random)
        stored = numerics.pack_int4(w) if bits <= 4 else w
        cases.append((q, stored, weight_scale, input_scale, offset, split, bits, dtype))
    return cases


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """int32 [M, N] of int8 [M, K] and [N, K], exact on every device through float32 blocks of K."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    with torch.autocast(a.device.type, enabled=False):
        for start in range(0, a.shape[1], EXACT_BLOCK):
            block = slice(start, start + EXACT_BLOCK)
            total += (a[:, block].float() @ b[:, block].float().T).to(torch.int32)
    return total


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """int32 [M, N] of int8 [M, K] and [N, K] by the CPU's integer instructions; exact where it has VNNI."""
    if a.shape[1] == 1:
        return exact_matmul(a, b)
    # _int_mm takes the stride of a dimension of size 1 for a row length and then returns uninitialised memory
    # (pytorch/pytorch#195066): a copy has the right one.
    a, b = (t.clone(memory_format=torch.contiguous_format) if t.shape[0] == 1 else t for t in (a, b))
    return torch._int_mm(a, b.T)


def linear_in_chunks(
    matmul: Callable[[Tensor, Tensor], Tensor],
    q: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    offset: Tensor,
    split: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """``numerics.dual_scale_matmul`` over chunks of rows, the same float operations in the same order."""
    width, outputs = q.shape[-1], weight.shape[0]
    rows = q.reshape(-1, width)
    w = numerics.unpack_int4(weight) if bits <= 4 else weight
    y = torch.empty(rows.shape[0], outputs, dtype=dtype, device=q.device)
    step = max(1, CHUNK // max(1, outputs))
    groups = list(zip(numerics.group_slices(width, split), input_scale.unsqueeze(1) * weight_scale, strict=True))
    for start in range(0, rows.shape[0], step):
        chunk = rows[start : start + step]
        total = offset
        for part, scale in groups:
            product = matmul(chunk[:, part], w[:, part]) * scale
            total = product.add_(total)
        y[start : start + step] = total
    return y.reshape(*q.shape[:-1], outputs)


@declare(
    "dual_scale_linear(Tensor q, Tensor weight, Tensor weight_scale, Tensor input_scale, Tensor offset, int split,"
    " int bits, ScalarType dtype) -> Tensor",
    fake=_fake,
    samples=_samples,
    supports=_supports,
    max_error=2**-8,
)
def dual_scale_linear(
    q: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    offset: Tensor,
    split: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Linear layer on integers, ``sum_g s_x[g] s_w[g, n] sum_k q w + offset[n]``, as numerics.dual_scale_matmul.

    Args:
        q: int8 [..., K] in ``[normal | outlier]`` order.
        weight: int8 [N, K] when bits is 5..8, uint8 [N, K / 2] of :func:`fxq.numerics.pack_int4` when it is 2..4.
        weight_scale: float32 [G, N], positive; G = 2 when ``split < K``, else 1.
        input_scale: float32 [G], positive.
        offset: float32 [N] of :func:`fxq.numerics.fold_offset`.
        split: number of normal channels, 1..K; a multiple of 32, as K, when the weight is packed.
        bits: width of the weights.
        dtype: of the result: float32, bfloat16 or float16.

    Returns:
        ``dtype`` [..., N], contiguous.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    return linear_in_chunks(exact_matmul, q, weight, weight_scale, input_scale, offset, split, bits, dtype)


def _has_vnni() -> bool:
    """Whether int8 products add up in 32 bits.

    Older x86 instructions saturate pairs of products at 16 bits, and ``_int_mm`` uses them (pytorch/pytorch#136746).
    """
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


if _has_vnni():

    @dual_scale_linear.on("cpu", "int_mm")
    def linear_int_mm(
        q: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        input_scale: Tensor,
        offset: Tensor,
        split: int,
        bits: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """Native integers; packed weights are unpacked on every call, a few per cent of the product."""
        return linear_in_chunks(int_mm, q, weight, weight_scale, input_scale, offset, split, bits, dtype)


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


if HAS_TRITON:

    @dual_scale_linear.on("cuda", "triton")
    def linear_cuda(
        q: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        input_scale: Tensor,
        offset: Tensor,
        split: int,
        bits: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """Launch on the device that holds q, with the tiles of its architecture."""
        with torch.cuda.device(q.device):
            major, minor = torch.cuda.get_device_capability()
            rows = q.numel() // q.shape[-1]
            tiles = choose(rows, weight.shape[0], q.shape[-1], 10 * major + minor)
            return launch(q, weight, weight_scale, input_scale, offset, split, bits, dtype, tiles=tiles)
