"""The float8 twins of the quantize operators and linears: e4m3 activations and weights, for GPUs from sm_89 on.

Blackwell's data-centre GPUs have no fast int8 path in Triton, and Hopper overlaps float8 products with their loads but
not int8 ones. :mod:`fxq.kernels.float8` is what they compute. No CPU multiplies float8: the references run there, in
float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxq.kernels import float8
from fxq.kernels.arguments import Operands
from fxq.kernels.arguments_fp8 import (
    DualScaleLinearFp8,
    DualScaleLinearFp8PerToken,
    QuantizeFp8,
    QuantizeFp8PerToken,
)
from fxq.kernels.gemm import triton as gemm_triton
from fxq.kernels.gemm import triton_fp8 as fp8_triton
from fxq.kernels.gemm import triton_per_token as per_token_triton
from fxq.kernels.gemm.op import OUTPUTS
from fxq.kernels.jit import HAS_TRITON
from fxq.kernels.op import declare
from fxq.kernels.quantize.op import FLOATS

FP8 = float8.E4M3
LARGEST = float8.LARGEST
ON_CPU = "reference in float32"
"""What runs on a CPU, none of which multiplies float8."""
NOTE = (
    "FP8 layers run on reference operators in float32 here: a CPU has no FP8 arithmetic, so they are smaller than the "
    "float model and no faster. GPUs from sm_89 on multiply FP8"
)
"""What a report says of float8 layers on a CPU."""


def unusable(device: str) -> str:
    """Why float8 linears do not run on a device such as "cuda:0", or ""."""
    if not device.startswith("cuda") or not HAS_TRITON or not torch.cuda.is_available():
        return ""
    return fp8_triton.too_old(torch.cuda.get_device_capability(device))


def _groups(width: int, split: int) -> int:
    return 1 if split == width else 2


def _unfit_scales(width: int, split: int, scales: Sequence[tuple[str, Tensor, tuple[int, ...]]]) -> str:
    """Why split or one of (name, scale, shape after the groups) is not well formed, or ""."""
    if not 0 < split <= width:
        return f"split = {split}: expected 1..{width}, the number of normal channels"
    groups = _groups(width, split)
    for name, scale, rest in scales:
        if scale.dtype != torch.float32 or scale.shape != (groups, *rest):
            form = f"float32 {(groups, *rest)} for split = {split}"
            return f"{name} is {scale.dtype} {tuple(scale.shape)}: expected {form}"
    return ""


def _unfit_input(x: Tensor, perm: Tensor | None) -> str:
    """Why activations, or the order of their channels, are not supported, or ""."""
    if x.ndim < 1 or x.dtype not in FLOATS:
        return f"x is {x.dtype} {tuple(x.shape)}: expected float32, bfloat16 or float16 [..., K]; cast it first"
    width = x.shape[-1]
    if perm is not None and (perm.dtype != torch.int32 or perm.shape != (width,)):
        return f"perm is {perm.dtype} {tuple(perm.shape)}: expected int32 ({width},), or None to keep the order"
    return ""


def _ordered(x: Tensor, perm: Tensor | None) -> Tensor:
    return x if perm is None else x.index_select(-1, perm)


def _quantize_supports(a: QuantizeFp8) -> str:
    return _unfit_input(a.x, a.perm) or _unfit_scales(a.x.shape[-1], a.split, [("scale", a.scale, ())])


def _quantize_fake(a: QuantizeFp8) -> Tensor:
    return a.x.new_empty(a.x.shape, dtype=FP8)


def _quantize_samples() -> Sequence[QuantizeFp8]:
    random = torch.Generator().manual_seed(5)
    cases: list[QuantizeFp8] = []
    for shape, split, dtype, gather in (
        ((5, 96), 96, torch.float32, False),
        ((2, 7, 130), 64, torch.bfloat16, True),
        ((0, 64), 32, torch.float16, False),
    ):
        x = torch.randn(shape, generator=random, dtype=torch.float32).to(dtype)
        perm = torch.randperm(shape[-1], generator=random).to(torch.int32) if gather else None
        scale = torch.rand(1 if split == shape[-1] else 2, generator=random, dtype=torch.float32) * 0.01 + 0.002
        cases.append(QuantizeFp8(x, perm, scale, split))
    return cases


@declare(QuantizeFp8, fake=_quantize_fake, samples=_quantize_samples, supports=_quantize_supports)
def quantize_fp8(a: QuantizeFp8) -> Tensor:
    """``x * (1 / scale[g])`` in float8_e4m3fn, rounded half to even, saturating at +-448; NaN where x is not finite.

    Returns:
        float8_e4m3fn [..., K], contiguous.

    Raises:
        ValueError: on a wrong dtype or shape; on a GPU older than sm_89.
    """
    return float8.quantize_input(_ordered(a.x, a.perm), a.scale, a.split).contiguous()


def _per_token_supports(a: QuantizeFp8PerToken) -> str:
    return _unfit_input(a.x, a.perm) or _unfit_scales(a.x.shape[-1], a.split, [])


def _per_token_fake(a: QuantizeFp8PerToken) -> tuple[Tensor, Tensor]:
    shape = (*a.x.shape[:-1], _groups(a.x.shape[-1], a.split))
    return a.x.new_empty(a.x.shape, dtype=FP8), a.x.new_empty(shape, dtype=torch.float32)


def _per_token_samples() -> Sequence[QuantizeFp8PerToken]:
    random = torch.Generator().manual_seed(7)
    cases: list[QuantizeFp8PerToken] = []
    for shape, split, dtype, gather in (
        ((5, 96), 96, torch.float32, False),
        ((2, 7, 130), 64, torch.bfloat16, True),
        ((0, 64), 32, torch.float16, False),
    ):
        x = torch.randn(shape, generator=random, dtype=torch.float32).to(dtype)
        x[..., :1, :] = 0
        perm = torch.randperm(shape[-1], generator=random).to(torch.int32) if gather else None
        cases.append(QuantizeFp8PerToken(x, perm, split))
    return cases


@declare(
    QuantizeFp8PerToken,
    fake=_per_token_fake,
    samples=_per_token_samples,
    supports=_per_token_supports,
    results=("q", "scale"),
)
def quantize_fp8_per_token(a: QuantizeFp8PerToken) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn with one scale per token, or with one per token and channel group, as fxq.kernels.float8 says.

    Returns:
        float8_e4m3fn [..., K] and the scales float32 [..., G], contiguous; G = 2 when ``split < K``, else 1. What is
        not finite has the scale NaN.

    Raises:
        ValueError: on a wrong dtype or shape; on a GPU older than sm_89.
    """
    q, scale = float8.quantize_per_token(_ordered(a.x, a.perm), a.split)
    return q.contiguous(), scale.contiguous()


