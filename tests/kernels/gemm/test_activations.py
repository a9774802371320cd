"""The table of activations, and one from outside that no kernel knows."""

import pytest
import torch

from fxq import numerics
from fxq.kernels import dual_scale_linear, dual_scale_linear_quantize, native
from fxq.kernels.gemm import epilogues
from fxq.kernels.gemm.activations import ACTIVATIONS, Activation, add
from fxq.kernels.gemm.op import sample_operands
from fxq.kernels.gemm.tiles import TABLE, candidates

SHIPPED = list(ACTIVATIONS)
NATIVE = pytest.mark.skipif(not native.ready(), reason=native.why_not() or "ready")


@pytest.fixture
def relu():
    yield add(Activation("relu", torch.relu, calls={torch.ops.aten.relu.default: {}}, spills=(90,)))
    del ACTIVATIONS["relu"]


def arguments(outputs, activation, panels, rows=50):
    random = torch.Generator().manual_seed(5)
    operands = sample_operands((2, rows, 75), outputs, 50, 8, random, panels)
    scale, zero_point = torch.tensor([0.2, 0.5]), torch.tensor([-90, 3]).int()
    return *operands, activation, scale, zero_point, outputs - 7, 8


@NATIVE
def test_the_native_kernels_have_every_activation_that_ships_under_a_code_of_its_own():
    codes = [native.activation_code(name) for name in SHIPPED]
    assert sorted(codes) == list(range(len(SHIPPED))) and native.activation_code("rel") == -1


@pytest.mark.parametrize("name", SHIPPED)
def test_a_row_that_is_not_finite_stays_so(name):
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), -1.0], [0.5, -2.0]])
    before = x.clone()
    y = ACTIVATIONS[name].reference(x)
    assert y.isfinite().all(1).tolist() == [False, False, True]
    assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("panels", "use_native"), [(False, True), pytest.param(True, True, marks=NATIVE), (True, False)]
)
@pytest.mark.parametrize("rows", [50, 0])
def test_one_from_outside_is_computed_by_torch_wherever_kernels_do_not_have_it(
    panels, use_native, rows, relu, monkeypatch
):
    if not use_native:
        monkeypatch.setattr(native, "ready", lambda: False)
    monkeypatch.setattr(epilogues, "CHUNK", 1000)
    given = arguments(75, "relu", panels, rows)
    values = dual_scale_linear(*given[:7], torch.float32).relu()
    want = numerics.quantize_input(values, *given[8:])
    got = dual_scale_linear_quantize(*given)
    assert got.dtype == torch.int8 and got.shape == (2, rows, 75) and got.is_contiguous()
    assert torch.equal(got, want) and torch.equal(dual_scale_linear_quantize.reference(*given), want)
    assert not rows or got.unique().numel() > 20


@pytest.mark.parametrize("panels", [False, pytest.param(True, marks=NATIVE)])
def test_marked_rows_are_marked_after_one_from_outside(panels, relu):
    q, *rest = arguments(75, "relu", panels)
    marked = torch.zeros(2, 50, dtype=torch.bool)
    marked[0, 7] = marked[1, 49] = True
    got = dual_scale_linear_quantize(numerics.poison(q, marked), *rest)
    assert torch.equal(numerics.poisoned(got), marked)


def test_where_torch_computes_it_is_said(relu, monkeypatch):
    assert all(ACTIVATIONS[name].eager_on(device) == "" for name in SHIPPED for device in ("cpu", "cuda", "meta"))
    monkeypatch.setattr(native, "ready", lambda: True)
    monkeypatch.setattr(native, "activation_code", lambda name: -1)
    assert relu.eager_on("cpu") == "the native kernels have no relu: torch computes it"
    monkeypatch.setattr(native, "ready", lambda: False)
    assert relu.eager_on("cpu") == "" == relu.eager_on("meta")


def test_tiles_of_one_from_outside_leave_out_what_spills(relu):
    assert candidates(90, "relu") == TABLE[1:] and candidates(80, "relu") == TABLE


def test_an_unknown_name_and_a_taken_one_are_refused(relu):
    with pytest.raises(ValueError, match="activation = 'tanh': expected one of none, gelu, gelu_tanh, relu"):
        dual_scale_linear_quantize(*arguments(75, "tanh", panels=False))
    with pytest.raises(ValueError, match="there is an activation 'relu' already: choose another name"):
        add(Activation("relu", torch.relu))
