"""Generic over OPS: a new operator needs no new test of what every operator promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import fxq.kernels
from fxq import numerics
from fxq.kernels import (
    FLOAT8,
    OPS,
    Op,
    dual_scale_linear,
    dual_scale_linear_per_token,
    native,
    quantize_act,
    quantize_per_token,
    quantize_per_token_asymmetric,
    used,
)
from fxq.kernels.gemm import op as gemm
from fxq.kernels.gemm import per_token
from fxq.kernels.gemm.panels import pack_panels
from tests.features import demand, needs

HERE = [op for op in OPS if op not in FLOAT8]  # those have test_fp8.py
MEASURING = (quantize_per_token, quantize_per_token_asymmetric)
EXACT = (quantize_act, dual_scale_linear, *MEASURING, dual_scale_linear_per_token)  # bit-equal on a CPU
EVERY_SAMPLE = [pytest.param(op, sample, id=f"{op.name}-{i}") for op in HERE for i, sample in enumerate(op.samples())]


def expected(op: Op, arguments: tuple) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """What numerics says about the operators it defines, what the reference says about those built on them."""
    if op is quantize_act:
        x, perm, *rest = arguments
        return numerics.quantize_input(x if perm is None else x[..., perm], *rest)
    if op is dual_scale_linear:
        q, weight, weight_scale, input_scale, offset, split, bits, dtype = arguments
        w = numerics.unpack_int4(weight) if bits <= 4 else weight
        return numerics.dual_scale_matmul(q, w, weight_scale, input_scale, offset, split).to(dtype)
    if op in MEASURING:
        x, perm, *rest = arguments
        asymmetric = op is quantize_per_token_asymmetric
        return numerics.quantize_per_token(x if perm is None else x[..., perm], *rest, asymmetric)
    if op is dual_scale_linear_per_token:
        q, input_scale, weight, weight_scale, offset, split, bits, dtype = arguments
        w = numerics.unpack_int4(weight) if bits <= 4 else weight
        return numerics.per_token_matmul(q, input_scale, w, weight_scale, offset, split).to(dtype)
    return op.reference(*arguments)


def results(value: torch.Tensor | tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The tensors of a result."""
    return pytree.tree_leaves(value)


def assert_agrees(op: Op, got: torch.Tensor, want: torch.Tensor) -> None:
    """Within the operator's bound; integers may differ by one, rarely, where a value lies on a rounding boundary."""
    assert got.dtype == want.dtype and got.shape == want.shape and got.is_contiguous()
    if not want.numel():
        return
    error = (got.double() - want.double()).abs()
    if want.dtype == torch.int8:
        assert float(error.max()) <= (1 if op.max_error else 0) and float(error.mean()) < 0.005
    else:
        assert float(error.max()) <= op.max_error * float(want.double().abs().max())


def linear_arguments(m: int, n: int, k: int, split: int, bits: int) -> list:
    low, high = numerics.integer_range(bits)
    groups = 1 if split == k else 2
    w = torch.randint(low, high + 1, (n, k), dtype=torch.int8)
    return [
        torch.randint(-128, 128, (m, k), dtype=torch.int8),
        numerics.pack_int4(w) if bits <= 4 else w,
        torch.rand(groups, n) + 0.1,
        torch.rand(groups) + 0.1,
        torch.randn(n),
        split,
        bits,
        torch.float32,
    ]


@pytest.mark.parametrize(("op", "sample"), EVERY_SAMPLE)
def test_schema_fake_and_autograd_registration_hold(op, sample):
    torch.library.opcheck(op.definition, sample)


@pytest.mark.parametrize(("op", "sample"), EVERY_SAMPLE)
def test_the_reference_equals_numerics_and_the_cpu_kernel_agrees(op, sample):
    reference = getattr(torch.ops.fxq, op.name).default.redispatch
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    want = expected(op, sample)
    for first, got, exact in zip(*map(results, (reference(keys, *sample), op(*sample), want)), strict=True):
        assert torch.equal(first, exact)
        assert_agrees(op, got, exact)
        if op in EXACT:
            assert torch.equal(got, exact)


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "sample"), EVERY_SAMPLE)
def test_the_gpu_kernel_agrees_with_the_reference(op, sample):
    demand("gpu")
    if any(isinstance(a, torch.Tensor) and a.ndim == 4 and a.dtype == torch.int8 for a in sample):
        pytest.skip("panels are a CPU layout")
    moved = pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, sample)
    for got, want in zip(results(op(*moved)), results(expected(op, sample)), strict=True):
        assert_agrees(op, got.cpu(), want)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "sample"), [*EVERY_SAMPLE, *(pytest.param(op, op.samples()[0], id=op.name) for op in FLOAT8)]
)
def test_no_launch_waits_for_the_gpu(op, sample):
    demand("gpu")
    if any(isinstance(a, torch.Tensor) and a.ndim == 4 and a.dtype == torch.int8 for a in sample):
        pytest.skip("panels are a CPU layout")
    moved = pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, sample)
    want = results(op(*moved))  # compiled by now
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = results(op(*moved))
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want, strict=True))


