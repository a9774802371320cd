"""The C++ kernels against the references, on odd shapes, strides and thread counts; and what happens without them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fxq import cpu
from fxq.kernels import (
    activation_quantize_per_token,
    activation_quantize_per_token_asymmetric,
    attention,
    dual_scale_linear,
    dual_scale_linear_add,
    dual_scale_linear_per_token,
    dual_scale_linear_per_token_add,
    dual_scale_linear_quantize,
    norm_quantize,
    norm_quantize_per_token,
    norm_quantize_per_token_asymmetric,
    quantize_act,
    quantize_per_token,
    quantize_per_token_asymmetric,
    rms_norm_rope,
)
from fxq.kernels.arguments import Attention
from fxq.kernels.attention.merge import attention_lse as reference_lse
from fxq.kernels.gemm import per_token
from fxq.kernels.gemm.op import sample_operands
from fxq.kernels.gemm.panels import pack_panels, panel_shape, unpack_panels
from fxq.kernels.native import attention_lse, build
from tests.features import needs

needs_native, needs_attention = needs("native"), needs("attends")
RANGES = quantize_per_token_asymmetric


@pytest.fixture(params=[1, 2, 5], ids=lambda n: f"{n}-threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("bits", [8, 5, 4, 2])
@pytest.mark.parametrize(("outputs", "width", "split"), [(1, 1, 1), (64, 96, 96), (65, 75, 50), (130, 9, 2), (7, 8, 7)])
def test_panels_hold_the_weight_and_its_sums(outputs, width, split, bits):
    w = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (outputs, width), generator=random(), dtype=torch.int8)
    panels = pack_panels(w, split, bits)
    assert panels.shape == panel_shape(outputs, width, split, bits <= 4) and panels.is_contiguous()
    assert panels.dtype == (torch.uint8 if bits <= 4 else torch.int8)
    assert torch.equal(unpack_panels(panels, outputs, width, split), w)
    sums = panels[:, -2:].contiguous().view(torch.int32).squeeze(-1).transpose(0, 1).flatten(1)[:, :outputs]
    assert torch.equal(sums, 128 * torch.stack([w[:, :split].sum(1), w[:, split:].sum(1)]).int())


def test_panels_of_another_form_are_refused_with_theirs():
    operands = sample_operands((3, 96), 40, 64, 4, random(), panels=True)
    for bad in (operands.weight.view(torch.int8), operands.weight[:, :-1]):
        with pytest.raises(ValueError, match=r"expected torch.uint8 \(1, 14, 64, 4\) for bits = 4"):
            dual_scale_linear(*operands._replace(weight=bad), torch.float32)


SHAPES = [
    ((500, 320), 300, 288),
    ((1, 1), 1, 1),
    ((3, 5), 3, 2),
    ((6, 64), 64, 64),
    ((7, 96), 65, 64),
    ((2, 13, 75), 130, 50),
    ((401, 36), 20, 32),
    ((5, 2048), 16, 2016),
]


@needs_native
@pytest.mark.parametrize(("shape", "outputs", "split"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_equals_the_reference(shape, outputs, split, dtype, threads):
    arguments = (*sample_operands(shape, outputs, split, 8, random(1), panels=True), dtype)
    assert torch.equal(dual_scale_linear(*arguments), dual_scale_linear.reference(*arguments))


@needs_native
@pytest.mark.parametrize(("shape", "outputs", "split"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_per_token_equals_the_reference(shape, outputs, split, dtype, threads):
    for asymmetric in (False, True):
        arguments = per_token.sample_arguments(shape, outputs, split, 8, dtype, random(1), True, asymmetric)
        got, want = dual_scale_linear_per_token(*arguments), dual_scale_linear_per_token.reference(*arguments)
        assert torch.equal(got, want) and got.dtype == dtype


@needs_native
def test_extreme_integers_do_not_saturate():
    q = torch.full((7, 9000), -128, dtype=torch.int8)
    w = torch.full((2, 9000), -128, dtype=torch.int8)
    w[1] = 127
    one = torch.ones(1)
    y = dual_scale_linear(q, pack_panels(w, 9000), torch.ones(1, 2), one, torch.zeros(2), 9000, 8, torch.float32)
    assert y.tolist() == [[16384.0 * 9000, -16256.0 * 9000]] * 7


@needs_native
def test_linear_reads_strided_rows():
    q, *rest = sample_operands((9, 80), 33, 64, 8, random(2), panels=True)
    wide = torch.randint(-128, 128, (9, 200), dtype=torch.int8)
    wide[:, 100:180] = q
    got = dual_scale_linear(wide[:, 100:180], *rest, torch.float32)
    assert torch.equal(got, dual_scale_linear.reference(q, *rest, torch.float32))


@needs_native
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("outputs", "out_split", "out_bits"), [(40, 40, 8), (100, 37, 8), (130, 97, 6)])
def test_the_quantizing_epilogue_is_within_one_rare_integer(activation, outputs, out_split, out_bits, threads):
    operands = sample_operands((3, 50, 75), outputs, 50, 8, random(3), panels=True)
    groups = 1 if out_split == outputs else 2
    rest = (activation, torch.tensor([0.03, 0.11])[:groups], torch.tensor([5, -9]).int()[:groups], out_split, out_bits)
    got, want = (f(*operands, *rest).int() for f in (dual_scale_linear_quantize, dual_scale_linear_quantize.reference))
    assert (got - want).abs().max() <= 1 and (got != want).float().mean() < 0.002
    assert got.unique().numel() > 10


@needs_native
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations_hold_at_the_extremes(activation):
    """With unit scales and no weights the offset alone is activated."""
    offset = torch.tensor([-1e30, -200.0, -20.0, -5.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 5.0, 120.0, 1e30])
    n = len(offset)
    panels = pack_panels(torch.zeros(n, 4, dtype=torch.int8), 4)
    q, one, zero = torch.zeros(1, 4, dtype=torch.int8), torch.ones(1), torch.zeros(1, dtype=torch.int32)
    arguments = (q, panels, torch.ones(1, n), one, offset, 4, 8, activation, one, zero, n, 8)
    assert torch.equal(dual_scale_linear_quantize(*arguments), dual_scale_linear_quantize.reference(*arguments))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16, torch.float16, None])
def test_the_adding_epilogue_equals_the_reference(dtype, gate_dtype, threads):
    operands = sample_operands((2, 21, 75), 70, 50, 8, random(4), panels=True)
    wide = torch.randn(2, 21, 140, generator=random(5)).to(dtype)
    gate = None if gate_dtype is None else torch.randn(2, 3, 70, generator=random(6)).to(gate_dtype)
    arguments = (*operands, wide[..., 70:], gate)
    assert torch.equal(dual_scale_linear_add(*arguments), dual_scale_linear_add.reference(*arguments))
    op = dual_scale_linear_per_token_add
    for asymmetric in (False, True):
        sample = per_token.sample_arguments((2, 21, 75), 70, 50, 8, dtype, random(4), True, asymmetric)
        sample.input_scale[1, 3, 1] = float("nan")
        got, want = (f(*sample.operands, *arguments[-2:]) for f in (op, op.reference))
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert got.isnan().any(2).nonzero().tolist() == [[1, 3]] and got[1, 3].isnan().all()


PERMUTATIONS = {
    "none": lambda k, split: None,
    "partition": lambda k, split: torch.cat([p.sort().values for p in torch.randperm(k).split([split, k - split])]),
    "any": lambda k, split: torch.randperm(k),
}


@needs_native
@pytest.mark.parametrize("order", PERMUTATIONS)
@pytest.mark.parametrize(("width", "split"), [(1, 1), (63, 40), (64, 32), (130, 129), (200, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_quantized_as_by_the_reference(order, width, split, dtype, threads):
    torch.manual_seed(width)
    perm = PERMUTATIONS[order](width, split)
    perm = None if perm is None else perm.int()
    x = (torch.randn(11, 2 * width) * 3).to(dtype)[:, width:]
    groups = 1 if split == width else 2
    scale, zero = torch.tensor([0.02, 0.3])[:groups], torch.tensor([4, -30]).int()[:groups]
    arguments = (x, perm, scale, zero, split, 8)
    assert torch.equal(quantize_act(*arguments), quantize_act.reference(*arguments))


@needs_native
@pytest.mark.parametrize("order", PERMUTATIONS)
@pytest.mark.parametrize(("width", "split"), [(1, 1), (63, 40), (64, 32), (130, 129), (200, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_get_the_scales_and_integers_of_the_reference(order, width, split, dtype, threads):
    torch.manual_seed(width)
    perm = PERMUTATIONS[order](width, split)
    perm = None if perm is None else perm.int()
    wide = (torch.randn(900, 3 * width) * torch.logspace(-6, 4, 900)[:, None]).to(dtype)
    wide[5], wide[6, width : 2 * width] = 0, -1e-30
    x = wide[:, width : 2 * width]
    for bits in (8, 5):
        got, want = (f(x, perm, split, bits) for f in (quantize_per_token, quantize_per_token.reference))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@needs_native
@pytest.mark.parametrize("order", PERMUTATIONS)
@pytest.mark.parametrize(("width", "split"), [(1, 1), (63, 40), (64, 32), (130, 129), (200, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_get_the_zero_points_of_the_reference(order, width, split, dtype, threads):
    torch.manual_seed(width)
    perm = PERMUTATIONS[order](width, split)
    perm = None if perm is None else perm.int()
    sides = (torch.arange(900) % 5 - 2)[:, None]
    wide = ((torch.randn(900, 3 * width) + 3 * sides) * torch.logspace(-6, 4, 900)[:, None]).to(dtype)
    wide[5], wide[6, width : 2 * width], wide[7] = 0, -1e-30, -0.0
    wide[8, width : 2 * width], wide[8, width] = 3e38, -3e38
    x = wide[:, width : 2 * width]
    for bits in (8, 5, 2):
        got, want = (f(x, perm, split, bits) for f in (RANGES, RANGES.reference))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@needs_native
def test_zero_points_of_extreme_integers_do_not_overflow():
    width = 2**16
    q, w = torch.full((2, width), -128, dtype=torch.int8), torch.full((1, width), -128, dtype=torch.int8)
    q[1] = 127
    scale = torch.tensor([[1.0, 127], [1, -128]])
    rest = (torch.ones(1, 1), torch.zeros(1), width, 8, torch.float32)
    for weight in (w, pack_panels(w, width)):
        assert dual_scale_linear_per_token(q, scale, weight, *rest).tolist() == [[2139095040.0], [-2139095040.0]]


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_enough_rows_for_several_threads_are_quantized_alike(dtype, threads):
    torch.manual_seed(1)
    x = (torch.randn(700, 900) * 3).to(dtype)
    perm = PERMUTATIONS["partition"](900, 837).int()
    arguments = (x, perm, torch.tensor([0.02, 0.3]), torch.tensor([4, -30]).int(), 837, 8)
    assert torch.equal(quantize_act(*arguments), quantize_act.reference(*arguments))


@needs_native
def test_infinities_saturate():
    x = torch.tensor([[float("inf"), -float("inf"), 3e38, -3e38]])
    q = quantize_act(x, None, torch.tensor([0.5]), torch.tensor([7]).int(), 4, 8)
    assert q.tolist() == [[127, -128, 127, -128]]


@needs_native
@pytest.mark.parametrize("order", PERMUTATIONS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_quantize_per_token_as_the_reference(order, activation, dtype, threads):
    torch.manual_seed(9)
    perm = PERMUTATIONS[order](150, 118)
    x = (torch.randn(2, 12, 300) * 3).to(dtype)[..., 70:220]
    for op in (activation_quantize_per_token, activation_quantize_per_token_asymmetric):
        arguments = (x, activation, None if perm is None else perm.int(), 118, 8)
        (q, scale), (want, scales) = op(*arguments), op.reference(*arguments)
        difference = (q.int() - want.int()).abs()
        assert difference.max() <= 1 and difference.float().mean() < 0.005
        torch.testing.assert_close(scale, scales, rtol=1e-5, atol=0)


@needs_native
@pytest.mark.parametrize("order", PERMUTATIONS)
@pytest.mark.parametrize(("affine", "frames"), [(False, 3), (True, 0), (True, 1), (False, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_modulation_quantize_as_the_reference(order, affine, frames, dtype, threads):
    torch.manual_seed(7)
    width, split = 150, 118
    perm = PERMUTATIONS[order](width, split)
    x = (torch.randn(2, 12, width) * 4 + 1).to(dtype)
    weight, bias = torch.randn(2, width).unbind() if affine else (None, None)
    gain, shift = torch.randn(2, 2, frames, width).to(dtype).unbind() if frames else (None, None)
    scale, zero = torch.tensor([0.02, 0.05]), torch.tensor([4, -30]).int()
    arguments = (x, weight, bias, gain, shift, 1e-6, None if perm is None else perm.int(), scale, zero, split, 8)
    got, want = (f(*arguments).int() for f in (norm_quantize, norm_quantize.reference))
    assert (got - want).abs().max() <= 1 and (got != want).float().mean() < 0.005
    for op in (norm_quantize_per_token, norm_quantize_per_token_asymmetric):
        for bits in (8, 4):
            measured = (*arguments[:7], split, bits)
            (q, scale), (want, scales) = op(*measured), op.reference(*measured)
            difference = (q.int() - want.int()).abs()
            assert difference.max() <= 1 and difference.float().mean() < 0.005
            torch.testing.assert_close(scale, scales, rtol=1e-5, atol=0)


@needs_native
@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 20), (2, 64), (2, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotate", [True, False])
def test_rotation_of_strided_rows_agrees_with_the_reference(heads, size, dtype, rotate, threads):
    torch.manual_seed(8)
    width, rows = heads * size, 9
    x = torch.randn(2, rows, 3 * width).to(dtype)[..., width : 2 * width]
    angle = torch.rand(rows, size // 2) * 6
    tables = (angle.cos(), angle.sin()) if rotate else (None, None)
    got = rms_norm_rope(x, torch.randn(width).to(dtype), 1e-6, *tables, heads)
    torch.manual_seed(8)
    torch.randn(2, rows, 3 * width), torch.rand(rows, size // 2)
    want = rms_norm_rope.reference(x.contiguous(), torch.randn(width).to(dtype), 1e-6, *tables, heads)
    assert got.shape == (2, rows, heads, size) and got.is_contiguous()
    assert torch.allclose(got.float(), want.float(), rtol=0, atol=2e-6 if dtype == torch.float32 else 0.04)


def exact_attention(q, k, v):
    k, v = torch.cat(k, 1), torch.cat(v, 1)
    return F.scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)


@needs_attention
@pytest.mark.parametrize("rows", [1, 191, 193])
@pytest.mark.parametrize("lengths", [(1,), (3, 0, 254), (255, 2), (600, 77)])
@pytest.mark.parametrize("size", [16, 66, 128])
def test_attention_is_as_exact_as_bfloat16_allows(rows, lengths, size):
    torch.manual_seed(rows + size)
    q = (2 * torch.randn(2, rows, 2, size)).bfloat16()
    k, v = ([torch.randn(2, length, 2, size).bfloat16() for length in lengths] for _ in range(2))
    got, want = attention(q, k, v).double(), exact_attention(q, k, v)
    assert float((got - want).norm() / want.norm()) < 0.006


@needs_attention
def test_attention_reads_strided_pieces_in_any_number_of_threads(threads):
    torch.manual_seed(3)
    merged = torch.randn(2, 50, 3 * 96).bfloat16()
    q, k, v = (part.unflatten(-1, (3, 32)) for part in merged.split(96, -1))
    cache = torch.randn(2, 3, 300, 32).bfloat16().transpose(1, 2)
    got, want = attention(q, [cache, k], [cache, v]).double(), exact_attention(q, [cache, k], [cache, v])
    assert float((got - want).norm() / want.norm()) < 0.006


@needs_attention
def test_attention_of_enough_work_for_several_threads(threads):
    torch.manual_seed(4)
    q, k, v = (torch.randn(1, rows, 2, 64).bfloat16() for rows in (500, 900, 900))
    got, want = attention(q, [k], [v]).double(), exact_attention(q, [k], [v])
    assert float((got - want).norm() / want.norm()) < 0.006


@needs_attention
@pytest.mark.parametrize(("rows", "lengths", "size"), [(37, (150, 3), 64), (70, (513, 40, 0, 5), 80), (5, (9,), 128)])
def test_parts_of_attention_come_with_the_logarithm_of_their_weights(rows, lengths, size):
    q = torch.randn(2, rows, 3, size).bfloat16()
    pieces = [[torch.randn(2, length, 3, size).bfloat16() for length in lengths] for _ in range(2)]
    out, lse = attention_lse(Attention(q, *pieces))
    want, logarithm = reference_lse(q, *(torch.cat(piece, 1) for piece in pieces))
    torch.testing.assert_close(lse, logarithm, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, want, atol=2**-6, rtol=0)


@needs_attention
def test_attention_survives_scores_of_any_size():
    q = torch.tensor([300.0, -300.0, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 1, 16).bfloat16()
    k = torch.linspace(-300, 300, 400).reshape(1, 400, 1, 1).expand(1, 400, 1, 16).bfloat16()
    v = torch.arange(400.0).reshape(1, 400, 1, 1).expand(1, 400, 1, 16).bfloat16() / 256
    got = attention(q, [k], [v])[0, :, 0].tolist()
    assert got == pytest.approx([399 / 256, 0.0, 399 / 512], abs=0.01)


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SAY = "from fxq.kernels import native, used; print(native.ready(), native.why_not(), used('quantize_act', 'cpu'))"


@pytest.mark.any_cpu
def test_native_kernels_can_be_switched_off():
    assert run(SAY, FXQ_NATIVE="0").strip() == "False native kernels are switched off by FXQ_NATIVE=0 eager"


@needs_native
@pytest.mark.any_cpu
def test_without_a_compiler_the_reason_says_what_to_install():
    assert "install g++ or set CXX" in run(SAY, CXX="no-such-compiler")


@needs_native
@pytest.mark.any_cpu
def test_a_compiler_that_fails_is_a_reason_and_leaves_nothing_behind(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'fatal error: no headers' >&2\nexit 1\n")
    broken.chmod(0o755)
    out = run(SAY, CXX=str(broken), FXQ_CACHE_DIR=str(tmp_path / "cache"))
    assert "could not be built" in out and "no headers" in out and out.startswith("False")
    assert list((tmp_path / "cache").iterdir()) == []


@needs_native
@pytest.mark.any_cpu
def test_the_library_is_compiled_once_and_again_when_its_source_changes(tmp_path, monkeypatch):
    one_file = dataclasses.replace(build.instruction_set(), sources=("pack.cpp",))
    here = build.compiler(), tmp_path, one_file
    first = build.build(*here)
    stamp = first.stat().st_mtime_ns
    assert build.build(*here) == first and first.stat().st_mtime_ns == stamp
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-DOTHER"])
    assert build.build(*here) != first
    assert len(list(tmp_path.iterdir())) == 2


EVERYTHING = frozenset((*build.AMX.needs, *build.AVX_VNNI.needs))


@pytest.mark.parametrize("missing", build.AMX.needs)
def test_a_cpu_that_lacks_an_instruction_of_the_largest_set_gets_the_next(missing, monkeypatch):
    monkeypatch.setattr(build, "FAILED", {})
    monkeypatch.setattr(build, "SETS", build.ARCHITECTURES["x86_64"])
    monkeypatch.setattr(cpu, "features", lambda: EVERYTHING)
    assert build.instruction_set() is build.AMX
    monkeypatch.setattr(cpu, "features", lambda: EVERYTHING - {missing})
    rest = build.AVX_VNNI if missing in build.VNNI.needs else build.VNNI
    assert build.instruction_set() is (rest if missing in build.AVX512.needs else build.AVX512)
    monkeypatch.setattr(cpu, "features", lambda: EVERYTHING - {*build.VNNI.needs, "avx_vnni"})
    assert build.instruction_set() is build.AVX2
    assert "instructions" not in build.missing() and "CPU" not in build.missing()


@pytest.mark.parametrize("missing", build.AVX2.needs)
def test_a_cpu_without_the_instructions_is_named(missing, monkeypatch):
    monkeypatch.setattr(build, "SETS", build.ARCHITECTURES["x86_64"])
    monkeypatch.setattr(cpu, "features", lambda: frozenset(build.AVX2.needs) - {missing})
    monkeypatch.setattr(cpu, "limit", lambda: "")
    assert f"this one lacks {missing}" in build.missing()
    monkeypatch.setattr(cpu, "limit", lambda: "portable")
    assert f"FXQ_CPU=portable takes away {missing}" in build.missing()
