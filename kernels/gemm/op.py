"""Integer matrix product with one activation scale, or two: normal and outlier channels (Q-ARVD, arXiv 2605.21072).

A weight comes in one of four layouts, told apart by dtype and rank: int8 [N, K], packed int4 uint8 [N, K / 2], and for
the native CPU kernel panels, int8 or packed uint8 (:mod:`fxq.kernels.gemm.panels`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxq import cpu, numerics
from fxq.kernels import native
from fxq.kernels.arguments import DualScaleLinear, Operands
from fxq.kernels.gemm import triton as gemm_triton
from fxq.kernels.gemm.panels import MOST_PACKED_BITS, pack_panels, panel_shape, unpack_panels
from fxq.kernels.jit import HAS_TRITON
from fxq.kernels.op import declare

OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 1 << 22  # int32 accumulators per pass on a CPU: more leave the cache, fewer repack the weight too often
EXACT_BLOCK = 1024  # products of int8 are at most 2**14: sums of 1024 are exact in float32


def unfit(operands: Operands) -> str:
    """Why the operands do not fit each other, or ""."""
    q, weight, weight_scale, input_scale, offset, split, bits = operands
    if q.ndim < 1 or q.dtype != torch.int8:
        return f"q is {q.dtype} {tuple(q.shape)}: expected int8 [..., K] from quantize_act"
    if not 2 <= bits <= 8:
        return f"bits = {bits}: expected 2..8"
    width = q.shape[-1]
    if width > numerics.MAX_WIDTH:
        return f"q has {width} channels: their sum can overflow int32; at most {numerics.MAX_WIDTH} cannot"
    if not 0 < split <= width:
        return f"split = {split}: expected 1..{width}, the number of normal channels of q"
    if offset.dtype != torch.float32 or offset.ndim != 1:
        return f"offset is {offset.dtype} {tuple(offset.shape)}: expected float32 [N]"
    outputs = offset.shape[0]
    packed = bits <= MOST_PACKED_BITS
    stored, shape = torch.uint8 if packed else torch.int8, [outputs, width // 2 if packed else width]
    if weight.ndim == 4:
        shape = [*panel_shape(outputs, width, split, packed)]
    elif packed and (width % numerics.PACK_BLOCK or split % numerics.PACK_BLOCK):
        return f"K = {width}, split = {split}: packed weights need multiples of {numerics.PACK_BLOCK}"
    if weight.dtype != stored or list(weight.shape) != shape:
        form = f"{stored} {tuple(shape)} for bits = {bits}, K = {width} and an offset of {outputs}"
        return f"weight is {weight.dtype} {tuple(weight.shape)}: expected {form}"
    groups = 1 if split == width else 2
    for name, tensor, wanted in (
        ("weight_scale", weight_scale, (groups, outputs)),
        ("input_scale", input_scale, (groups,)),
    ):
        if tensor.dtype != torch.float32 or tensor.shape != wanted:
            return f"{name} is {tensor.dtype} {tuple(tensor.shape)}: expected float32 {wanted} for split = {split}"
    return ""


def plain_weight(operands: Operands) -> Tensor:
    """int8 [N, K] whatever the layout."""
    weight = operands.weight
    if weight.ndim == 4:
        return unpack_panels(weight, operands.outputs, operands.width, operands.split)
    return numerics.unpack_int4(weight) if operands.bits <= 4 else weight


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """int32 [M, N] of int8 [M, K] and [N, K], exact on every device through float32 blocks of K."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    with torch.autocast(a.device.type, enabled=False):
        for start in range(0, a.shape[1], EXACT_BLOCK):
            block = slice(start, start + EXACT_BLOCK)
            total += (a[:, block].float() @ b[:, block].float().T).to(torch.int32)
    return total


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """The integers of :func:`exact_matmul` as float32, without a detour through int32 where one block holds them."""
    if a.shape[1] > EXACT_BLOCK:
        return exact_matmul(a, b).float()
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float().T


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """int32 [M, N] of int8 [M, K] and [N, K] by the CPU's integer instructions; exact where it has VNNI."""
    if a.shape[1] == 1:
        return exact_matmul(a, b)
    # _int_mm takes a stride for a row length, also where rows overlap, as in expanded tensors, or there is only one
    # (pytorch/pytorch#195066), and then returns other numbers or uninitialised memory: a copy has the right one.
    a, b = (t if _has_rows(t) else t.clone(memory_format=torch.contiguous_format) for t in (a, b))
    return torch._int_mm(a, b.T)


