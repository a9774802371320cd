import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxq import numerics
from fxq.core.config import RecipeError
from fxq.passes.methods import Method, clipping, output_sqnr, ranges
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


def without_rows(p):
    """The problem as it is when there is no calibration data."""
    zeros, width = torch.zeros(p.weight.shape[1]), p.weight.shape[1]
    return dataclasses.replace(p, rows=torch.empty(0, width), row_weights=torch.empty(0), low=zeros, high=zeros)


@pytest.mark.parametrize("method", [MinMax(), RangeSearch()])
@pytest.mark.parametrize("outliers", [0, 32])
def test_a_per_token_scheme_gets_the_same_weights_with_and_without_data(method, outliers):
    p = problem(outliers=outliers, per_token=True)
    for update in (method.apply(p, None), method.apply(without_rows(p), None)):
        assert update.input_scale is None and update.input_zero_point is None
        assert torch.equal(update.weight, method.apply(p, None).weight)
        assert torch.equal(update.weight_scale, method.apply(p, None).weight_scale)


def test_no_ratio_of_scales_bounds_a_per_token_layer():
    p = problem(outliers=32, bits=8, per_token=True)
    p.weight[:, -32:] *= 1e7
    scale = RangeSearch().apply(p, None).weight_scale
    assert float((scale[1] / scale[0]).min()) > numerics.ratio_limit(96, 64)


def test_the_output_sqnr_of_a_per_token_layer_is_that_of_its_simulation():
    p = problem(outliers=32, bits=8, per_token=True)
    p.rows[::2] *= 1e3
    static = dataclasses.replace(p, scheme=dataclasses.replace(p.scheme, per_token=False))
    small = dataclasses.replace(p, rows=p.rows[1::2])
    update = RangeSearch().apply(p, None)
    assert output_sqnr(p, update) > 35 and output_sqnr(small, update) > 35
    assert output_sqnr(dataclasses.replace(static, rows=small.rows), RangeSearch().apply(static, None)) < 10


def test_an_output_sqnr_needs_rows():
    p = without_rows(problem(per_token=True))
    with pytest.raises(ValueError, match=r"layer blocks.0.x: without calibration rows its output has no measured SQNR"):
        output_sqnr(p, RangeSearch().apply(p, None))


@pytest.mark.parametrize("limit", [96, 300, 1])
def test_a_weight_searched_some_rows_at_a_time_gets_the_same_scales(limit, monkeypatch):
    p = problem(outputs=37, outliers=32)
    want = RangeSearch().apply(p, None)
    monkeypatch.setattr(ranges, "_SEARCH_LIMIT", limit)
    got = RangeSearch().apply(p, None)
    assert torch.equal(got.weight_scale, want.weight_scale) and torch.equal(got.weight, want.weight)


def test_the_memory_of_a_search_does_not_grow_with_the_outputs(monkeypatch):
    seen = []
    search = ranges._search_rows

    def watched(weight, *rest):
        seen.append(weight.numel())
        return search(weight, *rest)

    monkeypatch.setattr(ranges, "_search_rows", watched)
    search_weight_scale(torch.ones(3000, 1024), 8, (1.0,), ())
    assert sum(seen) == 3000 * 1024 and max(seen) <= ranges._SEARCH_LIMIT


def test_unclipped_means_the_exact_extremes():
    x = torch.randn(400, 96, generator=torch.Generator().manual_seed(0))
    scale, zero = search_input_range(x, 8, (1.0,), None, (-9.0, 3.0))
    assert scale == pytest.approx(12 / 255) and zero == round(9 * 255 / 12) - 128


def test_ranges_between_the_percentiles_and_far_extremes_are_tried():
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    x[0, 0], x[1:20, 1] = 1000.0, 12.0
    scale, _ = search_input_range(x, 8, (0.9, 1.0), None, (float(x.min()), 1000.0))
    plain, _ = search_input_range(x, 8, (0.9,))
    assert 2 * plain < scale


def test_weights_of_rows_count():
    x = torch.cat((torch.randn(500, 32, generator=torch.Generator().manual_seed(0)), torch.full((10, 32), 40.0)))
    heavy, light = torch.ones(510), torch.ones(510)
    heavy[500:], light[500:] = 100.0, 1e-6
    clips = (0.95, 1.0)
    assert search_input_range(x, 4, clips, heavy)[0] > 3 * search_input_range(x, 4, clips, light)[0]
    assert search_input_range(x, 4, clips, torch.full((510,), 7.0)) == search_input_range(x, 4, clips)


@pytest.mark.parametrize("width", [96, 1000, 1536, 4096])
def test_a_part_of_the_values_stands_for_all_channels_and_rows(width):
    x = torch.randn((1 << 22) // width, width, generator=torch.Generator().manual_seed(0))
    x[11] *= 500
    loud = x.clone()
    loud[:, 5] *= 30
    for values in (x, loud):
        flat, counts = clipping.representative(values, None, 0)
        assert len(flat) < 1.3 * clipping.SAMPLE_LIMIT and bool((counts > 0).all())
        for power in (0, 2, 4):
            want = float(values.double().pow(power).sum())
            assert float((flat.double().pow(power) * counts).sum()) == pytest.approx(want, rel=0.03)
        flat, counts = clipping.representative(values[torch.arange(len(values)) != 11], None, 0)
        want = float(values.double().square().sum() - values[11].double().square().sum())
        assert float((flat.double().square() * counts).sum()) == pytest.approx(want, rel=0.05)
