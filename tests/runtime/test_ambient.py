import contextlib
import copy

import pytest
import torch
from torch import nn

import fxq
from fxq.passes.methods.adaround import AdaRound
from fxq.passes.methods.ranges import RangeSearch
from fxq.runtime.ambient import own_tensors, without_autocast
from tests.toys import relative_error, rows

X = rows(16, 64)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64, bias=False), nn.LayerNorm(64), nn.Linear(64, 96), nn.GELU()).eval()


def plain(**scheme):
    methods = (RangeSearch(), AdaRound(iterations=5, rows=16))
    rules = (fxq.Rule("*", fxq.Scheme(**scheme)),)
    return fxq.Recipe(name="plain", rules=rules, methods=methods, weighting="uniform")


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


MODES = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("data", [[X, X], None], ids=["static", "per token"])
def test_what_the_process_has_set_does_not_matter(mode, data, tmp_path):
    m, recipe = model(), plain(per_token=data is None)
    want = fxq.quantize(m, data, recipe, example_inputs=X, progress=False)
    y = want(X)
    with MODES[mode]():
        quantized = fxq.quantize(m, data, recipe, example_inputs=X, progress=False)
        fxq.save(quantized, tmp_path / "bundle")
        loaded = fxq.load(tmp_path / "bundle")
        applied = fxq.apply(copy.deepcopy(m), tmp_path / "bundle")
        optimized = fxq.optimize(quantized)
        inside = [made(X).detach().clone() for made in (quantized, loaded)]
    assert {n: (t.dtype, t.device.type) for n, t in quantized.state_dict().items()} == {
        n: (t.dtype, t.device.type) for n, t in want.state_dict().items()
    }
    assert all(torch.equal(a, b) for a, b in zip(want.buffers(), quantized.buffers(), strict=True))
    for made in (quantized, loaded):
        assert torch.equal(made(X), y)
    for got in (*inside, optimized(X), applied(X)):
        assert float((got.detach().float() - y).norm() / y.norm()) < 0.02
    assert relative_error(m, quantized, X) < 0.03


def test_operators_have_samples_whatever_the_default_dtype():
    with default_dtype(torch.bfloat16):
        for op in fxq.kernels.OPS:
            for arguments in op.samples():
                assert op.supports(*arguments) == "", op


def test_own_tensors_are_ordinary_ones_on_the_cpu():
    with default_device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        with own_tensors():
            made = torch.ones(2, 2)
            product = made @ made
        assert torch.ones(1).device.type == "meta"
    assert made.device.type == "cpu" and not made.is_inference() and product.dtype == torch.float32


def test_autocast_goes_on_afterwards():
    with torch.autocast("cpu", torch.bfloat16):
        with without_autocast():
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
