"""A GEMM for Hopper in Gluon that overlaps int8 products with their loads, which plain Triton does not.

The same arithmetic as :mod:`fxq.kernels.gemm.triton_kernel`. One ring of shared buffers, filled by the tensor memory
accelerator, runs through the outlier segment into the normal one without draining in between, and one product of
tensor cores stays in flight. It is bound to no operator: :func:`launch_gluon` is there to be measured.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fxq.kernels.arguments import Operands
from fxq.kernels.device import POISON
from fxq.kernels.jit import HAS_TRITON, Block, Pointer, Scalar, constexpr, triton
from fxq.kernels.rows import flat_rows

gluon: Any = None
gl: Any = None
hopper: Any = None
host: Any = None
with suppress(ImportError):
    gluon = import_module("triton.experimental.gluon")
    gl = import_module("triton.experimental.gluon.language")
    hopper = import_module("triton.experimental.gluon.language.nvidia.hopper")
    host = import_module("triton.experimental.gluon.nvidia.hopper")

HAS_GLUON = HAS_TRITON and host is not None
"""Whether the kernel can be compiled."""

INSTRUCTION_N = 128
"""Columns of one tensor-core instruction: int8 with 256 aborts the compiler of Triton 3.6 and 3.7."""


@dataclass(frozen=True)
class GluonTiles:
    """Sizes of one program: rows, output channels, input channels per step, warps, buffers, row blocks in a group."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8


TABLE = (GluonTiles(256, 128, 128, warps=8, stages=4), GluonTiles(128, 128, 128, warps=4, stages=3))
"""The sizes that compile without spills; two programs of the second fit one streaming multiprocessor."""


def _jit(kernel: Any) -> Any:
    """``gluon.jit``, or the function itself where Gluon is missing: it is then never launched."""
    return gluon.jit(kernel) if HAS_GLUON else kernel


@_jit
def _fill(
    step: Scalar,
    steps: Scalar,
    outlier_steps: Scalar,
    q_normal: Pointer,
    w_normal: Pointer,
    q_outlier: Pointer,
    w_outlier: Pointer,
    row: Scalar,
    column: Scalar,
    q_ring: Pointer,
    w_ring: Pointer,
    full: Pointer,
    DUAL: constexpr,
    BLOCK_K: constexpr,
    STAGES: constexpr,
) -> None:
    """Start the loads of one step; the outlier steps come first, none is left unless DUAL."""
    # A buffer is full when one block of q, [BLOCK_M, BLOCK_K], and one of w, [BLOCK_N, BLOCK_K], have come. The memory
    # accelerator writes zeros for what lies beyond the rows or the segment: they count as come and add nothing.
    stage = step % STAGES
    inside = step < steps
    hopper.mbarrier.expect(full.index(stage), q_normal.block_type.nbytes + w_normal.block_type.nbytes, pred=inside)
    # Every step fills both buffers once: from the normal segment or from the outlier one, never from both.
    normal = inside & (step >= outlier_steps)
    k = (step - outlier_steps) * BLOCK_K
    hopper.tma.async_copy_global_to_shared(q_normal, [row, k], full.index(stage), q_ring.index(stage), pred=normal)
    hopper.tma.async_copy_global_to_shared(w_normal, [column, k], full.index(stage), w_ring.index(stage), pred=normal)
    if DUAL:
        first = inside & (step < outlier_steps)
        k = step * BLOCK_K
        hopper.tma.async_copy_global_to_shared(q_outlier, [row, k], full.index(stage), q_ring.index(stage), pred=first)
        hopper.tma.async_copy_global_to_shared(
            w_outlier, [column, k], full.index(stage), w_ring.index(stage), pred=first
        )


@_jit
def _round_to_int32(x: Block) -> Block:
    return gl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,f", [x], dtype=gl.int32, is_pure=True, pack=1)


@_jit
def _poisoned(
    q_ptr: Pointer, q_stride: Scalar, row: Scalar, M: Scalar, K: Scalar, BLOCK_M: constexpr, layout: constexpr
) -> Block:
    """1 for rows of q that fxq.numerics.poison has marked, else 0."""
    # rows [BLOCK_M] wrap around, so only channels need a mask; head, code and other are [BLOCK_M, 32], as far as they
    # do not broadcast from [1, 32].
    rows = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    columns = gl.expand_dims(gl.arange(0, 32, layout=gl.SliceLayout(0, layout)), 0)
    head = gl.load(q_ptr + gl.expand_dims((rows % M).to(gl.int64) * q_stride, 1) + columns, mask=columns < K, other=0)
    code = gl.where(((gl.full([1, 32], POISON, gl.int32, layout) >> columns) & 1) == 1, 127, -128)
    other = (head.to(gl.int32) != code) & (columns < K)
    return gl.where((gl.max(other.to(gl.int32), 1) == 0) & (K >= 16), 1, 0)