@settings(max_examples=60)
@given(data=st.data())
def test_quantize_act_equals_numerics_for_any_shape(data):
    draw = data.draw
    width = draw(st.integers(1, 70))
    rows = draw(st.sampled_from([(), (0,), (1,), (5,), (2, 3)]))
    split = draw(st.integers(1, width))
    groups = 1 if split == width else 2
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    bits = draw(st.integers(2, 8))
    x = (torch.randn(*rows, width) * draw(st.sampled_from([0.1, 1.0, 50.0]))).to(dtype)
    perm = torch.randperm(width).to(torch.int32) if draw(st.booleans()) else None
    scale = torch.tensor(draw(st.lists(st.sampled_from([0.001, 0.03, 0.5, 2.0]), min_size=groups, max_size=groups)))
    zero = torch.tensor(draw(st.lists(st.integers(-200, 200), min_size=groups, max_size=groups)), dtype=torch.int32)
    got = quantize_act(x, perm, scale, zero, split, bits)
    assert got.shape == x.shape
    assert torch.equal(got, expected(quantize_act, (x, perm, scale, zero, split, bits)))


@pytest.mark.parametrize("use_native", [True, False])
def test_quantize_act_in_several_chunks_of_strided_rows(use_native, monkeypatch):
    from fxq.kernels.quantize import op as module

    if not use_native:
        monkeypatch.setattr(native, "ready", lambda: False)
    monkeypatch.setattr(module, "CHUNK", 100)
    x = torch.randn(40, 13).T
    arguments = (x, torch.randperm(40).to(torch.int32), torch.tensor([0.1, 0.3]), torch.tensor([3, -4]).int(), 30, 8)
    assert torch.equal(quantize_act(*arguments), expected(quantize_act, arguments))


