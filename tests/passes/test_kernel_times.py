import math

import pytest
import torch

from fxq.core.config import Scheme
from fxq.kernels import native
from fxq.passes import kernel_times
from fxq.passes.kernel_times import LinearSize, kernel_seconds


def size(split=96, dtype=torch.float32):
    return LinearSize(33, 128, 40, split, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("split", [96, 128])
def test_every_scheme_is_timed_beside_floats(split, dtype):
    schemes = [
        Scheme(weight_bits=4),
        Scheme(),
        Scheme(per_token=True),
        Scheme(per_token=True, asymmetric=True),
        None,
    ]
    found = kernel_seconds(size(split, dtype), schemes)
    assert len(found) == 5 and all(0 < seconds < math.inf for seconds in found)


def test_weights_lie_as_for_the_optimized_module(monkeypatch):
    asked = []
    real = kernel_times.sample_operands
    monkeypatch.setattr(kernel_times, "sample_operands", lambda *given: asked.append(given[-2:]) or real(*given))
    for dtype in (torch.float32, torch.float16):
        kernel_seconds(size(dtype=dtype), [Scheme()])
    assert asked == [(not native.why_not(), True), (False, True)], "panels, and bell-shaped"


def test_times_of_rounds_are_medians_of_turns(monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(kernel_times, "clock_for", lambda threads, device: ("fake", lambda: float(next(ticks))))
    assert kernel_seconds(size(), [Scheme(), None]) == [1.0, 1.0]


@pytest.mark.parametrize("bias", [True, False])
def test_floats_add_a_bias_where_the_linear_has_one(bias, monkeypatch):
    added = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(kernel_times.F, "linear", lambda x, w, b: added.append(b) or linear(x, w, b))
    (call,) = kernel_times.kernel_calls(LinearSize(3, 128, 40, 128, torch.bfloat16, "cpu", bias), [None])
    assert call().shape == (3, 40) and (added[0] is not None) == bias


def test_float8_has_no_time():
    with pytest.raises(ValueError, match="only the times of integers are measured"):
        kernel_seconds(size(), [Scheme(format="float8_e4m3fn")])


def test_outliers_lie_as_in_layers_which_kernels_read_in_runs():
    size = LinearSize(8, 96, 16, 64, torch.float32, "cpu")
    order = kernel_times._outlier_order(size, torch.Generator().manual_seed(1))
    assert order.dtype == torch.int32 and torch.equal(order.sort().values, torch.arange(96, dtype=torch.int32))
    for part in (order[:64], order[64:]):
        assert bool((part.diff() > 0).all())
    assert not torch.equal(order, torch.arange(96, dtype=torch.int32))
