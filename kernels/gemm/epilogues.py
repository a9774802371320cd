"""The integer product with what follows it in one pass: activation and the next layer's quantize, or gate and residual.

The operands are those of :func:`fxq.kernels.gemm.op.dual_scale_linear`. The product stays float32 up to the store, so a
fused layer rounds once where separate nodes in a 16-bit model round three times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxq import numerics
from fxq.kernels import native
from fxq.kernels.gemm import triton as gemm_triton
from fxq.kernels.gemm.op import ON_CPU, OUTPUTS, cpu_matmul, exact_matmul, in_chunks, sample_operands, unfit
from fxq.kernels.jit import HAS_TRITON
from fxq.kernels.op import Arguments, declare
from fxq.kernels.operands import Operands
from fxq.kernels.quantize.op import round_rows

ACTIVATIONS = ("none", "gelu", "gelu_tanh")


def activate(x: Tensor, activation: str) -> Tensor:
    """One of ``ACTIVATIONS`` on float32."""
    if activation == "none":
        return x
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _quantize_supports(*arguments: Any) -> str:
    operands = Operands(*arguments[:7])
    activation, out_scale, out_zero_point, out_split, out_bits = arguments[7:]
    if reason := unfit(operands):
        return reason
    if activation not in ACTIVATIONS:
        return f"activation = {activation!r}: expected one of {', '.join(ACTIVATIONS)}"
    if not 2 <= out_bits <= 8:
        return f"out_bits = {out_bits}: expected 2..8"
    if not 0 < out_split <= operands.outputs:
        return f"out_split = {out_split}: expected 1..{operands.outputs}, the number of normal channels of the result"
    groups = 1 if out_split == operands.outputs else 2
    for name, tensor, dtype in (
        ("out_scale", out_scale, torch.float32),
        ("out_zero_point", out_zero_point, torch.int32),
    ):
        if tensor.dtype != dtype or tensor.shape != (groups,):
            form = f"{dtype} ({groups},) for out_split = {out_split}"
            return f"{name} is {tensor.dtype} {tuple(tensor.shape)}: expected {form}"
    return ""


def _quantize_fake(*arguments: Any) -> Tensor:
    return _integers(Operands(*arguments[:7]))


def _integers(operands: Operands) -> Tensor:
    """An unfilled int8 result."""
    return operands.q.new_empty((*operands.q.shape[:-1], operands.outputs))


def _quantize_samples() -> Sequence[Arguments]:
    random = torch.Generator().manual_seed(1)
    cases: list[Arguments] = []
    for shape, outputs, split, bits, activation, out_split, out_bits, panels in (
        ((5, 96), 40, 96, 8, "gelu_tanh", 32, 8, False),
        ((2, 9, 160), 65, 128, 8, "gelu", 65, 8, True),
        ((17, 75), 130, 50, 8, "gelu_tanh", 97, 6, True),
        ((7, 128), 64, 96, 4, "none", 32, 8, False),
        ((0, 64), 16, 32, 8, "gelu_tanh", 16, 8, False),
    ):
        groups = 1 if out_split == outputs else 2
        scale = torch.rand(groups, generator=random, dtype=torch.float32) * 0.1 + 0.02
        zero_point = torch.randint(-20, 20, (groups,), generator=random, dtype=torch.int32)
        operands = sample_operands(shape, outputs, split, bits, random, panels)
        cases.append((*operands, activation, scale, zero_point, out_split, out_bits))
    return cases


@declare(
    "dual_scale_linear_quantize(Tensor q, Tensor weight, Tensor weight_scale, Tensor input_scale, Tensor offset,"
    " int split, int bits, str activation, Tensor out_scale, Tensor out_zero_point, int out_split, int out_bits)"
    " -> Tensor",
    fake=_quantize_fake,
    samples=_quantize_samples,
    supports=_quantize_supports,
    max_error=2**-6,
)
def dual_scale_linear_quantize(
    q: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    offset: Tensor,
    split: int,
    bits: int,
    activation: str,
    out_scale: Tensor,
    out_zero_point: Tensor,
    out_split: int,
    out_bits: int,
) -> Tensor:
    """Linear, activation and the quantization that the next layer would do, without a float tensor in between.

    The rows of the weight are in the next layer's ``[normal | outlier]`` channel order. A row that is not finite before
    the quantization is marked as :func:`fxq.numerics.quantize_input` does. Kernels may differ from the
    reference by one integer where the value lies within their float error of a rounding boundary.

    Args:
        q: as all up to ``bits``, see :func:`fxq.kernels.gemm.op.dual_scale_linear`.
        weight: as there.
        weight_scale: as there.
        input_scale: as there.
        offset: as there.
        split: as there.
        bits: as there.
        activation: "none", "gelu" or "gelu_tanh", in float32.
        out_scale: float32 [G], positive; G = 2 when ``out_split < N``, else 1.
        out_zero_point: int32 [G].
        out_split: normal channels among the N outputs.
        out_bits: 2..8, width of the result's integers.

    Returns:
        int8 [..., N], contiguous.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    operands = Operands(q, weight, weight_scale, input_scale, offset, split, bits)
    values = activate(in_chunks(exact_matmul, operands, torch.float32), activation)
    return numerics.quantize_input(values, out_scale, out_zero_point, out_split, out_bits).contiguous()


@dual_scale_linear_quantize.on("cpu", ON_CPU)
def linear_quantize_cpu(*arguments: Any) -> Tensor:
    """Native kernel for panels, else chunk by chunk, so that no [M, N] float tensor is made."""
    operands = Operands(*arguments[:7])
    activation, scale, zero_point, split, bits = arguments[7:]
    if operands.weight.ndim == 4 and native.ready():
        return native.linear_quantize(operands, activation, scale, zero_point, split, bits, _integers(operands))

    def finish(values: Tensor, rows: slice) -> Tensor:
        return round_rows(activate(values, activation), scale, zero_point, split, bits)

    return in_chunks(cpu_matmul, operands, torch.int8, finish)