def _unfit_product(q: Tensor, weight: Tensor, offset: Tensor, dtype: torch.dtype, source: str) -> str:
    """Why what a float8 linear multiplies does not fit, or ""."""
    if dtype not in OUTPUTS:
        return f"dtype = {dtype}: expected float32, bfloat16 or float16"
    if q.ndim < 1 or q.dtype != FP8:
        return f"q is {q.dtype} {tuple(q.shape)}: expected {FP8} [..., K] from {source}"
    if offset.dtype != torch.float32 or offset.ndim != 1:
        return f"offset is {offset.dtype} {tuple(offset.shape)}: expected float32 [N]"
    outputs, width = offset.shape[0], q.shape[-1]
    if weight.dtype != FP8 or weight.shape != (outputs, width):
        form = f"{FP8} ({outputs}, {width}) for an offset of {outputs}"
        return f"weight is {weight.dtype} {tuple(weight.shape)}: expected {form}"
    return ""


def _linear_supports(a: DualScaleLinearFp8) -> str:
    if reason := _unfit_product(a.q, a.weight, a.offset, a.dtype, "quantize_fp8"):
        return reason
    scales = [("weight_scale", a.weight_scale, (a.offset.shape[0],)), ("input_scale", a.input_scale, ())]
    return _unfit_scales(a.q.shape[-1], a.split, scales)


def _linear_fake(a: DualScaleLinearFp8 | DualScaleLinearFp8PerToken) -> Tensor:
    return a.operands.empty(a.dtype)


def _linear_samples() -> Sequence[DualScaleLinearFp8]:
    random = torch.Generator().manual_seed(6)
    cases: list[DualScaleLinearFp8] = []
    for shape, outputs, split, dtype in (
        ((5, 96), 40, 96, torch.float32),
        ((2, 9, 160), 33, 128, torch.bfloat16),
        ((17, 75), 19, 50, torch.float32),
        ((0, 64), 16, 32, torch.float16),
    ):
        groups = 1 if split == shape[-1] else 2
        q = torch.randn(shape, generator=random, dtype=torch.float32).mul(60).to(FP8)
        weight = torch.randn(outputs, shape[-1], generator=random, dtype=torch.float32).mul(60).to(FP8)
        weight_scale = torch.rand(groups, outputs, generator=random, dtype=torch.float32) * 0.01 + 0.001
        input_scale = torch.rand(groups, generator=random, dtype=torch.float32) * 0.05 + 0.005
        offset = torch.randn(outputs, generator=random, dtype=torch.float32)
        cases.append(DualScaleLinearFp8(q, weight, weight_scale, input_scale, offset, split, dtype))
    return cases