@_jit
def _tile_of(M: Scalar, N: Scalar, BLOCK_M: constexpr, BLOCK_N: constexpr, GROUP_M: constexpr) -> tuple[Scalar, Scalar]:
    """First row and column of this program's tile."""
    # GROUP_M blocks of rows go through the columns side by side, so that a block of the weight is read from the cache.
    program = gl.program_id(0)
    blocks_n = gl.cdiv(N, BLOCK_N)
    first = program // (GROUP_M * blocks_n) * GROUP_M
    height = gl.minimum(gl.cdiv(M, BLOCK_M) - first, GROUP_M)
    within = program % (GROUP_M * blocks_n)
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


@_jit
def _ring(
    q_normal: Pointer,
    w_normal: Pointer,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_K: constexpr,
    STAGES: constexpr,
) -> tuple[Pointer, Pointer, Pointer]:
    """Shared buffers of q and of w, and their barriers."""
    # One barrier for each of STAGES buffers; a thread arrives at it once, with the number of bytes to wait for.
    q_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, BLOCK_K], q_normal.layout)
    w_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, BLOCK_K], w_normal.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    for buffer in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(buffer), count=1)
    hopper.fence_async_shared()
    return q_ring, w_ring, full


@_jit
def _store(
    y: Block,
    y_ptr: Pointer,
    q_ptr: Pointer,
    q_stride: Scalar,
    row: Scalar,
    column: Scalar,
    M: Scalar,
    N: Scalar,
    width: Scalar,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    WARPS: constexpr,
) -> None:
    """Store a tile [BLOCK_M, BLOCK_N] of results; all of a marked row of q is NaN."""
    # A layout whose threads store 16 bytes of bfloat16 each.
    stores: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    y = gl.convert_layout(y.to(y_ptr.dtype.element_ty), stores)
    heads: gl.constexpr = gl.BlockedLayout([1, 16], [16, 2], [WARPS, 1], [1, 0])
    broken = _poisoned(q_ptr, q_stride, row, M, width, BLOCK_M, heads)
    broken = gl.convert_layout(broken, gl.SliceLayout(1, stores))  # [BLOCK_M]
    y = gl.where(gl.expand_dims(broken, 1) == 1, float("nan"), y)
    rows = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, stores))
    columns = column + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, stores))
    pointers = y_ptr + gl.expand_dims(rows.to(gl.int64) * N, 1) + gl.expand_dims(columns, 0)
    gl.store(pointers, y, mask=gl.expand_dims(rows < M, 1) & gl.expand_dims(columns < N, 0))


