"""Cases that test_triton_interpret.py runs in a process of its own, where Triton interprets its kernels on a CPU."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fxq import numerics
from fxq.kernels.arguments import (
    ActivationQuantizePerToken,
    DualScaleLinearAdd,
    DualScaleLinearQuantize,
    NormQuantize,
    NormQuantizePerToken,
    Operands,
    Quantization,
    QuantizeAct,
    QuantizePerToken,
    RmsNormRope,
)
from fxq.kernels.arguments_fp8 import (
    DualScaleLinearFp8,
    DualScaleLinearFp8PerToken,
    QuantizeFp8,
    QuantizeFp8PerToken,
)
from fxq.kernels.gemm import (
    fp8,
    per_token,
)
from fxq.kernels.gemm import (
    triton as gemm_triton,
)
from fxq.kernels.gemm import (
    triton_fp8 as fp8_triton,
)
from fxq.kernels.gemm import (
    triton_per_token as per_token_triton,
)
from fxq.kernels.gemm.activated import activation_quantize_per_token, activation_quantize_per_token_asymmetric
from fxq.kernels.gemm.activations import ACTIVATIONS, Activation, add
from fxq.kernels.gemm.epilogues import (
    dual_scale_linear_add,
    dual_scale_linear_per_token_add,
    dual_scale_linear_quantize,
)
from fxq.kernels.gemm.op import dual_scale_linear, sample_operands
from fxq.kernels.gemm.tiles import Tiles
from fxq.kernels.jit import Block, jit, tl
from fxq.kernels.norm import triton as norm_triton
from fxq.kernels.norm import triton_per_token as norm_per_token_triton
from fxq.kernels.norm.op import norm_quantize
from fxq.kernels.norm.per_token import norm_quantize_per_token, norm_quantize_per_token_asymmetric
from fxq.kernels.quantize import triton_per_token as per_token_rows
from fxq.kernels.quantize.op import launch as launch_quantize
from fxq.kernels.rope import triton as rope_triton
from fxq.kernels.rope.op import rms_norm_rope
from tests.kernels.interpreted_cache import CASES as CACHE
from tests.kernels.interpreted_integers import CASES as INTEGERS
from tests.kernels.interpreted_not_finite import CASES as NOT_FINITE

INF = float("inf")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TILES = Tiles(32, 32, 64, warps=4, stages=2, group_m=2)
WIDE = Tiles(32, 256, 64, warps=4, stages=2, group_m=2)


def generator() -> torch.Generator:
    """Random numbers of a fixed seed."""
    return torch.Generator().manual_seed(7)


def noise(*shape: int) -> Tensor:
    """Float32 noise, wide enough to clip."""
    return torch.randn(shape, generator=generator()) * 3


def close(got: Tensor, want: Tensor, allowed: Tensor | float) -> None:
    """Every element is within what is allowed, and none was left unwritten."""
    error = (got.double() - want.double()).abs()
    assert got.shape == want.shape and got.dtype == want.dtype
    assert bool((error <= allowed).all()), f"largest error {error.max()}, all written: {bool(got.isfinite().all())}"


def same_integers(got: Tensor, want: Tensor) -> None:
    """Equal, but for less than 0.5 % that are one off at a rounding boundary."""
    difference = (got.int() - want.int()).abs()
    assert got.shape == want.shape and got.dtype == want.dtype == torch.int8
    assert not want.numel() or int(difference.max()) <= 1, f"largest difference {difference.max()}"
    assert int(difference.sum()) * 200 <= want.numel(), f"{int(difference.sum())} of {want.numel()} differ"


def linear(
    m: int, n: int, k: int, split: int, bits: int, exact: bool, scattered: bool = False, tiles: Tiles = TILES
) -> None:
    """One product against exact integers (unit scales, integer ratios) or against float64 within half a unit."""
    random = torch.Generator().manual_seed(m * n + k)
    low, high = numerics.integer_range(bits)
    groups = 1 if split == k else 2
    q = torch.randint(-128, 128, (m, k + 32), generator=random, dtype=torch.int8)[:, 32:]
    q = q if scattered else q.contiguous()
    w = torch.randint(low, high + 1, (n, k), generator=random, dtype=torch.int8)
    if exact:
        weight_scale = torch.ones(groups, n)
        weight_scale[1:] = torch.randint(1, 6, (groups - 1, n), generator=random).float()
        input_scale = torch.ones(groups)
        offset = torch.randint(-1000, 1000, (n,), generator=random).float()
    else:
        weight_scale = torch.rand(groups, n, generator=random) * 0.01 + 0.001
        input_scale = torch.rand(groups, generator=random) * 0.05 + 0.005
        offset = torch.randn(n, generator=random)
    unit = (input_scale.unsqueeze(1) * weight_scale).double()
    expected, magnitude = offset.double().expand(m, n), offset.double().abs().expand(m, n)
    for g, part in enumerate(numerics.group_slices(k, split)):
        product = (q[:, part].double() @ w[:, part].double().T) * unit[g]
        expected, magnitude = expected + product, magnitude + product.abs()
    assert not exact or bool((expected.abs() < 2**24).all())
    y = torch.full((m, n), float("nan"))
    stored = numerics.pack_int4(w) if bits <= 4 else w
    gemm_triton.launch(Operands(q, stored, weight_scale, input_scale, offset, split, bits), y, tiles=tiles)
    allowed = torch.zeros(n) if exact else 2**-22 * magnitude + (0.5 * unit[0] if groups == 2 else 0)
    close(y.double(), expected, allowed)


def rescale_of_large_integers() -> None:
    """Integers between 2**23 and 2**24 stay exact in the in-place rescale."""
    q = torch.full((1, 192), 127, dtype=torch.int8)
    q[:, 0] = 0
    w = torch.full((2, 192), 127, dtype=torch.int8)
    w[0, 191] = 126
    scale = torch.tensor([[1.0, 1.0], [9.0, 9.0]])
    expected = 9.0 * torch.tensor([[127 * 127 * 63 + 127 * 126, 127 * 127 * 64]]) + torch.tensor(127.0 * 127 * 127)
    y = torch.full((1, 2), float("nan"))
    tiles = Tiles(16, 16, 64, warps=4, stages=2)
    gemm_triton.launch(Operands(q, w, scale, torch.ones(2), torch.zeros(2), 128, 8), y, tiles=tiles)
    assert 2**23 < expected.max() < 2**24
    assert torch.equal(y, expected), (y, expected)


def panels_are_refused() -> None:
    """Weights of the CPU kernel are named."""
    operands = sample_operands((3, 64), 40, 64, 8, generator(), panels=True)
    try:
        gemm_triton.launch(operands, torch.empty(3, 40), tiles=TILES)
    except ValueError as error:
        assert "panels for the CPU kernel: expected [N, K] on cpu; lay the weights out" in str(error), error
    else:
        raise AssertionError("no error")


def linear_quantize(
    m: int,
    n: int,
    k: int,
    split: int,
    bits: int,
    activation: str,
    out_split: int,
    out_bits: int = 8,
    tiles: Tiles = TILES,
) -> None:
    """Product, activation and the next layer's integers."""
    operands = sample_operands((m, k), n, split, bits, generator())
    groups = 1 if out_split == n else 2
    deviation = float(dual_scale_linear.reference(*operands, F32).std())
    scale = torch.tensor([0.02, 0.05][:groups]) * deviation * 2 ** (8 - out_bits)
    zero_point = torch.tensor([-9, 3][:groups], dtype=torch.int32)
    arguments = DualScaleLinearQuantize(operands, activation, scale, zero_point, out_split, out_bits)
    want = dual_scale_linear_quantize.compute(arguments)
    assert want.unique().numel() > 2**out_bits // 3
    out = torch.full((m, n), 99, dtype=torch.int8)
    tiles = replace(tiles, swapped=bits <= 4)
    epilogue = gemm_triton.quantizing(arguments)
    same_integers(gemm_triton.launch(operands, out, tiles=tiles, epilogue=epilogue), want)


