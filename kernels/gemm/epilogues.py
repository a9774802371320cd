"""The integer product with what follows it in one pass: activation and the next layer's quantize, or gate and residual.

The operands are those of :func:`fxq.kernels.gemm.op.dual_scale_linear`. The product stays float32 up to the store, so a
fused layer rounds once where separate nodes in a 16-bit model round three times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxq import numerics
from fxq.kernels import native
from fxq.kernels.arguments import DualScaleLinearAdd, DualScaleLinearQuantize, QuantizeAct
from fxq.kernels.gemm import per_token
from fxq.kernels.gemm import triton as gemm_triton
from fxq.kernels.gemm import triton_per_token as per_token_triton
from fxq.kernels.gemm.activations import ACTIVATIONS
from fxq.kernels.gemm.op import (
    CHUNK,
    ON_CPU,
    OUTPUTS,
    Finish,
    cpu_matmul,
    exact_matmul,
    in_chunks,
    sample_operands,
    unfit,
)
from fxq.kernels.jit import HAS_TRITON
from fxq.kernels.op import declare
from fxq.kernels.quantize.op import launch as launch_quantize
from fxq.kernels.quantize.op import round_rows, unfit_groups


def _quantize_supports(a: DualScaleLinearQuantize) -> str:
    if reason := unfit(a.operands):
        return reason
    if a.activation not in ACTIVATIONS:
        return f"activation = {a.activation!r}: expected one of {', '.join(ACTIVATIONS)}"
    return unfit_groups(a.operands.outputs, a.quantization, prefix="out_")


def _quantize_fake(a: DualScaleLinearQuantize) -> Tensor:
    return a.operands.empty(torch.int8)


def _quantize_samples() -> Sequence[DualScaleLinearQuantize]:
    random = torch.Generator().manual_seed(1)
    cases: list[DualScaleLinearQuantize] = []
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
        cases.append(DualScaleLinearQuantize(operands, activation, scale, zero_point, out_split, out_bits))
    return cases


@declare(
    DualScaleLinearQuantize,
    fake=_quantize_fake,
    samples=_quantize_samples,
    supports=_quantize_supports,
    max_error=2**-6,
)
def dual_scale_linear_quantize(a: DualScaleLinearQuantize) -> Tensor:
    """Linear, activation and the quantization that the next layer would do, without a float tensor in between.

    A row that is not finite before the quantization is marked as :func:`fxq.numerics.quantize_input` does. Kernels may
    differ from the reference by one integer where the value lies within their float error of a rounding boundary.

    Returns:
        int8 [..., N], contiguous.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    values = ACTIVATIONS[a.activation].reference(in_chunks(exact_matmul, a.operands, torch.float32))
    return numerics.quantize_input(values, *a.quantization[1:]).contiguous()


@dual_scale_linear_quantize.on("cpu", ON_CPU)
def linear_quantize_cpu(a: DualScaleLinearQuantize) -> Tensor:
    """Native kernel for panels, else chunk by chunk, so that no [M, N] float tensor is made."""
    if a.operands.weight.ndim == 4 and native.ready():
        known = native.activation_code(a.activation) >= 0
        return native.linear_quantize(a, _quantize_fake(a)) if known else _native_then_torch(a)

    def finish(values: Tensor, rows: slice) -> Tensor:
        return _finished(values, a)

    return in_chunks(cpu_matmul, a.operands, torch.int8, finish)


def _finished(values: Tensor, a: DualScaleLinearQuantize) -> Tensor:
    """The integers, in float32, of a product's float32 [M, N], which may be overwritten."""
    return round_rows(ACTIVATIONS[a.activation].reference(values), a.quantization)


