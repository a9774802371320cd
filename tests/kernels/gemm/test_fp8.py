import pytest
import torch

from fxq.kernels import FLOAT8 as OPS
from fxq.kernels import used
from fxq.kernels.gemm import fp8
from fxq.kernels.gemm.fp8 import (
    FP8,
    dual_scale_linear_fp8,
    dual_scale_linear_fp8_per_token,
    quantize_fp8,
    quantize_fp8_per_token,
)

EVERY_SAMPLE = [pytest.param(op, sample, id=f"{op.name}-{i}") for op in OPS for i, sample in enumerate(op.samples())]


def linear_arguments() -> list:
    q, weight = torch.randn(5, 96).mul(60).to(FP8), torch.randn(8, 96).mul(60).to(FP8)
    return [q, weight, torch.rand(2, 8) + 0.1, torch.rand(2) + 0.1, torch.randn(8), 64, torch.float32]


@pytest.mark.parametrize(("op", "sample"), EVERY_SAMPLE)
def test_schema_fake_and_autograd_registration_hold(op, sample):
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if sample[0].dtype != FP8:  # the schema check multiplies its inputs, which torch cannot do in float8
        checks.append("test_schema")
    torch.library.opcheck(op.definition, sample, test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "sample"), EVERY_SAMPLE)
def test_the_gpu_kernel_agrees_with_the_reference(op, sample):
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no CUDA device with float8")
    results = op(*(a.cuda() if isinstance(a, torch.Tensor) else a for a in sample)), op.reference(*sample)
    for got, want in zip(*map(torch.utils._pytree.tree_leaves, results), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        if want.numel():
            difference = (got.cpu().double() - want.double()).abs()
            assert float(difference.max()) <= op.max_error * float(want.double().abs().max())


def test_values_saturate_and_round_half_to_even():
    x = torch.tensor([[1e4, -1e4, 448.0, 17.0, 19.0, 2**-10]])
    got = quantize_fp8(x, None, torch.ones(1), 6)
    assert got.float().tolist() == [[448.0, -448.0, 448.0, 16.0, 20.0, 0.0]]


def test_each_group_has_its_scale_after_the_gather():
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    perm = torch.tensor([3, 0, 1, 2], dtype=torch.int32)
    got = quantize_fp8(x, perm, torch.tensor([0.5, 2.0]), 3)
    assert got.float().tolist() == [[8.0, 2.0, 4.0, 1.5]]


@pytest.mark.parametrize("split", [96, 61])
def test_the_reference_is_the_product_of_what_float8_stores(split):
    q, weight, weight_scale, input_scale, offset, _, dtype = linear_arguments()
    groups = 1 if split == 96 else 2
    scales = (weight_scale[:groups], input_scale[:groups])
    per_channel = (torch.arange(96) >= split).long()
    x = q.double() * scales[1].double()[per_channel]
    w = weight.double() * scales[0].double()[per_channel].T
    want = x @ w.T + offset
    got = dual_scale_linear_fp8(q, weight, *scales, offset, split, dtype)
    assert float((got.double() - want).abs().max()) < 1e-5 * float(want.abs().max())


def test_a_quantized_layer_is_close_to_the_float_layer():
    x, w, bias = torch.randn(30, 128), torch.randn(20, 128), torch.randn(20)
    x[:, 96:] *= 50
    scale = torch.stack([x[:, :96].abs().max(), x[:, 96:].abs().max()]) / fp8.LARGEST
    weight_scale = torch.stack([w[:, :96].abs().amax(1), w[:, 96:].abs().amax(1)]) / fp8.LARGEST
    q_w = torch.cat([w[:, :96] / weight_scale[0, :, None], w[:, 96:] / weight_scale[1, :, None]], dim=1).to(FP8)
    q = quantize_fp8(x, None, scale, 96)
    y = dual_scale_linear_fp8(q, q_w, weight_scale, scale, bias, 96, torch.float32)
    want = torch.nn.functional.linear(x, w, bias)
    assert float((y - want).norm() / want.norm()) < 0.05


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 96), r"q is torch.float32 \(2, 96\): expected torch.float8_e4m3fn \[..., K\]"),
        (1, torch.zeros(8, 95).to(FP8), r"weight is torch.float8_e4m3fn \(8, 95\): expected .* \(8, 96\)"),
        (2, torch.ones(1, 8), r"weight_scale is torch.float32 \(1, 8\): expected float32 \(2, 8\) for split = 64"),
        (3, torch.ones(2).double(), "input_scale is torch.float64"),
        (4, torch.ones(2, 8), r"offset is torch.float32 \(2, 8\): expected float32 \[N\]"),
        (5, 0, r"split = 0: expected 1\.\.96"),
        (6, torch.int8, "dtype = torch.int8"),
    ],
)
def test_wrong_arguments_of_dual_scale_linear_fp8_are_named(position, value, message):
    arguments = linear_arguments()
    arguments[position] = value
    with pytest.raises(ValueError, match=f"fxq::dual_scale_linear_fp8: {message}"):
        dual_scale_linear_fp8(*arguments)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 96, dtype=torch.int8), "x is torch.int8"),
        (1, torch.arange(96), "perm is torch.int64"),
        (2, torch.ones(1), r"scale is .* expected float32 \(2,\) for split = 64"),
        (3, 97, r"split = 97: expected 1\.\.96"),
    ],
)
def test_wrong_arguments_of_quantize_fp8_are_named(position, value, message):
    arguments = [torch.zeros(2, 96), None, torch.ones(2), 64]
    arguments[position] = value
    with pytest.raises(ValueError, match=f"fxq::quantize_fp8: {message}"):
        quantize_fp8(*arguments)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(5, 96).to(torch.int8), "q is torch.int8 .* from quantize_fp8_per_token"),
        (1, torch.ones(5, 1), r"input_scale is torch.float32 \(5, 1\): expected float32 \(5, 2\)"),
        (1, torch.ones(5, 2).double(), "input_scale is torch.float64"),
        (2, torch.zeros(8, 96, dtype=torch.int8), "weight is torch.int8"),
        (3, torch.ones(2, 7), r"weight_scale is torch.float32 \(2, 7\): expected float32 \(2, 8\)"),
        (5, 97, r"split = 97: expected 1\.\.96"),
        (6, torch.float64, "dtype = torch.float64"),
    ],
)
def test_wrong_arguments_of_dual_scale_linear_fp8_per_token_are_named(position, value, message):
    q, weight, weight_scale, _, offset, split, dtype = linear_arguments()
    arguments = [q, torch.ones(5, 2), weight, weight_scale, offset, split, dtype]
    arguments[position] = value
    with pytest.raises(ValueError, match=f"fxq::dual_scale_linear_fp8_per_token: {message}"):
        dual_scale_linear_fp8_per_token(*arguments)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 96).double(), "x is torch.float64"),
        (1, torch.arange(95).int(), "perm is"),
        (2, 0, "split = 0"),
    ],
)
def test_wrong_arguments_of_quantize_fp8_per_token_are_named(position, value, message):
    arguments = [torch.zeros(2, 96), None, 64]
    arguments[position] = value
    with pytest.raises(ValueError, match=f"fxq::quantize_fp8_per_token: {message}"):
        quantize_fp8_per_token(*arguments)