@settings(max_examples=40)
@given(data=st.data())
def test_dual_scale_linear_equals_numerics_for_any_shape(data):
    bits = data.draw(st.integers(2, 8))
    unit = 32 if bits <= 4 else 1
    k = unit * data.draw(st.integers(1, 5 if unit == 32 else 90))
    split = unit * data.draw(st.integers(1, k // unit))
    arguments = linear_arguments(
        data.draw(st.sampled_from([0, 1, 2, 16, 17, 33])), data.draw(st.integers(1, 40)), k, split, bits
    )
    assert torch.equal(dual_scale_linear(*arguments), expected(dual_scale_linear, tuple(arguments)))


def test_dual_scale_linear_in_chunks_of_strided_operands(monkeypatch):
    monkeypatch.setattr(gemm, "CHUNK", 70)
    arguments = linear_arguments(23, 19, 96, 61, 8)
    arguments[0] = torch.randint(-128, 128, (23, 130), dtype=torch.int8)[:, 7:103]
    arguments[1] = torch.randint(-128, 128, (96, 19), dtype=torch.int8).T
    assert torch.equal(dual_scale_linear(*arguments), expected(dual_scale_linear, tuple(arguments)))


@settings(max_examples=40)
@given(data=st.data())
def test_the_per_token_operators_equal_numerics_for_any_shape(data):
    bits = data.draw(st.integers(2, 8))
    unit = 32 if bits <= 4 else 1
    k = unit * data.draw(st.integers(1, 5 if unit == 32 else 90))
    split = unit * data.draw(st.integers(1, k // unit))
    lead = data.draw(st.sampled_from([(), (0,), (1,), (5,), (2, 3), (33,)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    perm = torch.randperm(k).to(torch.int32) if data.draw(st.booleans()) else None
    op, shift = data.draw(st.sampled_from(MEASURING)), data.draw(st.integers(-9, 9))
    quantization = ((torch.randn(*lead, k) * 3 + shift).to(dtype), perm, split, data.draw(st.integers(2, 8)))
    q, scale = op(*quantization)
    for got, want in zip((q, scale), expected(op, quantization), strict=True):
        assert torch.equal(got, want) and got.is_contiguous()
    _, weight, weight_scale, _, offset, *rest = linear_arguments(1, data.draw(st.integers(1, 40)), k, split, bits)
    product = (q, scale, weight, weight_scale, offset, *rest)
    assert torch.equal(dual_scale_linear_per_token(*product), expected(dual_scale_linear_per_token, product))


@pytest.mark.parametrize("op", MEASURING)
@pytest.mark.parametrize("ready", [pytest.param(True, marks=needs("native")), False])
def test_the_per_token_operators_in_several_chunks_of_strided_rows(monkeypatch, op, ready):
    monkeypatch.setattr(native, "ready", lambda: ready)
    monkeypatch.setattr(per_token, "CHUNK", 100)
    monkeypatch.setattr(gemm, "CHUNK", 70)
    quantization = (torch.randn(40, 13).T, torch.randperm(40).to(torch.int32), 30, 8)
    q, scale = op(*quantization)
    want = expected(op, quantization)
    assert torch.equal(q, want[0]) and torch.equal(scale, want[1])
    _, weight, weight_scale, _, offset, *rest = linear_arguments(1, 19, 40, 30, 8)
    wide = torch.zeros(13, 50, dtype=torch.int8)
    wide[:, 7:47] = q
    product = (wide[:, 7:47], scale.T.contiguous().T, weight, weight_scale, offset, *rest)
    assert torch.equal(dual_scale_linear_per_token(*product), expected(dual_scale_linear_per_token, product))


@pytest.mark.parametrize("matmul", [pytest.param(gemm.int_mm, marks=needs("vnni")), gemm.exact_matmul])
@pytest.mark.parametrize("k", [1, 1024, 3001])
def test_extreme_integers_add_up_exactly(matmul, k):
    a = torch.full((3, k), -128, dtype=torch.int8)
    b = torch.full((2, k), -128, dtype=torch.int8)
    b[1] = 127
    got = matmul(a, b)
    assert got.dtype == torch.int32
    assert got.tolist() == [[16384 * k, -16256 * k]] * 3


@pytest.mark.parametrize("k", [1, 1024, 1025, 3001])
def test_products_in_float32_hold_the_same_integers(k):
    a, b = (torch.randint(-128, 128, (n, k), generator=torch.Generator().manual_seed(n)).to(torch.int8) for n in (5, 7))
    a[0], b[0], b[1] = -128, -128, 127
    got = gemm.exact_product(a, b)
    assert got.dtype == torch.float32
    assert torch.equal(got, (a.long() @ b.long().T).float()) and torch.equal(got, gemm.exact_matmul(a, b).float())


def test_the_product_in_float32_is_named_and_said_to_be_slow(monkeypatch):
    monkeypatch.setattr(gemm.cpu, "has_vnni", lambda: False)
    name = "int_mm" if gemm._HAS_VNNI else "float32"
    assert name == gemm.ON_CPU and gemm.IN_FLOAT == "float32"
    assert "integers are multiplied in float32, which is exact and slower than the float model" in gemm.in_float_note()


@pytest.mark.parametrize("stride", [0, 1, 5])
def test_a_single_row_of_any_stride_is_multiplied(stride):
    arguments = linear_arguments(1, 24, 64, 64, 8)
    want = expected(dual_scale_linear, tuple(arguments))
    arguments[0] = arguments[0].as_strided((1, 64), (stride, 1))
    assert torch.equal(dual_scale_linear(*arguments), want)
    one = linear_arguments(9, 1, 64, 64, 8)
    one[1] = one[1].as_strided((1, 64), (stride, 1))
    assert torch.equal(dual_scale_linear(*one), expected(dual_scale_linear, tuple(one)))


def test_the_reference_is_exact_under_autocast():
    a, b = torch.randint(-128, 128, (4, 300), dtype=torch.int8), torch.randint(-128, 128, (5, 300), dtype=torch.int8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gemm.exact_matmul(a, b)
    assert torch.equal(got, a.int() @ b.int().T)


def test_quantized_layer_is_close_to_the_float_layer():
    x, w, bias = torch.randn(30, 128), torch.randn(20, 128), torch.randn(20)
    x[:, 96:] *= 20
    scale, zero = torch.tensor([8 / 255, 160 / 255]), torch.tensor([3, -7], dtype=torch.int32)
    weight_scale = torch.stack([w[:, :96].abs().amax(1), w[:, 96:].abs().amax(1)]) / 127
    q_w = numerics.quantize_weight(w, weight_scale, 96, 8)
    offset = numerics.fold_offset(bias, q_w, weight_scale, scale, zero, 96)
    q = quantize_act(x, None, scale, zero, 96, 8)
    y = dual_scale_linear(q, q_w, weight_scale, scale, offset, 96, 8, torch.float32)
    want = torch.nn.functional.linear(x, w, bias)
    assert float((y - want).norm() / want.norm()) < 0.02


def test_a_graph_keeps_the_operators_and_any_number_of_rows():
    class Layer(torch.nn.Module):
        def forward(self, x, weight, weight_scale, scale, zero, offset):
            q = torch.ops.fxq.quantize_act(x, None, scale, zero, 64, 8)
            return torch.ops.fxq.dual_scale_linear(q, weight, weight_scale, scale, offset, 64, 8, torch.bfloat16)

    _, weight, weight_scale, scale, offset, *_ = linear_arguments(4, 24, 96, 64, 8)
    rest = (weight, weight_scale, scale, torch.zeros(2, dtype=torch.int32), offset)
    rows = {0: torch.export.Dim("rows", min=2)}
    program = torch.export.export(
        Layer(), (torch.randn(4, 96), *rest), dynamic_shapes=(rows, None, None, None, None, None)
    )
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [quantize_act.definition, dual_scale_linear.definition]
    x = torch.randn(11, 96)
    assert torch.equal(program.module()(x, *rest), Layer()(x, *rest))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 96), r"q is torch.float32 \(2, 96\): expected int8"),
        (1, torch.zeros(4, 96, dtype=torch.uint8), r"expected torch.int8 \(8, 96\)"),
        (2, torch.ones(1, 8), r"weight_scale is torch.float32 \(1, 8\): expected float32 \(2, 8\)"),
        (3, torch.ones(2).double(), "input_scale is torch.float64"),
        (4, torch.ones(9), "expected torch.int8 .* an offset of 9"),
        (4, torch.ones(8).double(), r"offset is torch.float64 \(8,\): expected float32 \[N\]"),
        (5, 97, r"split = 97: expected 1\.\.96"),
        (6, 9, r"bits = 9: expected 2\.\.8"),
        (7, torch.int32, "dtype = torch.int32"),
    ],
)
def test_wrong_arguments_of_dual_scale_linear_are_named(position, value, message):
    arguments = linear_arguments(2, 8, 96, 64, 8)
    arguments[position] = value
    assert dual_scale_linear.supports(*arguments)
    with pytest.raises(ValueError, match=f"fxq::dual_scale_linear: .*{message}"):
        dual_scale_linear(*arguments)


def test_packed_weights_need_whole_blocks():
    arguments = linear_arguments(2, 8, 96, 64, 4)
    arguments[5] = 50
    assert dual_scale_linear.supports(*arguments) == "K = 96, split = 50: packed weights need multiples of 32"


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 96, dtype=torch.float64), "x is torch.float64"),
        (1, torch.arange(96), "perm is torch.int64"),
        (2, torch.ones(1), r"expected float32 \(2,\) for split = 64"),
        (3, torch.zeros(2), "zero_point is torch.float32"),
        (4, 0, r"split = 0: expected 1\.\.96"),
        (5, 1, r"bits = 1: expected 2\.\.8"),
    ],
)
def test_wrong_arguments_of_quantize_act_are_named(position, value, message):
    arguments = [torch.zeros(2, 96), None, torch.ones(2), torch.zeros(2, dtype=torch.int32), 64, 8]
    arguments[position] = value
    with pytest.raises(ValueError, match=f"fxq::quantize_act: .*{message}"):
        quantize_act(*arguments)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 96, dtype=torch.float64), "x is torch.float64"),
        (1, torch.arange(96), "perm is torch.int64"),
        (1, torch.arange(95).int(), r"perm is torch.int32 \(95,\): expected int32 \(96,\)"),
        (2, 97, r"split = 97: expected 1\.\.96"),
        (3, 9, r"bits = 9: expected 2\.\.8"),
    ],
)
def test_wrong_arguments_of_quantize_per_token_are_named(position, value, message):
    arguments = [torch.zeros(2, 96), None, 64, 8]
    arguments[position] = value
    with pytest.raises(ValueError, match=f"fxq::quantize_per_token: .*{message}"):
        quantize_per_token(*arguments)
    with pytest.raises(ValueError, match=f"fxq::quantize_per_token_asymmetric: .*{message}"):
        quantize_per_token_asymmetric(*arguments)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 96), r"q is torch.float32 \(2, 96\): expected int8"),
        (1, torch.ones(2), r"input_scale is torch.float32 \(2,\): expected float32 \(2, 2\)"),
        (1, torch.ones(2, 2).double(), "input_scale is torch.float64"),
        (1, torch.ones(2, 3), r"input_scale is torch.float32 \(2, 3\): expected float32 \(2, 2\)"),
        (
            2,
            pack_panels(torch.zeros(8, 96, dtype=torch.int8), 60)[:, 1:],
            r"weight is torch.int8 \(1, 25, 64, 4\): exp",
        ),
        (3, torch.ones(1, 8), r"weight_scale is torch.float32 \(1, 8\): expected float32 \(2, 8\)"),
        (3, torch.tensor(1.0), r"weight_scale is torch.float32 \(\): expected"),
        (4, torch.ones(9), "expected torch.int8 .* an offset of 9"),
        (5, 97, r"split = 97: expected 1\.\.96"),
        (6, 9, r"bits = 9: expected 2\.\.8"),
        (7, torch.int32, "dtype = torch.int32"),
    ],
)
def test_wrong_arguments_of_dual_scale_linear_per_token_are_named(position, value, message):
    q, weight, weight_scale, _, *rest = linear_arguments(2, 8, 96, 64, 8)
    arguments = [q, torch.ones(2, 2), weight, weight_scale, *rest]
    arguments[position] = value
    with pytest.raises(ValueError, match=f"fxq::dual_scale_linear_per_token: .*{message}"):
        dual_scale_linear_per_token(*arguments)