@jit
def _hardswish(x: Block) -> Block:
    return x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0


def linear_quantize_by_an_activation_from_outside() -> None:
    """The kernel is compiled with its function."""
    add(Activation("hardswish", F.hardswish, _hardswish))
    linear_quantize(37, 70, 160, 128, 8, "hardswish", 41)


def linear_quantize_without_rows() -> None:
    """No program runs."""
    operands = sample_operands((0, 64), 5, 64, 8, generator())
    arguments = DualScaleLinearQuantize(operands, "gelu", torch.ones(1), torch.zeros(1, dtype=torch.int32), 5, 8)
    out = operands.empty(torch.int8)
    assert gemm_triton.launch(operands, out, tiles=TILES, epilogue=gemm_triton.quantizing(arguments)) is out


def linear_add(
    shape: tuple[int, int, int], n: int, split: int, bits: int, frames: int, dtype: torch.dtype, tiles: Tiles = TILES
) -> None:
    """Residual and gate; the gate is a slice of a modulation of six, its rows lie apart."""
    operands = sample_operands(shape, n, split, bits, generator())
    residual = noise(*shape[:2], n).to(dtype)
    gate = noise(shape[0], frames, 6, n)[:, :, 2].to(dtype) if frames else None
    arguments = DualScaleLinearAdd(operands, residual, gate)
    want = dual_scale_linear_add.compute(arguments)
    out = torch.full(want.shape, float("nan"), dtype=dtype)
    tiles = replace(tiles, swapped=bits <= 4)
    gemm_triton.launch(operands, out, tiles=tiles, epilogue=gemm_triton.adding(arguments))
    rounding = 0.5 * float((operands.input_scale[0] * operands.weight_scale[0]).max()) * 9
    close(out, want, (2**-7 if dtype == BF16 else 2**-20) * want.abs().double() + rounding)
    for asymmetric in (False, True):
        sample = per_token.sample_arguments(shape, n, split, bits, F32, generator(), asymmetric=asymmetric)
        measured = DualScaleLinearAdd(sample.operands, residual, gate)
        out = torch.full(want.shape, float("nan"), dtype=dtype)
        per_token_triton.linear(sample.operands, out, tiles=tiles, epilogue=gemm_triton.adding(measured))
        sums = dual_scale_linear_per_token_add.compute(measured)
        close(out, sums, (2**-7 if dtype == BF16 else 2**-19) * float(sums.abs().max()))