def test_rows_of_any_size_are_multiplied_alike():
    weight, weight_scale = torch.randn(8, 96), torch.rand(1, 8) + 0.5
    q_w = (weight * 60).to(FP8)
    x = torch.randn(5, 96)
    factor = 2.0 ** torch.arange(-20, 20, 8)
    q, scale = quantize_fp8_per_token(x * factor[:, None], None, 96)
    tail = (q_w, weight_scale, torch.zeros(8), 96, torch.float32)
    plain, plain_scale = quantize_fp8_per_token(x, None, 96)
    assert torch.equal(q.view(torch.uint8), plain.view(torch.uint8))
    want = dual_scale_linear_fp8_per_token(plain, plain_scale, *tail) * factor[:, None]
    assert torch.equal(dual_scale_linear_fp8_per_token(q, scale, *tail), want)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_what_runs_is_said_as_it_is(op, monkeypatch):
    assert used(op.name, "cpu") == fp8.ON_CPU == "reference in float32"
    monkeypatch.setattr(fp8, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert used(op.name, "cuda:0") == "none"
    assert fp8.unusable("cuda:0") == "float8 needs sm_89, this GPU is sm_86"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert used(op.name, "cuda:0") == op.used("cuda") and not fp8.unusable("cuda") and not fp8.unusable("cpu")
