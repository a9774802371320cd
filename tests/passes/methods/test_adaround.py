import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxq import numerics
from fxq.passes.methods import output_sqnr
from fxq.passes.methods.adaround import AdaRound, inverse_rectified_sigmoid, rectified_sigmoid
from fxq.passes.methods.ranges import RangeSearch
from tests.toys import problem

ROUND = AdaRound(iterations=400, rows=64)


def weight_error(p, update):
    return float((numerics.dequantize_weight(update.weight, update.weight_scale, p.split) - p.weight).square().sum())


def same(a, b):
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)]
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


@given(h=st.floats(0, 1, width=32))
def test_the_rectified_sigmoid_is_inverted(h):
    h = torch.tensor(h)
    torch.testing.assert_close(rectified_sigmoid(inverse_rectified_sigmoid(h)), h, atol=1e-5, rtol=0)


@pytest.mark.parametrize("outliers", [0, 32])
def test_the_output_gets_better_and_the_weight_worse(outliers):
    p = problem(outliers=outliers)
    nearest = RangeSearch().apply(p, None)
    learned = ROUND.apply(p, nearest)
    assert output_sqnr(p, learned) > output_sqnr(p, nearest) + 0.5
    assert weight_error(p, learned) > weight_error(p, nearest)


def test_every_weight_is_rounded_up_or_down():
    p = problem()
    nearest = RangeSearch().apply(p, None)
    learned = ROUND.apply(p, nearest)
    scaled = p.weight / nearest.weight_scale[0][:, None]
    assert torch.equal(learned.weight_scale, nearest.weight_scale)
    low, high = numerics.integer_range(4)
    step = learned.weight - scaled.floor().clamp(low, high)
    assert set(step.unique().tolist()) <= {-0.0, 0.0, 1.0}


def test_the_result_is_a_function_of_problem_and_seed():
    p, method = problem(), AdaRound(iterations=30, rows=32)
    nearest = RangeSearch().apply(p, None)
    first = method.apply(p, nearest)
    torch.rand(7)
    assert same(method.apply(p, nearest), first)
    assert not same(method.apply(dataclasses.replace(p, seed=1), nearest), first)


def test_row_weights_decide_which_rows_are_fitted():
    p = problem(count=240)
    nearest = RangeSearch().apply(p, None)
    half = torch.arange(240) < 120

    def error_of_first_half(weights):
        learned = ROUND.apply(dataclasses.replace(p, row_weights=weights), nearest)
        return output_sqnr(dataclasses.replace(p, rows=p.rows[:120]), learned)

    assert error_of_first_half(torch.where(half, 2.0, 0.0)) > error_of_first_half(torch.where(half, 0.0, 2.0))


def test_a_layer_that_is_not_reconstructed_passes_unchanged():
    p = problem(reconstruct=False)
    nearest = RangeSearch().apply(p, None)
    assert ROUND.apply(p, nearest) is nearest


def test_nothing_is_kept_that_makes_the_output_worse():
    p = problem(bits=8)
    nearest = RangeSearch().apply(p, None)
    wild = AdaRound(iterations=3, rows=4, rounding_rate=50.0, scale_rate=3.0).apply(p, nearest)
    assert output_sqnr(p, wild) >= output_sqnr(p, nearest)


def test_scales_must_be_chosen_before():
    with pytest.raises(ValueError, match="put RangeSearch or MinMax first"):
        ROUND.apply(problem(), None)


@pytest.mark.parametrize("outliers", [0, 32])
def test_a_per_token_layer_learns_its_rounding(outliers):
    p = problem(outliers=outliers, per_token=True)
    nearest = RangeSearch().apply(p, None)
    learned = ROUND.apply(p, nearest)
    assert output_sqnr(p, learned) > output_sqnr(p, nearest) + 0.5
    assert learned.input_scale is None and torch.equal(learned.weight_scale, nearest.weight_scale)


def test_without_rows_nothing_is_learned():
    p = problem(per_token=True)
    p = dataclasses.replace(p, rows=p.rows[:0], row_weights=p.row_weights[:0])
    nearest = RangeSearch().apply(p, None)
    assert ROUND.apply(p, nearest) is nearest
