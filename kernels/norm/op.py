"""LayerNorm, modulation and static quantization in one pass: what stands before every modulated linear of a DiT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxq.kernels import native
from fxq.kernels.arguments import NormQuantize, NormQuantizePerToken, Quantization, QuantizeAct
from fxq.kernels.jit import HAS_TRITON
from fxq.kernels.norm import triton as norm_triton
from fxq.kernels.op import declare
from fxq.kernels.quantize.op import FLOATS, quantize_act, quantize_chunks, unfit_groups

Normed = NormQuantize | NormQuantizePerToken
"""A norm, its modulation, and how the result is quantized."""


def unfit_norm(a: Normed) -> str:
    """Why the tensors of a norm do not fit each other, or ""."""
    x, weight, bias, gain, shift = a.x, a.weight, a.bias, a.gain, a.shift
    if x.ndim != 3 or x.dtype not in FLOATS:
        return f"x is {x.dtype} {tuple(x.shape)}: expected float32, bfloat16 or float16 [B, S, K]"
    batch, rows, width = x.shape
    for name, affine in (("weight", weight), ("bias", bias)):
        if affine is not None and (affine.dtype not in FLOATS or affine.shape != (width,)):
            return f"{name} is {affine.dtype} {tuple(affine.shape)}: expected float ({width},) or None"
    if (gain is None) != (shift is None):
        return "gain and shift: expected both or none"
    for name, frames in (("gain", gain), ("shift", shift)):
        if frames is None:
            continue
        if frames.dtype not in FLOATS or frames.ndim != 3 or frames.shape[0] != batch or frames.shape[2] != width:
            return f"{name} is {frames.dtype} {tuple(frames.shape)}: expected float [{batch}, F, {width}]"
        if frames.shape[1] == 0 or rows % frames.shape[1]:
            return f"{name} has {frames.shape[1]} frames: the {rows} rows do not split into them"
    if gain is not None and shift is not None and gain.shape != shift.shape:
        return f"gain is {tuple(gain.shape)}, shift {tuple(shift.shape)}: expected the same shape"
    return ""


def _supports(a: NormQuantize) -> str:
    return unfit_norm(a) or unfit_groups(a.x.shape[-1], a.quantization)


def _fake(a: NormQuantize) -> Tensor:
    return a.x.new_empty(a.x.shape, dtype=torch.int8)


def norm_samples() -> Sequence[NormQuantize]:
    """Arguments of :func:`norm_quantize`."""
    random = torch.Generator().manual_seed(3)
    cases: list[NormQuantize] = []
    for shape, frames, affine, split, bits, dtype, gather in (
        ((1, 6, 96), 3, False, 96, 8, torch.float32, False),
        ((2, 10, 160), 2, False, 128, 8, torch.bfloat16, True),
        ((2, 7, 75), 1, True, 50, 6, torch.float32, True),
        ((1, 5, 64), 0, True, 64, 8, torch.bfloat16, False),
        ((2, 0, 64), 1, False, 32, 8, torch.float16, True),
    ):
        batch, _, width = shape
        groups = 1 if split == width else 2

        def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*size, generator=random, dtype=torch.float32).to(dtype)

        cases.append(
            NormQuantize(
                normal(*shape),
                normal(width) if affine else None,
                normal(width) if affine else None,
                normal(batch, frames, width) if frames else None,
                normal(batch, frames, width) if frames else None,
                1e-6,
                Quantization(
                    torch.randperm(width, generator=random).to(torch.int32) if gather else None,
                    torch.rand(groups, generator=random, dtype=torch.float32) * 0.05 + 0.02,
                    torch.randint(-20, 20, (groups,), generator=random, dtype=torch.int32),
                    split,
                    bits,
                ),
            )
        )
    return cases


@declare(NormQuantize, fake=_fake, samples=norm_samples, supports=_supports, max_error=2**-6)
def norm_quantize(a: NormQuantize) -> Tensor:
    """``quantize_act(layer_norm(x) * (1 + gain) + shift)``, in float32 up to the store.

    A row counts as not finite where what is quantized is not, or where its variance overflows. Kernels may differ from
    the reference by one integer where the value lies within their float error of a rounding
    boundary.

    Returns:
        int8 [B, S, K], contiguous.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    return quantize_act.compute(QuantizeAct(modulated_norm(a), a.quantization))


def modulated_norm(a: Normed) -> Tensor:
    """Float32 [B, S, K] of the norm and its modulation; NaN in rows whose variance overflows."""
    values = _layer_norm(a)
    if a.gain is None or a.shift is None:
        return values
    frames = a.gain.shape[1]
    values = values.unflatten(1, (frames, a.x.shape[1] // frames))
    return (values * (1 + a.gain.float()).unsqueeze(2) + a.shift.float().unsqueeze(2)).flatten(1, 2)


def modulated_norm_in_place(a: Normed) -> Tensor:
    """As :func:`modulated_norm` with one tensor for all that is in between."""
    values = _layer_norm(a)
    if a.gain is not None and a.shift is not None:
        framed = values.unflatten(1, (a.gain.shape[1], a.x.shape[1] // a.gain.shape[1]))
        framed.mul_((1 + a.gain.float()).unsqueeze(2)).add_(a.shift.float().unsqueeze(2))
    return values


def _layer_norm(a: Normed) -> Tensor:
    """Float32 norm of x; NaN in rows whose variance overflows, which torch takes for zeros."""
    weight, bias = (None if t is None else t.float() for t in (a.weight, a.bias))
    values, _, inverse = torch.native_layer_norm(a.x.float(), (a.x.shape[-1],), weight, bias, a.eps)
    overflown = ~(inverse > 0)
    if overflown.is_cpu and not bool(overflown.any()):
        return values
    return values.masked_fill(overflown, torch.nan)


@norm_quantize.on("cpu", native.or_else("eager"))
def norm_quantize_cpu(a: NormQuantize) -> Tensor:
    """Native kernel, else the norm in eager and the quantization in chunks."""
    if a.x.dtype != torch.float16 and native.ready():
        return native.quantize_act(a, _fake(a))
    return quantize_chunks(QuantizeAct(modulated_norm_in_place(a), a.quantization))


if HAS_TRITON:

    @norm_quantize.on("cuda", "triton")
    def norm_quantize_cuda(a: NormQuantize) -> Tensor:
        """Launch on the device that holds x."""
        with torch.cuda.device(a.x.device):
            return norm_triton.launch(a)