def _add_supports(*arguments: Any) -> str:
    operands = Operands(*arguments[:7])
    residual, gate = arguments[7:]
    q = operands.q
    if reason := unfit(operands):
        return reason
    if q.ndim != 3:
        return f"q has shape {tuple(q.shape)}: expected [B, S, K]"
    batch, rows, _ = q.shape
    if residual.dtype not in OUTPUTS or residual.shape != (batch, rows, operands.outputs):
        form = f"float [{batch}, {rows}, {operands.outputs}]"
        return f"residual is {residual.dtype} {tuple(residual.shape)}: expected {form}"
    if gate is None:
        return ""
    if gate.dtype not in OUTPUTS or gate.ndim != 3 or gate.shape[0] != batch or gate.shape[2] != operands.outputs:
        return f"gate is {gate.dtype} {tuple(gate.shape)}: expected float [{batch}, F, {operands.outputs}]"
    if gate.shape[1] == 0 or rows % gate.shape[1]:
        return f"gate has {gate.shape[1]} frames: the {rows} rows do not split into them"
    return ""


def _add_fake(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[7], memory_format=torch.contiguous_format)


def _add_samples() -> Sequence[Arguments]:
    random = torch.Generator().manual_seed(2)
    cases: list[Arguments] = []
    for shape, outputs, split, bits, dtype, frames, panels in (
        ((1, 6, 96), 40, 96, 8, torch.float32, 3, False),
        ((2, 14, 160), 65, 128, 8, torch.bfloat16, 2, True),
        ((1, 17, 75), 130, 50, 8, torch.float32, 1, True),
        ((2, 8, 128), 64, 96, 4, torch.bfloat16, 0, False),
        ((2, 0, 64), 16, 32, 8, torch.float32, 1, False),
    ):
        residual = torch.randn(*shape[:-1], outputs, generator=random, dtype=torch.float32).to(dtype)
        gate = (
            torch.randn(shape[0], frames, outputs, generator=random, dtype=torch.float32).to(dtype) if frames else None
        )
        cases.append((*sample_operands(shape, outputs, split, bits, random, panels), residual, gate))
    return cases


@declare(
    "dual_scale_linear_add(Tensor q, Tensor weight, Tensor weight_scale, Tensor input_scale, Tensor offset, int split,"
    " int bits, Tensor residual, Tensor? gate) -> Tensor",
    fake=_add_fake,
    samples=_add_samples,
    supports=_add_supports,
    max_error=2**-7,
)
def dual_scale_linear_add(
    q: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    offset: Tensor,
    split: int,
    bits: int,
    residual: Tensor,
    gate: Tensor | None,
) -> Tensor:
    """``residual + gate * linear(q)``, summed in float32.

    Args:
        q: int8 [B, S, K]; all up to ``bits`` as in :func:`fxq.kernels.gemm.op.dual_scale_linear`.
        weight: as there.
        weight_scale: as there.
        input_scale: as there.
        offset: as there.
        split: as there.
        bits: as there.
        residual: float32, bfloat16 or float16 [B, S, N].
        gate: float [B, F, N] or None for 1; row s of S takes frame ``s // (S / F)``.

    Returns:
        [B, S, N] in the residual's dtype, contiguous.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    operands = Operands(q, weight, weight_scale, input_scale, offset, split, bits)
    values = in_chunks(exact_matmul, operands, torch.float32)
    if gate is not None:
        frames = gate.shape[1]
        values = (values.unflatten(1, (frames, q.shape[1] // frames)) * gate.float().unsqueeze(2)).flatten(1, 2)
    return (residual.float() + values).to(residual.dtype).contiguous()


@dual_scale_linear_add.on("cpu", ON_CPU)
def linear_add_cpu(*arguments: Any) -> Tensor:
    """Native kernel for panels, else chunk by chunk."""
    operands = Operands(*arguments[:7])
    residual, gate = arguments[7:]
    q = operands.q
    if operands.weight.ndim == 4 and residual.dtype != torch.float16 and native.ready():
        return native.linear_add(operands, residual, gate, _add_fake(*arguments))
    rest = residual.reshape(-1, operands.outputs)
    tokens = 1 if gate is None else q.shape[1] // gate.shape[1]
    gates = None if gate is None else gate.reshape(-1, operands.outputs).float()

    def finish(values: Tensor, rows: slice) -> Tensor:
        if gates is not None:
            frame = torch.arange(rows.start, rows.stop, device=q.device) // max(1, tokens)
            values = values * gates[frame]
        return rest[rows].float() + values

    return in_chunks(cpu_matmul, operands, residual.dtype, finish)


if HAS_TRITON:

    @dual_scale_linear_quantize.on("cuda", "triton")
    def linear_quantize_cuda(*arguments: Any) -> Tensor:
        """Launch on the device that holds q."""
        operands = Operands(*arguments[:7])
        epilogue = gemm_triton.Quantize(*arguments[7:])
        return gemm_triton.launch_tiled(*operands[:6], out=_integers(operands), epilogue=epilogue)

    @dual_scale_linear_add.on("cuda", "triton")
    def linear_add_cuda(*arguments: Any) -> Tensor:
        """Launch on the device that holds q."""
        epilogue = gemm_triton.Add(*arguments[7:])
        return gemm_triton.launch_tiled(*Operands(*arguments[:7])[:6], out=_add_fake(*arguments), epilogue=epilogue)
