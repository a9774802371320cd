import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxq.core.config import Scheme
from fxq.core.method import FLOAT8
from fxq.kernels import float8
from fxq.passes.methods import output_sqnr
from fxq.passes.methods.float_ranges import float_scale, search_float_input, search_float_weight
from fxq.passes.methods.ranges import MinMax, RangeSearch
from tests.toys import problem

RATIOS = RangeSearch().ratios


def error(values, scale):
    return float((float8.round_to(values / scale).float() * scale - values).square().sum())


def weight_errors(weight, scale):
    q = float8.quantize_weight(weight, scale[None], weight.shape[1])
    return (q.float() * scale[:, None] - weight).square().sum(1)


@given(seed=st.integers(0, 2**30), exponent=st.integers(-20, 20))
def test_no_scale_that_is_tried_is_better_whatever_the_unit(seed, exponent):
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    found = search_float_weight(weight, (1.0,), RATIOS)
    assert torch.equal(found, search_float_weight(weight * 4, (1.0,), RATIOS) / 4)
    best = weight_errors(weight, found) * (1 - 1e-6)
    for ratio in (*RATIOS, *(2 * r for r in RATIOS)):
        assert bool((best <= weight_errors(weight, weight.abs().amax(1) * ratio / 448)).all())


def test_a_channel_of_zeros_has_the_scale_1_and_numbers_of_float8_are_kept():
    held = torch.randn(5, 64).mul(50).to(float8.E4M3).float() * 0.25
    held[2] = 0
    found = search_float_weight(held, (0.999, 1.0), RATIOS)
    assert found[2] == 1 and bool((weight_errors(held, found) <= held.square().sum(1) * 1e-3).all())
    exact = held.clone()
    exact[:, 0] = 448 * 0.25
    assert not bool(weight_errors(exact, search_float_weight(exact, (1.0,), RATIOS)).any())


def test_input_scales_are_no_worse_than_the_least_that_clips_nothing():
    rows = torch.randn(200, 32)
    top = float(rows.abs().max())
    found = search_float_input(rows, (0.999, 1.0))
    assert error(rows, found) <= error(rows, float_scale(top)) * (1 + 1e-6)
    assert search_float_input(rows * 2.0**60, (0.999, 1.0)) == found * 2.0**60
    extremes = (-50 * top, top)  # seen by calibration, not in the sample
    assert search_float_input(rows, (1.0,), extremes=extremes) >= float_scale(0.5 * top)
    assert search_float_input(torch.zeros(4, 8), (1.0,)) == 1.0


@pytest.mark.parametrize("method", [MinMax(), RangeSearch()])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("outliers", [0, 32])
def test_methods_give_float8_and_scales_without_zero_points(method, per_token, outliers):
    p = problem(outliers=outliers)
    p = dataclasses.replace(p, scheme=Scheme(format=FLOAT8, per_token=per_token))
    update = method.apply(p, None)
    groups = 2 if outliers else 1
    assert update.weight.dtype == float8.E4M3 and update.weight_scale.shape == (groups, len(p.weight))
    assert update.input_zero_point is None and (update.input_scale is None) == per_token
    assert per_token or update.input_scale.shape == (groups,)
    assert 25 < output_sqnr(p, update) < 40


def test_a_search_is_no_worse_than_minmax():
    p = dataclasses.replace(problem(), scheme=Scheme(format=FLOAT8, per_token=True))
    found = [weight_errors(p.weight, m.apply(p, None).weight_scale[0]).sum() for m in (RangeSearch(), MinMax())]
    assert found[0] < found[1]