def _native_then_torch(a: DualScaleLinearQuantize) -> Tensor:
    """The native product of panels, chunk by chunk, with an activation that only torch has."""
    rows, out = a.operands.q.reshape(-1, a.operands.width), _quantize_fake(a)
    flat, step = out.view(rows.shape[0], a.operands.outputs), max(1, CHUNK // max(1, a.operands.outputs))
    for chunk, integers in zip(rows.split(step), flat.split(step), strict=True):
        part = a.operands._replace(q=chunk)
        integers.copy_(_finished(native.linear(part, part.empty(torch.float32)), a))
    return out


def _add_supports(a: DualScaleLinearAdd) -> str:
    return unfit(a.operands) or _unfit_added(a)


def _add_per_token_supports(a: DualScaleLinearAdd) -> str:
    return per_token.unfit(a.operands) or _unfit_added(a)


def _unfit_added(a: DualScaleLinearAdd) -> str:
    operands, residual, gate = a
    q = operands.q
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


def _add_fake(a: DualScaleLinearAdd) -> Tensor:
    return torch.empty_like(a.residual, memory_format=torch.contiguous_format)


def _add_samples(measured: bool = False) -> Sequence[DualScaleLinearAdd]:
    """Arguments; ``measured``: with scales per token, every second time with zero points too."""
    random = torch.Generator().manual_seed(2)
    cases: list[DualScaleLinearAdd] = []
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
        operands = sample_operands(shape, outputs, split, bits, random, panels)
        if measured:
            sizes = shape, outputs, split, bits, torch.float32
            tokens = per_token.sample_arguments(*sizes, random, panels, asymmetric=len(cases) % 2 == 1)
            operands = tokens.operands
        cases.append(DualScaleLinearAdd(operands, residual, gate))
    return cases


def _add_per_token_samples() -> Sequence[DualScaleLinearAdd]:
    return _add_samples(measured=True)


@declare(DualScaleLinearAdd, fake=_add_fake, samples=_add_samples, supports=_add_supports, max_error=2**-7)
def dual_scale_linear_add(a: DualScaleLinearAdd) -> Tensor:
    """``residual + gate * linear(q)``, summed in float32.

    Returns:
        [B, S, N] in the residual's dtype, contiguous.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    return _added(a, in_chunks(exact_matmul, a.operands, torch.float32))


@declare(
    DualScaleLinearAdd,
    fake=_add_fake,
    samples=_add_per_token_samples,
    supports=_add_per_token_supports,
    max_error=2**-7,
)
def dual_scale_linear_per_token_add(a: DualScaleLinearAdd) -> Tensor:
    """As :func:`dual_scale_linear_add` with scales per token, and zero points where they lie behind the scales.

    Returns:
        [B, S, N] in the residual's dtype, contiguous.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    return _added(a, per_token.in_chunks(exact_matmul, a.operands, torch.float32))


def _added(a: DualScaleLinearAdd, values: Tensor) -> Tensor:
    """The result of a product's float32 [B, S, N]."""
    if a.gate is not None:
        frames = a.gate.shape[1]
        values = values.unflatten(1, (frames, values.shape[1] // frames))
        values = (values * a.gate.float().unsqueeze(2)).flatten(1, 2)
    return (a.residual.float() + values).to(a.residual.dtype).contiguous()


@dual_scale_linear_add.on("cpu", ON_CPU)
def linear_add_cpu(a: DualScaleLinearAdd) -> Tensor:
    """Native kernel for panels, else chunk by chunk."""
    if _is_native(a):
        return native.linear_add(a, _add_fake(a))
    return in_chunks(cpu_matmul, a.operands, a.residual.dtype, _adding(a))


@dual_scale_linear_per_token_add.on("cpu", ON_CPU)
def linear_per_token_add_cpu(a: DualScaleLinearAdd) -> Tensor:
    """As :func:`linear_add_cpu`."""
    if _is_native(a):
        return native.linear_add(a, _add_fake(a))
    return per_token.in_chunks(per_token.cpu_matmul(a.operands), a.operands, a.residual.dtype, _adding(a))


def _is_native(a: DualScaleLinearAdd) -> bool:
    return a.operands.weight.ndim == 4 and a.residual.dtype != torch.float16 and native.ready()


def _adding(a: DualScaleLinearAdd) -> Finish:
    """Gate and residual of a chunk of rows."""
    operands, residual, gate = a
    rest = residual.reshape(-1, operands.outputs)
    tokens = 1 if gate is None else residual.shape[1] // gate.shape[1]
    gates = None if gate is None else gate.reshape(-1, operands.outputs).float()

    def finish(values: Tensor, rows: slice) -> Tensor:
        if gates is not None:
            frame = torch.arange(rows.start, rows.stop, device=gates.device) // max(1, tokens)
            values = values * gates[frame]
        return rest[rows].float() + values

    return finish


if HAS_TRITON:

    @dual_scale_linear_quantize.on("cuda", "triton")
    def linear_quantize_cuda(a: DualScaleLinearQuantize) -> Tensor:
        """Launch on the device that holds q; twice where the activation between is torch's alone."""
        activation = ACTIVATIONS[a.activation]
        if activation.triton is not None:
            return gemm_triton.launch_tiled(a.operands, _quantize_fake(a), gemm_triton.quantizing(a))
        values = activation.reference(gemm_triton.launch_tiled(a.operands, a.operands.empty(torch.float32)))
        with torch.cuda.device(values.device):
            return launch_quantize(QuantizeAct(values, a.quantization))

    @dual_scale_linear_add.on("cuda", "triton")
    def linear_add_cuda(a: DualScaleLinearAdd) -> Tensor:
        """Launch on the device that holds q."""
        return gemm_triton.launch_tiled(a.operands, _add_fake(a), gemm_triton.adding(a))

    @dual_scale_linear_per_token_add.on("cuda", "triton")
    def linear_per_token_add_cuda(a: DualScaleLinearAdd) -> Tensor:
        """Launch on the device that holds q."""
        return per_token_triton.linear_tiled(a.operands, _add_fake(a), gemm_triton.adding(a))
