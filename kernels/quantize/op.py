"""Quantize activations with static scales, gathering the channels into ``[normal | outlier]`` order on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxq import numerics
from fxq.kernels import native
from fxq.kernels.arguments import Quantization, QuantizeAct
from fxq.kernels.device import poison, to_int8
from fxq.kernels.jit import HAS_TRITON, Block, Pointer, Scalar, constexpr, jit, tl, triton
from fxq.kernels.op import declare

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = (8, 256)
"""Rows of a program on a GPU, and its channels at a time."""

CHUNK = 1 << 20  # elements per pass on a CPU: the temporaries stay in the cache and out of the page allocator


def unfit_groups(width: int, a: Quantization, *, prefix: str = "") -> str:
    """Why the quantization of ``width`` channels is not well formed, or ""; arguments are named with the prefix."""
    perm, scale, zero_point, split, bits = a
    if not 2 <= bits <= 8:
        return f"{prefix}bits = {bits}: expected 2..8"
    if not 0 < split <= width:
        what = "the result" if prefix else "x"
        return f"{prefix}split = {split}: expected 1..{width}, the number of normal channels of {what}"
    groups = 1 if split == width else 2
    if scale.dtype != torch.float32 or scale.shape != (groups,):
        form = f"float32 ({groups},) for {prefix}split = {split}"
        return f"{prefix}scale is {scale.dtype} {tuple(scale.shape)}: expected {form}"
    if zero_point.dtype != torch.int32 or zero_point.shape != (groups,):
        form = f"int32 ({groups},) for {prefix}split = {split}"
        return f"{prefix}zero_point is {zero_point.dtype} {tuple(zero_point.shape)}: expected {form}"
    if perm is not None and (perm.dtype != torch.int32 or perm.shape != (width,)):
        return f"perm is {perm.dtype} {tuple(perm.shape)}: expected int32 ({width},), or None to keep the order"
    return ""


def _supports(a: QuantizeAct) -> str:
    x = a.x
    if x.ndim < 1 or x.dtype not in FLOATS:
        return f"x is {x.dtype} {tuple(x.shape)}: expected float32, bfloat16 or float16 [..., K]; cast it first"
    return unfit_groups(x.shape[-1], a.quantization)


def _fake(a: QuantizeAct) -> Tensor:
    return a.x.new_empty(a.x.shape, dtype=torch.int8)


def _samples() -> Sequence[QuantizeAct]:
    random = torch.Generator().manual_seed(0)
    cases: list[QuantizeAct] = []
    for shape, split, bits, dtype, gather in (
        ((5, 96), 96, 8, torch.float32, False),
        ((2, 7, 96), 64, 8, torch.bfloat16, True),
        ((33, 130), 97, 4, torch.float16, True),
        ((1, 40), 8, 6, torch.float32, True),
        ((0, 64), 32, 8, torch.bfloat16, False),
        ((48,), 48, 2, torch.float32, False),
    ):
        groups = 1 if split == shape[-1] else 2
        x = torch.randn(shape, generator=random, dtype=torch.float32).to(dtype)
        perm = torch.randperm(shape[-1], generator=random).to(torch.int32) if gather else None
        scale = torch.rand(groups, generator=random, dtype=torch.float32) * 0.05 + 0.005
        zero_point = torch.randint(-20, 20, (groups,), generator=random, dtype=torch.int32)
        cases.append(QuantizeAct(x, Quantization(perm, scale, zero_point, split, bits)))
    return cases


@declare(QuantizeAct, fake=_fake, samples=_samples, supports=_supports)
def quantize_act(a: QuantizeAct) -> Tensor:
    """Static asymmetric quantization of activations with one scale, or with one per channel group.

    Every implementation returns the same integers as :func:`fxq.numerics.quantize_input`. Rows that are not finite
    carry the mark of :func:`fxq.numerics.poison`.

    Returns:
        int8 [..., K], contiguous.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    perm, scale, zero_point, split, bits = a.quantization
    ordered = a.x if perm is None else a.x.index_select(-1, perm)
    return numerics.quantize_input(ordered, scale, zero_point, split, bits).contiguous()