def _has_rows(t: Tensor) -> bool:
    """Whether the rows of a matrix, or its columns, lie apart in memory."""
    rows, columns = t.shape
    return rows > 1 and ((t.stride(1) == 1 and t.stride(0) >= columns) or (t.stride(0) == 1 and t.stride(1) >= rows))


def show_poisoned(q: Tensor, y: Tensor) -> Tensor:
    """``y`` float32 [M, N] with NaN in the rows where ``q`` [M, K] is marked as not finite."""
    rows = numerics.poisoned(q)
    if rows.is_cpu and not bool(rows.any()):
        return y
    return y.masked_fill(rows.unsqueeze(1), torch.nan)


Finish = Callable[[Tensor, slice], Tensor]
"""Epilogue of a chunk of rows: (float32 [rows, N], the rows) -> what is stored."""


def in_chunks(
    matmul: Callable[[Tensor, Tensor], Tensor], operands: Operands, dtype: torch.dtype, finish: Finish | None = None
) -> Tensor:
    """``numerics.dual_scale_matmul`` over chunks of rows, the same float operations in the same order.

    Returns:
        ``dtype`` [..., N]; ``finish`` sees the float32 rows before they are stored.
    """
    q, split, outputs = operands.q, operands.split, operands.outputs
    rows = q.reshape(-1, operands.width)
    w = plain_weight(operands)
    y = torch.empty(rows.shape[0], outputs, dtype=dtype, device=q.device)
    step = max(1, CHUNK // max(1, outputs))
    scales = operands.input_scale.unsqueeze(1) * operands.weight_scale
    groups = list(zip(numerics.group_slices(operands.width, split), scales, strict=True))
    for start in range(0, rows.shape[0], step):
        chunk = rows[start : start + step]
        total = operands.offset
        for part, scale in groups:
            product = matmul(chunk[:, part], w[:, part]) * scale
            total = product.add_(total)
        here = slice(start, start + len(chunk))
        total = show_poisoned(chunk, total)
        y[here] = total if finish is None else finish(total, here)
    return y.reshape(*q.shape[:-1], outputs)


def cpu_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Integers [M, N] of int8 [M, K] and [N, K] on a CPU: int32 by its instructions where exact, else as float32."""
    return int_mm(a, b) if _HAS_VNNI else exact_product(a, b)


def cpu_integers(a: Tensor, b: Tensor) -> Tensor:
    """int32 [M, N] of :func:`cpu_matmul`."""
    return int_mm(a, b) if _HAS_VNNI else exact_matmul(a, b)


_HAS_VNNI = cpu.has_vnni()
IN_FLOAT = "float32"
"""Name of the implementation that multiplies integers in float32, for portable layouts on a CPU without VNNI and where
there are no native kernels: exact, and slower than the float model."""
ON_CPU = "int_mm" if _HAS_VNNI else IN_FLOAT
"""Name of the CPU implementation for weights in the portable layouts."""


def in_float_note() -> str:
    """What a user of :data:`IN_FLOAT` should know, in one line."""
    note = f"{cpu.lacks()}: integers are multiplied in float32, which is exact and slower than the float model"
    return f"{note}; fxq.optimize lays weights out for the native kernels" if native.ready() else note


def _supports(a: DualScaleLinear) -> str:
    if a.dtype not in OUTPUTS:
        return f"dtype = {a.dtype}: expected float32, bfloat16 or float16"
    return unfit(a.operands)


def _fake(a: DualScaleLinear) -> Tensor:
    return a.operands.empty(a.dtype)


def sample_operands(
    shape: tuple[int, ...],
    outputs: int,
    split: int,
    bits: int,
    random: torch.Generator,
    panels: bool = False,
    bell_shaped: bool = False,
) -> Operands:
    """Random operands of the given sizes, for tests, samples and measurements.

    Weights are uniform; ``bell_shaped``: as trained ones, normally distributed with the largest of an output at the end
    of the range.
    """
    width = shape[-1]
    groups = 1 if split == width else 2
    low, high = numerics.integer_range(bits)
    q = torch.randint(-128, 128, shape, generator=random, dtype=torch.int8)
    if bell_shaped:
        normal = torch.randn((outputs, width), generator=random, dtype=torch.float32)
        w = (normal / normal.abs().amax(1, keepdim=True) * high).round().to(torch.int8)
    else:
        w = torch.randint(low, high + 1, (outputs, width), generator=random, dtype=torch.int8)
    weight_scale = torch.rand(groups, outputs, generator=random, dtype=torch.float32) * 0.01 + 0.001
    input_scale = torch.rand(groups, generator=random, dtype=torch.float32) * 0.05 + 0.005
    offset = torch.randn(outputs, generator=random, dtype=torch.float32)
    stored = pack_panels(w, split, bits) if panels else numerics.pack_int4(w) if bits <= 4 else w
    return Operands(q, stored, weight_scale, input_scale, offset, split, bits)


SAMPLE_CASES: tuple[tuple[tuple[int, ...], int, int, int, torch.dtype], ...] = (
    ((5, 96), 40, 96, 8, torch.float32),
    ((2, 9, 160), 33, 128, 8, torch.bfloat16),
    ((17, 75), 19, 50, 5, torch.float32),
    ((1, 128), 64, 96, 4, torch.float32),
    ((33, 96), 7, 96, 4, torch.float16),
    ((0, 64), 16, 32, 8, torch.bfloat16),
    ((64,), 1, 64, 3, torch.float32),
)
"""Shape of the input, outputs, split, bits and result dtype of samples."""


def _samples() -> Sequence[DualScaleLinear]:
    random = torch.Generator().manual_seed(0)
    return [
        DualScaleLinear(sample_operands(shape, outputs, split, bits, random), dtype)
        for shape, outputs, split, bits, dtype in SAMPLE_CASES
    ]


@declare(DualScaleLinear, fake=_fake, samples=_samples, supports=_supports, max_error=2**-8)
def dual_scale_linear(a: DualScaleLinear) -> Tensor:
    """Linear layer on integers, ``sum_g s_x[g] s_w[g, n] sum_k q w + offset[n]``, as numerics.dual_scale_matmul.

    Rows that :func:`fxq.numerics.poison` has marked as not finite are NaN.

    Returns:
        ``dtype`` [..., N], contiguous.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    return in_chunks(exact_matmul, a.operands, a.dtype)


@dual_scale_linear.on("cpu", ON_CPU)
def linear_cpu(a: DualScaleLinear) -> Tensor:
    """Native kernel for panels, else :func:`cpu_matmul`; packed weights are unpacked on every call, a few per cent."""
    if a.operands.weight.ndim == 4 and a.dtype != torch.float16 and native.ready():
        return native.linear(a.operands, _fake(a))
    return in_chunks(cpu_matmul, a.operands, a.dtype)


if HAS_TRITON:

    @dual_scale_linear.on("cuda", "triton")
    def linear_cuda(a: DualScaleLinear) -> Tensor:
        """Launch on the device that holds q, with the tiles of its architecture."""
        return gemm_triton.launch_tiled(a.operands, _fake(a))