@declare(DualScaleLinearFp8, fake=_linear_fake, samples=_linear_samples, supports=_linear_supports, max_error=2**-7)
def dual_scale_linear_fp8(a: DualScaleLinearFp8) -> Tensor:
    """Linear layer on float8, ``sum_g s_x[g] s_w[g, n] sum_k q w + offset[n]``, accumulated in float32.

    Hopper's tensor cores keep about 14 bits of a float8 sum within a product; the others keep all of float32.

    Returns:
        ``dtype`` [..., N], contiguous.

    Raises:
        ValueError: on a wrong dtype or shape; on a GPU older than sm_89.
    """
    return _product(a.operands).to(a.dtype).contiguous()


def _product(a: Operands) -> Tensor:
    return float8.matmul(a.q, a.input_scale, a.weight, a.weight_scale, a.offset, a.split)


def _linear_per_token_supports(a: DualScaleLinearFp8PerToken) -> str:
    if reason := _unfit_product(a.q, a.weight, a.offset, a.dtype, "quantize_fp8_per_token"):
        return reason
    width, rest = a.q.shape[-1], (a.offset.shape[0],)
    if reason := _unfit_scales(width, a.split, [("weight_scale", a.weight_scale, rest)]):
        return reason
    wanted = (*a.q.shape[:-1], _groups(width, a.split))
    if a.input_scale.dtype != torch.float32 or a.input_scale.shape != wanted:
        return f"input_scale is {a.input_scale.dtype} {tuple(a.input_scale.shape)}: expected float32 {tuple(wanted)}"
    return ""


def _linear_per_token_samples() -> Sequence[DualScaleLinearFp8PerToken]:
    random = torch.Generator().manual_seed(8)
    cases: list[DualScaleLinearFp8PerToken] = []
    for q, weight, weight_scale, scale, offset, split, dtype in _linear_samples():
        rows = torch.rand((*q.shape[:-1], len(scale)), generator=random, dtype=torch.float32) * 0.05 + 0.005
        cases.append(DualScaleLinearFp8PerToken(q, rows, weight, weight_scale, offset, split, dtype))
    return cases


@declare(
    DualScaleLinearFp8PerToken,
    fake=_linear_fake,
    samples=_linear_per_token_samples,
    supports=_linear_per_token_supports,
    max_error=2**-7,
)
def dual_scale_linear_fp8_per_token(a: DualScaleLinearFp8PerToken) -> Tensor:
    """As :func:`dual_scale_linear_fp8` with input scales of their own for every row of q.

    Returns:
        ``dtype`` [..., N], contiguous; a row whose scale is NaN is NaN.

    Raises:
        ValueError: on a wrong dtype or shape; on a GPU older than sm_89.
    """
    return _product(a.operands).to(a.dtype).contiguous()


quantize_fp8.on("cpu", ON_CPU)(quantize_fp8.compute)
quantize_fp8_per_token.on("cpu", ON_CPU)(quantize_fp8_per_token.compute)
dual_scale_linear_fp8.on("cpu", ON_CPU)(dual_scale_linear_fp8.compute)
dual_scale_linear_fp8_per_token.on("cpu", ON_CPU)(dual_scale_linear_fp8_per_token.compute)

if HAS_TRITON:

    @quantize_fp8.on("cuda", "triton")
    def quantize_fp8_cuda(a: QuantizeFp8) -> Tensor:
        """Launch on the device that holds x."""
        with torch.cuda.device(a.x.device):
            fp8_triton.check_device()
            return fp8_triton.launch(a)

    @dual_scale_linear_fp8.on("cuda", "triton")
    def linear_fp8_cuda(a: DualScaleLinearFp8) -> Tensor:
        """Launch on the device that holds q."""
        with torch.cuda.device(a.q.device):
            fp8_triton.check_device()
            return gemm_triton.launch_tiled(a.operands, _linear_fake(a))

    @quantize_fp8_per_token.on("cuda", "triton")
    def quantize_fp8_per_token_cuda(a: QuantizeFp8PerToken) -> tuple[Tensor, Tensor]:
        """Launch on the device that holds x."""
        with torch.cuda.device(a.x.device):
            fp8_triton.check_device()
            return fp8_triton.launch_per_token(a)

    @dual_scale_linear_fp8_per_token.on("cuda", "triton")
    def linear_fp8_per_token_cuda(a: DualScaleLinearFp8PerToken) -> Tensor:
        """Launch on the device that holds q, with the tiles of its architecture."""
        with torch.cuda.device(a.q.device):
            fp8_triton.check_device()
            return per_token_triton.linear_tiled(a.operands, _linear_fake(a))