def quantize(x: Tensor, scale: list[float], zero_point: list[int], split: int, bits: int, gather: bool) -> None:
    """Bit-equal integers."""
    perm = torch.randperm(x.shape[-1], generator=generator()).to(torch.int32)
    order = perm if gather else torch.arange(x.shape[-1])
    scales, zeros = torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32)
    expected = numerics.quantize_input(x[..., order], scales, zeros, split, bits)
    q = torch.full((x.numel() // x.shape[-1], x.shape[-1]), 99, dtype=torch.int8)
    arguments = QuantizeAct(x, Quantization(perm if gather else None, scales, zeros, split, bits))
    result = launch_quantize(arguments, blocks=(4, 64), out=q)
    assert result.shape == x.shape
    assert torch.equal(result, expected), f"{int((result != expected).sum())} of {x.numel()} integers differ"


def norm(
    shape: tuple[int, int, int], split: int, bits: int, dtype: torch.dtype, frames: int, affine: str, gather: bool
) -> None:
    """LayerNorm, modulation, gather and integers, with static scales and with scales per token.

    Gain and shift are slices of a modulation of six.
    """
    batch, _, width = shape
    modulation = torch.randn(batch, max(1, frames), 6, width, generator=generator()).to(dtype)
    gain, shift = (modulation[:, :, 1], modulation[:, :, 0]) if frames else (None, None)
    groups = 1 if split == width else 2
    arguments = NormQuantize(
        (noise(batch, shape[1], width + 16)[..., :width] + 0.7).to(dtype),
        torch.randn(width, generator=generator()).to(dtype) if "w" in affine else None,
        torch.randn(width, generator=generator()) if "b" in affine else None,
        gain,
        shift,
        1e-6,
        Quantization(
            torch.randperm(width, generator=generator()).to(torch.int32) if gather else None,
            torch.tensor([0.03, 0.011][:groups]),
            torch.tensor([-11, 4][:groups], dtype=torch.int32),
            split,
            bits,
        ),
    )
    out = torch.full(shape, 99, dtype=torch.int8)
    same_integers(norm_triton.launch(arguments, out=out), norm_quantize.compute(arguments))
    measured = NormQuantizePerToken(*arguments[:6], arguments.quantization.perm, split, bits)
    for asymmetric, op in ((False, norm_quantize_per_token), (True, norm_quantize_per_token_asymmetric)):
        want, scales = op.compute(measured)
        unwritten = torch.full(shape, 99, dtype=torch.int8), torch.full(scales.shape, float("nan"))
        q, scale = norm_per_token_triton.launch(measured, unwritten, asymmetric=asymmetric)
        same_integers(q, want)
        close(scale[..., :groups], scales[..., :groups], 2**-20 * scales[..., :groups].double())
        assert torch.equal(scale[..., groups:], scales[..., groups:])


def rope(shape: tuple[int, int, int], heads: int, dtype: torch.dtype, norm: bool, rotate: bool, merged: bool) -> None:
    """Norm and rotation; merged takes x out of a result three times as wide."""
    batch, positions, width = shape
    angle = torch.rand(positions, width // heads // 2, generator=generator()) * 6
    x = noise(batch, positions, 3 * width).to(dtype)
    x = x[..., width : 2 * width] if merged else x[..., :width].contiguous()
    weight = torch.randn(width, generator=generator()).to(dtype) if norm else None
    cos, sin = (angle.cos(), angle.sin()) if rotate else (None, None)
    arguments = RmsNormRope(x, weight, 1e-6, cos, sin, heads)
    want = rms_norm_rope.compute(arguments)
    out = torch.full(want.shape, float("nan"), dtype=dtype)
    close(rope_triton.launch(arguments, out=out), want, (2**-7 if dtype == BF16 else 2**-20) * 8)


def quantize_fp8(shape: tuple[int, ...], scale: list[float], split: int, dtype: torch.dtype, gather: bool) -> None:
    """Values that float8 holds, and large ones; the interpreter loses the carry when it rounds others."""
    width = shape[-1]
    perm = torch.randperm(width, generator=generator()).to(torch.int32)
    scales = torch.tensor(scale)
    held = noise(*shape).mul(20).clamp(-448, 448).to(fp8.FP8).float()
    held[..., ::7] *= 4096
    per_channel = scales[(torch.arange(width) >= split).long()]
    x = torch.empty(shape).index_copy(-1, perm.long(), held * per_channel) if gather else held * per_channel
    x = x.to(dtype)
    arguments = QuantizeFp8(x, perm if gather else None, scales, split)
    want = fp8.quantize_fp8.compute(arguments)
    got = fp8_triton.launch(arguments, out=torch.zeros(shape, dtype=fp8.FP8))
    assert got.dtype == want.dtype and bool((want.float().abs() == 448).any())
    close(got.float(), held.clamp(-448, 448), 0.0)
    close(want.float(), held.clamp(-448, 448), 0.0)


def linear_fp8(m: int, n: int, k: int, split: int) -> None:
    """Against float64."""
    groups = 1 if split == k else 2
    q, w = (noise(rows, k).mul(40).clamp(-448, 448).to(fp8.FP8) for rows in (m, n))
    weight_scale = torch.rand(groups, n, generator=generator()) * 0.01 + 0.001
    input_scale, offset = torch.tensor([0.03, 0.2][:groups]), noise(n)
    arguments = DualScaleLinearFp8(q, w, weight_scale, input_scale, offset, split, F32)
    y = gemm_triton.launch(arguments.operands, torch.full((m, n), float("nan")), tiles=TILES)
    want = fp8.dual_scale_linear_fp8.compute(arguments)
    close(y, want, 2**-18 * float(want.abs().max()))


def quantize_fp8_per_token(shape: tuple[int, ...], split: int, dtype: torch.dtype, gather: bool) -> None:
    """Rows whose largest value is 448 and whose others float8 holds, times a power of two; one row is zero."""
    width, groups = shape[-1], 1 if split == shape[-1] else 2
    held = noise(*shape).mul(20).clamp(-448, 448).to(fp8.FP8).float()
    held[..., 0] = 448
    held[..., split % width] = -448
    held = held.reshape(-1, width)
    units = 2.0 ** torch.randint(-9, 9, (len(held), groups), generator=generator())
    held[1], units[1] = 0, 1.0
    ordered = held * units[:, (torch.arange(width) >= split).long()]
    perm = torch.randperm(width, generator=generator()).to(torch.int32)
    x = torch.empty(ordered.shape).index_copy(-1, perm.long(), ordered) if gather else ordered
    arguments = QuantizeFp8PerToken(x.to(dtype).reshape(shape), perm if gather else None, split)
    want, scales = fp8.quantize_fp8_per_token.compute(arguments)
    q, scale = fp8_triton.launch_per_token(arguments)
    assert q.dtype == want.dtype and q.shape == want.shape and torch.equal(scale, scales)
    assert torch.equal(scale.reshape(-1, groups), units)
    close(q.float().reshape(-1, width), held, 0.0)
    close(want.float().reshape(-1, width), held, 0.0)


def linear_fp8_per_token(m: int, n: int, k: int, split: int) -> None:
    """Against the reference, to the rounding of float32."""
    groups = 1 if split == k else 2
    q, w = (noise(rows, k).mul(40).clamp(-448, 448).to(fp8.FP8) for rows in (m, n))
    weight_scale = torch.rand(groups, n, generator=generator()) * 0.01 + 0.001
    scale, offset = torch.rand(m, groups, generator=generator()) + 0.1, noise(n)
    arguments = DualScaleLinearFp8PerToken(q, scale, w, weight_scale, offset, split, F32)
    y = per_token_triton.linear(arguments.operands, torch.full((m, n), float("nan")), tiles=TILES)
    want = fp8.dual_scale_linear_fp8_per_token.compute(arguments)
    close(y, want, 2**-18 * float(want.abs().max()))


def quantize_per_token(
    x: Tensor, split: int, bits: int, gather: bool, max_block: int = 4096, asymmetric: bool = False
) -> None:
    """Bit-equal integers, scales and zero points; a narrow block reads a row in several steps."""
    width = x.shape[-1]
    perm = torch.randperm(width, generator=generator()).to(torch.int32) if gather else None
    arguments = QuantizePerToken(x, perm, split, bits)
    q, scale = per_token_rows.quantize(arguments, asymmetric=asymmetric, max_block=max_block)
    expected, scales = numerics.quantize_per_token(x if perm is None else x[..., perm], split, bits, asymmetric)
    assert q.shape == x.shape and torch.equal(q, expected), f"{int((q != expected).sum())} integers differ"
    assert scale.shape == scales.shape and torch.equal(scale, scales)


def activated_per_token(x: Tensor, name: str, split: int, gather: bool, max_block: int = 4096) -> None:
    """An activation before the scales, symmetric ones and with zero points."""
    perm = torch.randperm(x.shape[-1], generator=generator()).to(torch.int32) if gather else None
    a = ActivationQuantizePerToken(x, name, perm, split, 8)
    function = ACTIVATIONS[name].triton
    for asymmetric, op in ((False, activation_quantize_per_token), (True, activation_quantize_per_token_asymmetric)):
        tokens = QuantizePerToken(x, perm, split, 8)
        q, scale = per_token_rows.quantize(tokens, asymmetric=asymmetric, max_block=max_block, activation=function)
        want, scales = op.compute(a)
        same_integers(q, want)
        close(scale, scales, 2**-16 * scales.abs().double())


def linear_per_token(
    m: int,
    n: int,
    k: int,
    split: int,
    bits: int,
    exact: bool = False,
    tiles: Tiles = TILES,
    asymmetric: bool = False,
) -> None:
    """Scales per row and group: exact for integer scales, else within the rounding of float32."""
    sample = per_token.sample_arguments((m, k), n, split, bits, F32, generator(), asymmetric=asymmetric)
    q, scale, w, weight_scale, offset, *_ = sample
    if exact:
        groups = len(weight_scale)
        scale[..., :groups] = torch.randint(1, 4, scale[..., :groups].shape, generator=generator()).float()
        weight_scale = torch.randint(1, 4, weight_scale.shape, generator=generator()).float()
        offset = torch.randint(-1000, 1000, (n,), generator=generator()).float()
    operands = sample._replace(input_scale=scale, weight_scale=weight_scale, offset=offset).operands
    got = per_token_triton.linear(operands, torch.full((m, n), float("nan")), tiles=tiles)
    plain = numerics.unpack_int4(w) if bits <= 4 else w
    want = numerics.per_token_matmul(q, scale, plain, weight_scale, offset, split)
    assert not exact or bool((want.abs() < 2**24).all())
    close(got, want, 0.0 if exact else 2**-20 * float(want.abs().max() if want.numel() else 0))


swapped = replace(TILES, swapped=True)
ranges = partial(quantize_per_token, asymmetric=True)
zeros = partial(linear_per_token, asymmetric=True)
packed = partial(linear, tiles=replace(TILES, swapped=True))
CASES: dict[str, Callable[[], None]] = (
    NOT_FINITE
    | CACHE
    | INTEGERS
    | {
        "linear-w8-single-exact": lambda: linear(37, 45, 200, 200, 8, exact=True),
        "linear-w8-dual-exact": lambda: linear(50, 70, 224, 160, 8, exact=True),
        "linear-w8-dual-odd-split-exact": lambda: linear(33, 31, 131, 101, 8, exact=True),
        "linear-w5-dual-narrow-exact": lambda: linear(1, 5, 40, 7, 5, exact=True),
        "linear-w8-rows-with-stride-exact": lambda: linear(34, 33, 96, 64, 8, exact=True, scattered=True),
        "linear-w4-single-exact": lambda: packed(37, 45, 224, 224, 4, exact=True),
        "linear-w4-dual-exact": lambda: packed(50, 70, 256, 160, 4, exact=True),
        "linear-w4-dual-narrow-outliers-exact": lambda: packed(3, 33, 96, 64, 4, exact=True),
        "linear-w2-dual-exact": lambda: packed(17, 20, 192, 32, 2, exact=True),
        "linear-w4-not-swapped-dual-exact": lambda: linear(33, 39, 160, 96, 4, exact=True),
        "linear-w8-swapped-dual-exact": lambda: packed(33, 39, 131, 101, 8, exact=True),
        "linear-w8-single": lambda: linear(40, 40, 150, 150, 8, exact=False),
        "linear-w8-dual": lambda: linear(65, 33, 224, 192, 8, exact=False),
        "linear-w6-dual": lambda: linear(33, 65, 100, 90, 6, exact=False),
        "linear-w4-dual": lambda: packed(33, 65, 224, 192, 4, exact=False),
        "linear-w8-wide-exact": lambda: linear(33, 300, 131, 101, 8, exact=True, tiles=WIDE),
        "linear-no-rows": lambda: linear(0, 5, 64, 32, 8, exact=False),
        "linear-rescale-of-large-integers": rescale_of_large_integers,
        "linear-panels-are-refused": panels_are_refused,
        "linear-quantize-gelu_tanh-dual": lambda: linear_quantize(37, 70, 160, 128, 8, "gelu_tanh", 41),
        "linear-quantize-gelu-single": lambda: linear_quantize(33, 45, 131, 131, 8, "gelu", 45),
        "linear-quantize-none-6-bits": lambda: linear_quantize(50, 39, 75, 50, 8, "none", 7, 6),
        "linear-quantize-w4-gelu_tanh": lambda: linear_quantize(19, 65, 128, 96, 4, "gelu_tanh", 33),
        "linear-quantize-wide": lambda: linear_quantize(9, 275, 96, 64, 8, "gelu", 141, tiles=WIDE),
        "linear-quantize-hardswish": linear_quantize_by_an_activation_from_outside,
        "linear-quantize-no-rows": linear_quantize_without_rows,
        "linear-add-gated-3-frames": lambda: linear_add((2, 21, 96), 45, 64, 8, 3, F32),
        "linear-add-gated-bf16": lambda: linear_add((1, 34, 131), 33, 131, 8, 2, BF16),
        "linear-add-without-gate": lambda: linear_add((2, 17, 75), 40, 50, 8, 0, F32),
        "linear-add-wide": lambda: linear_add((2, 20, 75), 270, 50, 8, 2, F32, tiles=WIDE),
        "linear-add-w4-wide": lambda: linear_add((2, 6, 64), 300, 32, 4, 2, F32, tiles=WIDE),
        "linear-add-w4-a-frame-per-row": lambda: linear_add((1, 7, 128), 65, 96, 4, 7, F32),
        "quantize-f32": lambda: quantize(noise(7, 130), [0.02], [5], 130, 8, gather=False),
        "quantize-f32-dual-gather": lambda: quantize(noise(6, 130), [0.02, 0.3], [5, -77], 97, 8, gather=True),
        "quantize-bf16-dual-gather": lambda: quantize(noise(2, 3, 96).bfloat16(), [0.011, 0.1], [-3, 0], 64, 8, True),
        "quantize-f16-4-bits": lambda: quantize(noise(5, 70).half(), [0.7, 0.2], [1, -8], 6, 4, gather=True),
        "quantize-ties": lambda: quantize(
            torch.arange(-150, 150).reshape(3, 100) / 4, [0.5, 0.25], [1, -2], 50, 6, False
        ),
        "quantize-infinite": lambda: quantize(
            torch.tensor([[INF, -INF, 3e38, -3e38, 0.0]]), [1e-3], [100], 5, 8, False
        ),
        "quantize-columns-with-stride": lambda: quantize(noise(64, 9).T, [0.03, 0.1], [0, 3], 32, 8, gather=True),
        "norm-modulated-dual-gather": lambda: norm((2, 9, 130), 97, 8, F32, 3, "", gather=True),
        "norm-affine-and-modulated": lambda: norm((1, 8, 75), 75, 8, F32, 2, "wb", gather=False),
        "norm-affine-6-bits-bf16": lambda: norm((2, 5, 96), 64, 6, BF16, 0, "wb", gather=True),
        "norm-weight-without-bias": lambda: norm((1, 5, 33), 20, 8, F16, 1, "w", gather=False),
        "norm-plain-narrow": lambda: norm((3, 4, 5), 5, 8, F32, 0, "", gather=True),
        "norm-no-rows": lambda: norm((2, 0, 64), 32, 8, F32, 1, "", gather=True),
        "rope-normed-f32": lambda: rope((2, 9, 96), 4, F32, True, True, merged=False),
        "rope-merged-bf16": lambda: rope((2, 7, 120), 3, BF16, True, True, merged=True),
        "rope-odd-pairs-of-a-head": lambda: rope((1, 5, 90), 3, F32, True, True, merged=True),
        "rope-without-norm": lambda: rope((2, 3, 64), 1, F32, False, True, merged=True),
        "rope-without-rotation": lambda: rope((1, 6, 36), 2, F32, True, False, merged=False),
        "rope-one-position": lambda: rope((4, 1, 32), 2, F16, True, True, merged=True),
        "rope-no-rows": lambda: rope((2, 0, 32), 2, F32, True, True, merged=False),
        "per-token-quantize-f32": lambda: quantize_per_token(noise(7, 131), 131, 8, gather=False),
        "per-token-quantize-dual-gather": lambda: quantize_per_token(noise(2, 3, 130), 97, 8, gather=True),
        "per-token-quantize-bf16-in-steps": lambda: quantize_per_token(
            noise(5, 100).bfloat16(), 64, 8, True, max_block=64
        ),
        "per-token-quantize-f16-4-bits": lambda: quantize_per_token(noise(4, 70).half(), 6, 4, gather=True),
        "per-token-quantize-zero-rows": lambda: quantize_per_token(noise(6, 40) * torch.eye(6)[:, :1], 9, 8, True),
        "per-token-quantize-tiny-and-huge": lambda: quantize_per_token(
            torch.tensor([[1e-38, -1e-38], [2e-30, 1e-30], [3e38, -1e30]]), 2, 8, gather=False
        ),
        "per-token-quantize-columns-with-stride": lambda: quantize_per_token(noise(64, 9).T, 33, 6, gather=False),
        "per-token-quantize-no-rows": lambda: quantize_per_token(torch.empty(0, 64), 32, 8, gather=False),
        "per-token-gelu-dual-gather": lambda: activated_per_token(noise(5, 130), "gelu", 97, gather=True),
        "per-token-gelu_tanh-in-steps": lambda: activated_per_token(
            noise(3, 100).bfloat16(), "gelu_tanh", 64, True, 64
        ),
        "per-token-linear-w8-single": lambda: linear_per_token(37, 45, 200, 200, 8),
        "per-token-linear-w8-dual": lambda: linear_per_token(65, 33, 224, 192, 8),
        "per-token-linear-w8-dual-odd-split-exact": lambda: linear_per_token(33, 31, 131, 101, 8, exact=True),
        "per-token-linear-w5-dual-narrow-exact": lambda: linear_per_token(1, 5, 40, 7, 5, exact=True),
        "per-token-linear-w4-single-exact": lambda: linear_per_token(37, 45, 224, 224, 4, exact=True, tiles=swapped),
        "per-token-linear-w4-dual": lambda: linear_per_token(33, 65, 224, 192, 4, tiles=swapped),
        "per-token-linear-w4-dual-not-swapped": lambda: linear_per_token(17, 20, 192, 32, 4),
        "per-token-linear-w8-wide": lambda: linear_per_token(9, 275, 96, 96, 8, tiles=WIDE),
        "per-token-linear-no-rows": lambda: linear_per_token(0, 5, 64, 32, 8),
        "asymmetric-quantize-f32": lambda: ranges(noise(7, 131), 131, 8, gather=False),
        "asymmetric-quantize-positive-dual-gather": lambda: ranges(noise(2, 3, 130).abs(), 97, 8, gather=True),
        "asymmetric-quantize-bf16-in-steps": lambda: ranges(noise(5, 100).bfloat16() + 2, 64, 8, True, max_block=64),
        "asymmetric-quantize-f16-4-bits": lambda: ranges(noise(4, 70).half() - 9, 6, 4, gather=True),
        "asymmetric-quantize-2-bits": lambda: ranges(noise(4, 70), 6, 2, gather=False),
        "asymmetric-quantize-zero-rows": lambda: ranges(noise(6, 40) * torch.eye(6)[:, :1], 9, 8, True),
        "asymmetric-quantize-tiny-and-huge": lambda: ranges(
            torch.tensor([[1e-38, -1e-38], [2e-30, 1e-30], [3e38, -3e38], [-0.0, 0.0], [-3e38, 1.0]]),
            2,
            8,
            gather=False,
        ),
        "asymmetric-quantize-no-rows": lambda: ranges(torch.empty(0, 64), 32, 8, gather=False),
        "asymmetric-linear-w8-single": lambda: zeros(37, 45, 600, 600, 8),
        "asymmetric-linear-w8-dual": lambda: zeros(65, 33, 224, 192, 8),
        "asymmetric-linear-w8-dual-odd-split-exact": lambda: zeros(33, 31, 131, 101, 8, exact=True),
        "asymmetric-linear-w5-dual-narrow-exact": lambda: zeros(1, 5, 40, 7, 5, exact=True),
        "asymmetric-linear-w8-swapped-dual-exact": lambda: zeros(33, 39, 131, 101, 8, exact=True, tiles=swapped),
        "asymmetric-linear-w4-single-exact": lambda: zeros(37, 45, 224, 224, 4, exact=True, tiles=swapped),
        "asymmetric-linear-w4-dual": lambda: zeros(33, 65, 224, 192, 4, tiles=swapped),
        "asymmetric-linear-w4-dual-not-swapped": lambda: zeros(17, 20, 192, 32, 4),
        "asymmetric-linear-w8-wide": lambda: zeros(9, 275, 96, 96, 8, tiles=WIDE),
        "asymmetric-linear-no-rows": lambda: zeros(0, 5, 64, 32, 8),
        "fp8-quantize-dual-gather": lambda: quantize_fp8((7, 130), [2**-6, 0.25], 97, F32, gather=True),
        "fp8-quantize-single-bf16": lambda: quantize_fp8((2, 3, 40), [0.5], 40, BF16, gather=False),
        "fp8-linear-dual": lambda: linear_fp8(33, 39, 131, 101),
        "fp8-linear-single": lambda: linear_fp8(17, 70, 96, 96),
        "fp8-per-token-quantize-dual-gather": lambda: quantize_fp8_per_token((7, 130), 97, F32, gather=True),
        "fp8-per-token-quantize-single-bf16": lambda: quantize_fp8_per_token((2, 3, 40), 40, BF16, gather=False),
        "fp8-per-token-linear-dual": lambda: linear_fp8_per_token(33, 39, 131, 101),
        "fp8-per-token-linear-single": lambda: linear_fp8_per_token(17, 70, 96, 96),
    }
)


OTHERS = tuple(CASES)[1::2]
"""Every second one: those that `make test-all` runs as well."""


def main(others: bool) -> None:
    """Run the others, or all but them, and print name -> traceback, empty where it passed, as the last line."""
    outcome = {}
    for name, case in CASES.items():
        if (name in OTHERS) != others:
            continue
        try:
            case()
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(sys.argv[1:] == ["others"])
