import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxq import numerics
from fxq.config import RecipeError
from fxq.passes.methods import Method, output_sqnr
from fxq.passes.methods.adaround import AdaRound
from fxq.passes.methods.ranges import MinMax, RangeSearch, search_input_range, search_weight_scale
from tests.toys import problem


def weight_error(p, update):
    return float((numerics.dequantize_weight(update.weight, update.weight_scale, p.split) - p.weight).square().sum())


def input_error(p, update):
    q = numerics.quantize_input(p.rows, update.input_scale, update.input_zero_point, p.split, p.scheme.input_bits)
    x_hat = numerics.dequantize_input(q, update.input_scale, update.input_zero_point, p.split)
    return float((x_hat - p.rows).square().sum())


@given(seed=st.integers(0, 2**30), bits=st.sampled_from([4, 8]), outliers=st.sampled_from([0, 32]))
def test_a_searched_range_is_never_worse_than_minmax(seed, bits, outliers):
    p = problem(seed=seed, bits=bits, input_bits=6, outliers=outliers, count=60)
    p.weight[:, 3] *= 20
    searched, plain = RangeSearch().apply(p, None), MinMax().apply(p, None)
    assert weight_error(p, searched) <= weight_error(p, plain) * (1 + 1e-5)
    assert input_error(p, searched) <= input_error(p, plain) * (1 + 1e-5)


def test_a_rare_extreme_is_clipped():
    p = problem(input_bits=4, count=400)
    p.rows[0, 0] = 1e3
    p = dataclasses.replace(p, high=p.rows.amax(0))
    assert input_error(p, RangeSearch().apply(p, None)) <= input_error(p, MinMax().apply(p, None))
    scale, _ = search_input_range(torch.cat((torch.randn(10000), torch.tensor([50.0]))), 4, (0.999, 1.0))
    assert scale < 1


def test_minmax_uses_the_exact_extremes_and_not_the_sample():
    p = dataclasses.replace(problem(count=20), low=torch.full((96,), -9.0), high=torch.full((96,), 3.0))
    update = MinMax().apply(p, None)
    assert float(update.input_scale) == pytest.approx(12 / 255)
    assert torch.equal(update.weight_scale[0], p.weight.abs().amax(1) / 7)


@pytest.mark.parametrize("method", [MinMax(), RangeSearch()])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("outliers", [0, 32])
def test_updates_have_the_declared_dtypes_and_shapes(method, bits, outliers):
    p = problem(bits=bits, outliers=outliers)
    update, groups = method.apply(p, None), 2 if outliers else 1
    low, high = numerics.integer_range(bits)
    assert isinstance(method, Method)
    assert update.weight.dtype == torch.int8 and update.weight.shape == (13, 96)
    assert low <= int(update.weight.min()) and int(update.weight.max()) <= high
    assert update.weight_scale.dtype == torch.float32 and update.weight_scale.shape == (groups, 13)
    assert update.input_scale.dtype == torch.float32 and update.input_scale.shape == (groups,)
    assert update.input_zero_point.dtype == torch.int32 and update.input_zero_point.shape == (groups,)


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-44, 1e30])
def test_rows_of_any_size_have_a_usable_scale(value):
    weight = torch.full((3, 32), value)
    scale = search_weight_scale(weight, 4, (0.999, 1.0), (1.0,))
    assert bool(torch.isfinite(weight / scale[:, None]).all() and (scale > 0).all())
    p = dataclasses.replace(problem(outputs=3, width=32), weight=weight)
    for update in (MinMax().apply(p, None), RangeSearch().apply(p, None)):
        refined = AdaRound(iterations=2, rows=8).apply(p, update)
        assert bool(torch.isfinite(refined.input_scale).all())


def test_a_constant_input_far_from_zero_keeps_its_value():
    values = torch.full((50,), 100.0) + torch.linspace(0, 1e-5, 50)
    scale, zero = search_input_range(values, 8, (1.0,))
    q = numerics.quantize_input(values[None], torch.tensor([scale]), torch.tensor([zero], dtype=torch.int32), 50, 8)
    x_hat = numerics.dequantize_input(q, torch.tensor([scale]), torch.tensor([zero], dtype=torch.int32), 50)
    torch.testing.assert_close(x_hat[0], values, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_two_scales_lower_the_error_on_planted_outlier_channels(bits):
    dual = problem(outliers=32, bits=bits)
    single = dataclasses.replace(dual, split=96)
    for method in (MinMax(), RangeSearch()):
        one, two = method.apply(single, None), method.apply(dual, None)
        assert weight_error(dual, two) < 0.7 * weight_error(single, one)
        assert output_sqnr(dual, two) > output_sqnr(single, one)


@pytest.mark.parametrize("options", [{"percentiles": ()}, {"percentiles": (0.1,)}, {"ratios": (0.0,)}])
def test_settings_without_meaning_are_refused(options):
    with pytest.raises(RecipeError, match="RangeSearch: "):
        RangeSearch(**options)