@_jit
def gluon_kernel(
    q_normal: Pointer,
    w_normal: Pointer,
    q_outlier: Pointer,
    w_outlier: Pointer,
    q_ptr: Pointer,
    weight_scale_ptr: Pointer,
    input_scale_ptr: Pointer,
    offset_ptr: Pointer,
    y_ptr: Pointer,
    M: Scalar,
    N: Scalar,
    normal_width: Scalar,
    outlier_width: Scalar,
    q_stride: Scalar,
    DUAL: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_K: constexpr,
    STAGES: constexpr,
    GROUP_M: constexpr,
    WARPS: constexpr,
    COLUMNS: constexpr,
) -> None:
    """One [BLOCK_M, BLOCK_N] tile of y; q and w are tensor descriptors of the two segments."""
    row, column = _tile_of(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    q_ring, w_ring, full = _ring(q_normal, w_normal, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)
    outlier_steps = gl.cdiv(outlier_width, BLOCK_K)
    steps = outlier_steps + gl.cdiv(normal_width, BLOCK_K)
    # STAGES - 1 steps ahead: the buffer that is left is the one of the product that may still run.
    for ahead in gl.static_range(STAGES - 1):
        _fill(
            ahead, steps, outlier_steps, q_normal, w_normal, q_outlier, w_outlier, row, column, q_ring, w_ring, full,
            DUAL, BLOCK_K, STAGES,
        )  # fmt: skip

    # [BLOCK_M, BLOCK_N] of sums in the registers as the tensor cores leave them: 16 rows a warp, COLUMNS columns and 32
    # channels an instruction.
    sums: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, COLUMNS, 32]
    )
    columns = column + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, sums))
    # [BLOCK_N]: result per integer of the normal segment; 1 beyond N, where it is divided by.
    unit = gl.load(input_scale_ptr) * gl.load(weight_scale_ptr + columns, mask=columns < N, other=1.0)
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.int32, sums)
    if DUAL:
        for step in range(0, outlier_steps):
            stage = step % STAGES
            # A barrier's phase flips every time its buffer has been filled: once per round through the ring.
            hopper.mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_N]
            acc = hopper.warpgroup_mma(q_ring.index(stage), w_ring.index(stage).permute((1, 0)), acc, is_async=False)
            _fill(
                step + STAGES - 1, steps, outlier_steps, q_normal, w_normal, q_outlier, w_outlier, row, column,
                q_ring, w_ring, full, DUAL, BLOCK_K, STAGES,
            )  # fmt: skip
        outlier = gl.load(input_scale_ptr + 1)
        outlier = outlier * gl.load(weight_scale_ptr + N + columns, mask=columns < N, other=1.0)
        # From outlier integers to normal ones, which costs at most half a normal integer; int32 holds them by the bound
        # of fxq.kernels.gemm.triton_kernel.
        acc = _round_to_int32(acc.to(gl.float32) * gl.expand_dims(gl.div_rn(outlier, unit), 0))
    token = hopper.warpgroup_mma_init(acc)
    for step in range(outlier_steps, steps):
        stage = step % STAGES
        hopper.mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        token = hopper.warpgroup_mma(q_ring.index(stage), w_ring.index(stage).permute((1, 0)), token, is_async=True)
        # The product of the step before is complete: its buffers may be filled again.
        acc = hopper.warpgroup_mma_wait(num_outstanding=1, deps=(token,))
        token = hopper.warpgroup_mma_init(acc)
        _fill(
            step + STAGES - 1, steps, outlier_steps, q_normal, w_normal, q_outlier, w_outlier, row, column,
            q_ring, w_ring, full, False, BLOCK_K, STAGES,
        )  # fmt: skip
    acc = hopper.warpgroup_mma_wait(num_outstanding=0, deps=(token,))
    for buffer in gl.static_range(STAGES):
        hopper.mbarrier.invalidate(full.index(buffer))

    offset = gl.load(offset_ptr + columns, mask=columns < N, other=0.0)
    y = acc.to(gl.float32) * gl.expand_dims(unit, 0) + gl.expand_dims(offset, 0)
    _store(y, y_ptr, q_ptr, q_stride, row, column, M, N, normal_width + outlier_width, BLOCK_M, BLOCK_N, WARPS)


def constants(tiles: GluonTiles, dual: bool) -> dict[str, object]:
    """Compile-time arguments of the kernel."""
    return {
        "DUAL": dual,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "STAGES": tiles.stages,
        "GROUP_M": tiles.group_m,
        "WARPS": tiles.warps,
        "COLUMNS": INSTRUCTION_N,
    }


def launch_gluon(a: Operands, dtype: torch.dtype, tiles: GluonTiles = TABLE[0]) -> Tensor:
    """:func:`fxq.kernels.gemm.op.dual_scale_linear` for int8 weights on sm_90.

    Args:
        a: of the product; K, ``split`` and the row strides of q and of the weight are multiples of 16.
        dtype: of the result.
        tiles: of the programs.

    Returns:
        ``dtype`` [..., N], contiguous.

    Raises:
        ValueError: when Gluon is missing or a size does not fit.
    """
    rows, weight, width, split = flat_rows(a.q), a.weight, a.width, a.split
    if not HAS_GLUON:
        raise ValueError("this Triton has no Gluon for Hopper: use dual_scale_linear")
    if weight.dtype != torch.int8 or weight.ndim != 2:
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}: expected int8 [N, K]; use dual_scale_linear")
    if any(size % 16 for size in (width, split, rows.stride(0), weight.stride(0))):
        raise ValueError(f"K = {width}, split = {split}: expected multiples of 16; use dual_scale_linear")
    y = a.empty(dtype)
    if not y.numel():
        return y

    def describe(part: Tensor, block_rows: int) -> Any:
        block = [block_rows, tiles.block_k]
        return host.TensorDescriptor.from_tensor(part, block, gl.NVMMASharedLayout.get_default_for(block, gl.int8))

    normal = [describe(rows[:, :split], tiles.block_m), describe(weight[:, :split], tiles.block_n)]
    outlier = normal
    if split < width:
        outlier = [describe(rows[:, split:], tiles.block_m), describe(weight[:, split:], tiles.block_n)]
    grid = (triton.cdiv(rows.shape[0], tiles.block_m) * triton.cdiv(a.outputs, tiles.block_n),)
    with torch.cuda.device(a.q.device):
        gluon_kernel[grid](
            *normal,
            *outlier,
            rows,
            a.weight_scale.contiguous(),
            a.input_scale.contiguous(),
            a.offset.contiguous(),
            y,
            rows.shape[0],
            a.outputs,
            split,
            width - split,
            rows.stride(0),
            **constants(tiles, split < width),
            num_warps=tiles.warps,
        )
    return y