@quantize_act.on("cpu", native.or_else("eager"))
def quantize_chunks(a: QuantizeAct) -> Tensor:
    """Native kernel, else the reference in chunks of rows, in place; all are bit-equal."""
    x, perm = a.x, a.quantization.perm
    if x.dtype != torch.float16 and native.ready():
        return native.quantize_act(a, _fake(a))
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    q = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    step = max(1, min(rows.shape[0], CHUNK // width))
    buffer = torch.empty(step, width, dtype=torch.float32, device=x.device)
    gathered = buffer if perm is None else torch.empty_like(buffer)
    for start in range(0, rows.shape[0], step):
        chunk = rows[start : start + step]
        values = gathered[: len(chunk)]
        if perm is None:
            values.copy_(chunk)
        else:
            torch.index_select(buffer[: len(chunk)].copy_(chunk), 1, perm, out=values)
        q[start : start + step] = round_rows(values, a.quantization)
    return q.reshape(x.shape)


def round_rows(values: Tensor, a: Quantization) -> Tensor:
    """:func:`fxq.numerics.quantize_input` of float32 [M, K] in place, on a CPU; returns the integers in float32.

    The channels are in the order of the result already.
    """
    _, scale, zero_point, split, bits = a
    low, high = numerics.integer_range(bits)
    inverse, broken = scale.reciprocal(), broken_rows(values)
    for g, part in enumerate(numerics.group_slices(values.shape[1], split)):
        zero = int(zero_point[g])
        scaled = values[:, part].mul_(inverse[g])
        if broken is not None:
            scaled.nan_to_num_(low - zero, torch.inf, -torch.inf)
        scaled.clamp_(low - zero, high - zero).round_().add_(zero)
    if not bool(inverse.isfinite().all()):
        broken = torch.ones(len(values), dtype=torch.bool)
        values.nan_to_num_(low)
    if broken is not None and values.shape[1] >= numerics.POISON_LEAST:
        codes = numerics.poison_codes(values.shape[1])
        values[broken, : len(codes)] = codes.float()
    return values


def broken_rows(values: Tensor) -> Tensor | None:
    """The rows of float32 [M, K] on a CPU that are not finite, bool [M]; None when all are."""
    if bool(values.sum(1).isfinite().all()):
        return None
    broken = ~values.isfinite().all(1)
    return broken if bool(broken.any()) else None


@jit
def _load_tile(
    x_rows: Pointer, perm_ptr: Pointer, columns: Block, in_rows: Block, K: Scalar, GATHER: constexpr
) -> Block:
    """Float32 [BLOCK_M, BLOCK_K] of the rows at these channels of the result; 0, which is finite, outside of x."""
    inside = columns < K
    source = tl.load(perm_ptr + columns, mask=inside, other=0) if GATHER else columns
    return tl.load(x_rows[:, None] + source[None, :], mask=in_rows[:, None] & inside[None, :], other=0.0).to(tl.float32)


@jit
def _round_tile(
    x: Block, columns: Block, scale_ptr: Pointer, zero_ptr: Pointer, SPLIT: Scalar,
    LOW: constexpr, HIGH: constexpr, DUAL: constexpr,
) -> Block:  # fmt: skip
    """int8 [BLOCK_M, BLOCK_K] of float32 at these channels."""
    # Integers per unit of x, a scalar or [1, BLOCK_K]; rounded to nearest as the reference's reciprocal.
    inverse = tl.div_rn(1.0, tl.load(scale_ptr))
    zero = tl.load(zero_ptr)
    if DUAL:
        inverse = tl.where(columns < SPLIT, inverse, tl.div_rn(1.0, tl.load(scale_ptr + 1)))[None, :]
        zero = tl.where(columns < SPLIT, zero, tl.load(zero_ptr + 1))[None, :]
    return to_int8(x, inverse, zero, LOW, HIGH)


@jit
def quantize_kernel(
    x_ptr: Pointer,
    perm_ptr: Pointer,
    scale_ptr: Pointer,
    zero_ptr: Pointer,
    q_ptr: Pointer,
    M: Scalar,
    K: Scalar,
    SPLIT: Scalar,
    x_stride: Scalar,
    LOW: constexpr,
    HIGH: constexpr,
    GATHER: constexpr,
    DUAL: constexpr,
    BLOCK_M: constexpr,
    BLOCK_K: constexpr,
) -> None:
    """BLOCK_M rows of int8 from float rows of x.

    The first channels come last: by then it is known whether they hold the mark of a row that is not finite.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < M
    x_rows = x_ptr + rows.to(tl.int64) * x_stride
    q_rows = q_ptr + rows.to(tl.int64) * K
    first = tl.arange(0, BLOCK_K)
    watch = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)  # 0 * x is 0 or NaN, and NaN stays in a sum
    blocks = tl.cdiv(K, BLOCK_K)
    # From the last block to the second: int8 has no NaN, and the mark that stands for it lies in the first block.
    for i in range(1, blocks):
        columns = (blocks - i) * BLOCK_K + first
        x = _load_tile(x_rows, perm_ptr, columns, in_rows, K, GATHER)
        watch += x * 0.0
        q = _round_tile(x, columns, scale_ptr, zero_ptr, SPLIT, LOW, HIGH, DUAL)
        tl.store(q_rows[:, None] + columns[None, :], q, mask=in_rows[:, None] & (columns < K)[None, :])
    x = _load_tile(x_rows, perm_ptr, first, in_rows, K, GATHER)
    watch += x * 0.0 + tl.div_rn(1.0, tl.load(scale_ptr)) * 0.0
    if DUAL:
        watch += tl.div_rn(1.0, tl.load(scale_ptr + 1)) * 0.0
    broken = tl.max((watch != watch).to(tl.int32), 1) == 1  # [BLOCK_M]
    q = _round_tile(x, first, scale_ptr, zero_ptr, SPLIT, LOW, HIGH, DUAL)
    q = poison(q, first[None, :], broken[:, None], K)
    tl.store(q_rows[:, None] + first[None, :], q, mask=in_rows[:, None] & (first < K)[None, :])


def launch(a: QuantizeAct, *, blocks: tuple[int, int] = BLOCKS, out: Tensor | None = None) -> Tensor:
    """Run the Triton kernel on the current device; ``out`` int8 [M, K] is allocated when it is not given."""
    x, (perm, scale, zero_point, split, bits) = a
    low, high = numerics.integer_range(bits)
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    q = torch.empty(rows.shape, dtype=torch.int8, device=x.device) if out is None else out
    if rows.numel():
        quantize_kernel[(triton.cdiv(rows.shape[0], blocks[0]),)](
            rows,
            scale if perm is None else perm.contiguous(),
            scale.contiguous(),
            zero_point.contiguous(),
            q,
            rows.shape[0],
            width,
            split,
            rows.stride(0),
            LOW=low,
            HIGH=high,
            GATHER=perm is not None,
            DUAL=split < width,
            BLOCK_M=blocks[0],
            BLOCK_K=blocks[1],
            num_warps=4,
        )
    return q.reshape(x.shape)


if HAS_TRITON:

    @quantize_act.on("cuda", "triton")
    def quantize_cuda(a: QuantizeAct) -> Tensor:
        """Launch on the device that holds x."""
        with torch.cuda.device(a.x.device):
            return launch(a)
