"""Cases of test_triton_interpret.py about rows that are not finite: Triton's kernels against the references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fxq import numerics
from fxq.kernels.arguments import (
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
from fxq.kernels.arguments_fp8 import QuantizeFp8, QuantizeFp8PerToken
from fxq.kernels.gemm import fp8
from fxq.kernels.gemm import triton as gemm_triton
from fxq.kernels.gemm import triton_fp8 as fp8_triton
from fxq.kernels.gemm import triton_per_token as per_token_triton
from fxq.kernels.gemm.epilogues import dual_scale_linear_quantize
from fxq.kernels.gemm.op import dual_scale_linear, sample_operands
from fxq.kernels.gemm.tiles import Tiles
from fxq.kernels.norm import triton as norm_triton
from fxq.kernels.norm import triton_per_token as norm_per_token_triton
from fxq.kernels.norm.op import norm_quantize
from fxq.kernels.quantize import triton_per_token as per_token_rows
from fxq.kernels.quantize.op import launch as launch_quantize
from fxq.kernels.rope import triton as rope_triton
from fxq.kernels.rope.op import rms_norm_rope

BAD = (float("nan"), float("inf"), -float("inf"))
TILES = Tiles(32, 32, 64, warps=4, stages=2, group_m=2)
WIDE = Tiles(32, 256, 64, warps=4, stages=2, group_m=2)
PLACES = ((1, 0), (4, 40), (7, 69))
"""Row and channel of each of BAD."""


def generator() -> torch.Generator:
    """Random numbers of a fixed seed."""
    return torch.Generator().manual_seed(17)


def rows(*shape: int) -> Tensor:
    """Noise with the numbers of BAD at PLACES."""
    x = torch.randn(shape, generator=generator())
    for value, (row, channel) in zip(BAD, PLACES, strict=True):
        x.reshape(-1, shape[-1])[row, channel] = value
    return x


def broken(count: int) -> Tensor:
    """bool [count], True at the rows of PLACES."""
    return torch.tensor([row in (1, 4, 7) for row in range(count)])


def same(got: Tensor, want: Tensor, marked: Tensor) -> None:
    """Equal integers, and the mark where it belongs."""
    width = got.shape[-1]
    assert torch.equal(numerics.poisoned(got.reshape(-1, width)), marked)
    assert torch.equal(got, want.reshape(got.shape)), f"{int((got != want.reshape(got.shape)).sum())} integers differ"


def quantize(width: int, split: int, bits: int, gather: bool, dtype: torch.dtype = torch.float32) -> None:
    """Marks from any block of channels, first, middle or last."""
    x = rows(9, width).to(dtype)
    perm = torch.randperm(width, generator=generator()).int() if gather else None
    groups = 1 if split == width else 2
    tail = (torch.tensor([0.03, 0.2][:groups]), torch.tensor([4, -9][:groups]).int(), split, bits)
    want = numerics.quantize_input(x if perm is None else x[:, perm], *tail)
    q = torch.full((9, width), 99, dtype=torch.int8)
    same(launch_quantize(QuantizeAct(x, Quantization(perm, *tail)), blocks=(4, 32), out=q), want, broken(9))


def quantize_with_a_broken_scale() -> None:
    """Every row is marked."""
    tail = (torch.tensor([0.1, float("nan")]), torch.zeros(2).int(), 64, 8)
    q = torch.zeros(5, 70, dtype=torch.int8)
    x = torch.randn(5, 70, generator=generator())
    got = launch_quantize(QuantizeAct(x, Quantization(None, *tail)), out=q)
    same(got, numerics.quantize_input(x, *tail), torch.ones(5, dtype=torch.bool))


def narrow_rows_are_not_marked() -> None:
    """As in the reference."""
    x = torch.full((3, 15), float("inf"))
    tail = (torch.ones(1), torch.zeros(1).int(), 15, 8)
    q = launch_quantize(QuantizeAct(x, Quantization(None, *tail)), out=torch.zeros(3, 15, dtype=torch.int8))
    assert torch.equal(q, numerics.quantize_input(x, *tail)) and q.unique().tolist() == [127]


def norm(gather: bool, modulated: bool) -> None:
    """Not finite in the input, in a modulation, and a variance that overflows."""
    x = rows(3, 3, 70)
    x[0, 0] = 1e30 * torch.randn(70, generator=generator())
    gain, shift = torch.randn(2, 3, 3, 70, generator=generator()).unbind()
    marked = broken(9)
    marked[0] = True
    if modulated:
        shift[2, 2, 60] = float("nan")
        marked[8] = True
    perm = torch.randperm(70, generator=generator()).int() if gather else None
    frames = (gain, shift) if modulated else (None, None)
    quantization = Quantization(perm, torch.tensor([0.02, 0.04]), torch.tensor([3, -5]).int(), 50, 8)
    arguments = NormQuantize(x, None, None, *frames, 1e-6, quantization)
    got = norm_triton.launch(arguments, out=torch.full((3, 3, 70), 99, dtype=torch.int8))
    assert torch.equal(numerics.poisoned(got).flatten(), marked)
    assert torch.equal(numerics.poisoned(norm_quantize.compute(arguments)).flatten(), marked)
    measured = NormQuantizePerToken(*arguments[:6], perm, 50, 8)
    for asymmetric, columns in ((False, 2), (True, 4)):
        out = torch.full((3, 3, 70), 99, dtype=torch.int8), torch.zeros(3, 3, columns)
        q, scale = norm_per_token_triton.launch(measured, out, asymmetric=asymmetric)
        assert torch.equal(scale[..., :2].isnan().any(2).flatten(), marked) and not scale[..., 2:].isnan().any()
        for g, part in enumerate((q[..., :50], q[..., 50:])):
            assert not part[scale[..., g].isnan()].any() and bool(part.any())


def rope() -> None:
    """Not finite, and squares that overflow."""
    x = rows(1, 9, 70)
    x[0, 0] = 1e30
    arguments = RmsNormRope(x, torch.ones(70), 1e-6, None, None, 5)
    for y in (rope_triton.launch(arguments, out=torch.zeros(1, 9, 5, 14)), rms_norm_rope.compute(arguments)):
        shown = ~y.isfinite().flatten(2).all(2)[0]
        assert shown.tolist() == [True, True, False, False, True, False, False, True, False]


def per_token(width: int, split: int, gather: bool, max_block: int = 4096, asymmetric: bool = False) -> None:
    """Bit-equal integers, zero points, and scales but for NaN."""
    x = rows(9, width)
    perm = torch.randperm(width, generator=generator()).int() if gather else None
    arguments = QuantizePerToken(x, perm, split, 8)
    q, scale = per_token_rows.quantize(arguments, asymmetric=asymmetric, max_block=max_block)
    want, scales = numerics.quantize_per_token(x if perm is None else x[:, perm], split, 8, asymmetric)
    assert torch.equal(scale.isnan().any(1), broken(9))
    assert torch.equal(scale.nan_to_num(7.0), scales.nan_to_num(7.0)) and torch.equal(q, want)
    operands = sample_operands((9, width), 40, split, 8, generator())._replace(q=q, input_scale=scale)
    y = per_token_triton.linear(operands, torch.zeros(9, 40), tiles=TILES)
    assert torch.equal(~y.isfinite().all(1), broken(9)) and torch.equal(~y.isfinite().any(1), broken(9))


def marked_operands(bits: int, width: int = 96, outputs: int = 75, split: int = 64) -> tuple[Operands, Tensor]:
    """Operands of a product of 37 rows, of which two are marked."""
    operands = sample_operands((37, width), outputs, split, bits, generator())
    marked = torch.zeros(37, dtype=torch.bool)
    marked[[5, 36]] = True
    return operands._replace(q=numerics.poison(operands.q, marked)), marked


def linear(bits: int, epilogue: str, tiles: Tiles = TILES, width: int = 96) -> None:
    """Rows of NaN; the others as without a mark."""
    operands, marked = marked_operands(bits, width)
    tiles = replace(tiles, swapped=bits <= 4)
    added = DualScaleLinearAdd(operands, torch.ones(1, 37, 75), torch.zeros(1, 37, 75))
    after = gemm_triton.adding(added) if epilogue == "add" else gemm_triton.STORE
    shape = (1, 37, 75) if epilogue == "add" else (37, 75)
    y = gemm_triton.launch(operands, torch.zeros(shape), tiles=tiles, epilogue=after).reshape(37, 75)
    assert torch.equal(y.isnan().all(1), marked) and torch.equal(y.isnan().any(1), marked)
    if epilogue == "store":
        want = dual_scale_linear.reference(*operands, torch.float32)
        rounding = 0.5 * float((operands.input_scale[0] * operands.weight_scale[0]).max()) + 1e-3
        assert bool(((y - want)[~marked].abs() <= rounding).all())


def linear_quantize(bits: int, tiles: Tiles = TILES, bad_column: int | None = None) -> None:
    """The mark goes on; a constant that is not finite marks every row."""
    operands, marked = marked_operands(bits)
    if bad_column is not None:
        operands.offset[bad_column] = float("nan")
        marked = torch.ones(37, dtype=torch.bool)
    scale, zero_point = torch.tensor([0.3, 0.7]), torch.tensor([3, -9]).int()
    arguments = DualScaleLinearQuantize(operands, "gelu_tanh", scale, zero_point, 50, 8)
    tiles = replace(tiles, swapped=bits <= 4)
    out = torch.full((37, 75), 99, dtype=torch.int8)
    got = gemm_triton.launch(operands, out, tiles=tiles, epilogue=gemm_triton.quantizing(arguments))
    want = dual_scale_linear_quantize.compute(arguments)
    assert torch.equal(numerics.poisoned(got), marked) and torch.equal(numerics.poisoned(want), marked)
    if bad_column is None:
        assert torch.equal(got[marked], want[marked])
        assert int((got.int() - want.int()).abs().max()) <= 1


def quantize_fp8() -> None:
    """NaN in its own place, infinities too."""
    x = rows(9, 70)
    arguments = QuantizeFp8(x, None, torch.tensor([0.01]), 70)
    want = fp8.quantize_fp8.compute(arguments)
    got = fp8_triton.launch(arguments, out=torch.zeros(9, 70, dtype=fp8.FP8))
    assert torch.equal(got.float().isnan(), ~x.isfinite()) and torch.equal(want.float().isnan(), ~x.isfinite())


def quantize_fp8_per_token() -> None:
    """The scale of a row that is not finite is NaN, and its values are 0."""
    x = rows(9, 70)
    arguments = QuantizeFp8PerToken(x, None, 70)
    want, scales = fp8.quantize_fp8_per_token.compute(arguments)
    q, scale = fp8_triton.launch_per_token(arguments)
    shown = ~x.isfinite().all(1)
    for values, found in ((q, scale), (want, scales)):
        assert torch.equal(found.isnan()[:, 0], shown) and not bool(values.float()[shown].any())
    assert torch.equal(scale.nan_to_num(7.0), scales.nan_to_num(7.0))


CASES: dict[str, Callable[[], None]] = {
    "not-finite-quantize-f32": lambda: quantize(100, 100, 8, gather=False),
    "not-finite-quantize-dual-gather": lambda: quantize(131, 97, 8, gather=True),
    "not-finite-quantize-4-bits-bf16": lambda: quantize(96, 64, 4, gather=True, dtype=torch.bfloat16),
    "not-finite-quantize-scale": quantize_with_a_broken_scale,
    "not-finite-quantize-narrow": narrow_rows_are_not_marked,
    "not-finite-norm": lambda: norm(gather=False, modulated=False),
    "not-finite-norm-modulated-gather": lambda: norm(gather=True, modulated=True),
    "not-finite-rope": rope,
    "not-finite-per-token-single": lambda: per_token(96, 96, gather=False),
    "not-finite-per-token-dual-gather": lambda: per_token(131, 97, gather=True),
    "not-finite-per-token-in-steps": lambda: per_token(100, 64, gather=True, max_block=64),
    "not-finite-asymmetric-single": lambda: per_token(96, 96, gather=False, asymmetric=True),
    "not-finite-asymmetric-dual-gather": lambda: per_token(131, 97, gather=True, asymmetric=True),
    "not-finite-asymmetric-in-steps": lambda: per_token(100, 64, gather=True, max_block=64, asymmetric=True),
    "not-finite-linear-w8": lambda: linear(8, "store"),
    "not-finite-linear-w8-odd": lambda: linear(8, "store", width=71),
    "not-finite-linear-w4": lambda: linear(4, "store"),
    "not-finite-linear-add": lambda: linear(8, "add"),
    "not-finite-linear-add-w4-wide": lambda: linear(4, "add", WIDE),
    "not-finite-linear-quantize": lambda: linear_quantize(8),
    "not-finite-linear-quantize-w4-wide": lambda: linear_quantize(4, WIDE),
    "not-finite-linear-quantize-offset": lambda: linear_quantize(8, bad_column=71),
    "not-finite-fp8": quantize_fp8,
    "not-finite-fp8-per-token": quantize_fp8_per_token,
}