def test_the_kernel_in_use_has_a_name(monkeypatch):
    panels = pack_panels(torch.zeros(8, 8, dtype=torch.int8), 8)
    for ready, quantizer, linear in ((True, native.name(), native.name()), (False, "eager", gemm.ON_CPU)):
        monkeypatch.setattr(native, "ready", lambda ready=ready: ready)
        assert used("quantize_act", "cpu") == quantizer
        assert used("fxq::dual_scale_linear.default", "cpu") == gemm.ON_CPU
        assert used("dual_scale_linear", "cpu", panels) == linear
    assert used("dual_scale_linear", "cuda:0") in ("triton", "reference")
    assert used("dual_scale_linear", "xpu") == "reference"
    with pytest.raises(ValueError, match="expected one of quantize_act, norm_quantize"):
        used("conv", "cpu")


def run(code: str) -> str:
    """Output of a Python program run at the root of the repository."""
    root = Path(fxq.kernels.__file__).absolute().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.sweep
@pytest.mark.any_cpu
def test_the_package_loads_twice_in_one_process():
    code = """
import gc, importlib, sys, torch, fxq.kernels as first
for name in [n for n in sys.modules if n.startswith("fxq.kernels")]: del sys.modules[name]
import fxq.kernels as second
assert first is not second
del first; gc.collect()
for op in second.OPS: op(*op.samples()[0])
print("twice", second.used("quantize_act", "cpu"))
"""
    assert run(code).strip() == f"twice {used('quantize_act', 'cpu')}"


@pytest.mark.any_cpu
def test_the_library_works_without_triton():
    code = """
import sys; sys.modules["triton"] = None
import fxq.kernels as k
for op in k.OPS: op(*op.samples()[0])
print(k.used("dual_scale_linear", "cuda"))
"""
    assert run(code).strip() == "reference"


@pytest.mark.any_cpu
def test_the_folder_is_imported_as_part_of_fxq():
    assert "ImportError: import fxq.kernels" in run("import kernels")


def test_zero_points_allow_half_the_channels():
    q = torch.zeros(1, 2**16 + 1, dtype=torch.int8)
    rest = (q, torch.ones(1, 1), torch.zeros(1), 2**16 + 1, 8, torch.float32)
    dual_scale_linear_per_token(q, torch.ones(1, 1), *rest)
    with pytest.raises(
        ValueError, match="q has 65537 channels: with zero points their sum can overflow int32; at most 65"
    ):
        dual_scale_linear_per_token(q, torch.ones(1, 2), *rest)
