import dataclasses

import pytest
import torch

from fxq import numerics
from fxq.core.config import RecipeError
from fxq.passes.methods import simulated_input
from fxq.passes.methods.input_search import InputSearch
from fxq.passes.methods.ranges import MinMax, RangeSearch
from tests.toys import problem


def output_error(p, update):
    """Squared error of the float weights' outputs by the rounding of inputs, means apart."""
    error = (simulated_input(p, update, p.rows) - p.rows) @ p.weight.T
    return float((error - error.mean(0)).square().sum())


@pytest.mark.parametrize("first", [MinMax(), RangeSearch()], ids=["MinMax", "RangeSearch"])
@pytest.mark.parametrize(("bits", "outliers"), [(4, 0), (6, 32)])
def test_the_output_error_of_the_inputs_falls(first, bits, outliers):
    p = problem(outputs=40, input_bits=bits, outliers=outliers)
    before = first.apply(p, None)
    after = InputSearch().apply(p, before)
    assert output_error(p, after) <= output_error(p, before)
    assert torch.equal(after.weight, before.weight)


def test_a_huge_value_that_no_output_sees_is_clipped():
    p = problem(outputs=40, input_bits=6)
    x = p.rows.clone()
    x[3, 11] = 500.0
    p.weight[:, 11] *= 1e-4
    p = dataclasses.replace(p, rows=x, low=x.amin(0), high=x.amax(0))
    ratios = (0.01, 0.05, 0.2, 1.0)
    before, after = MinMax().apply(p, None), InputSearch(ratios).apply(p, MinMax().apply(p, None))
    assert float(after.input_scale) < 0.3 * float(before.input_scale)
    assert output_error(p, after) < 0.2 * output_error(p, before)


def test_rows_that_count_decide():
    p = problem(outputs=40, input_bits=4)
    x = torch.cat((p.rows, 8 * p.rows))
    weights = torch.ones(len(x))
    weights[len(p.rows) :] = 1e-6
    p = dataclasses.replace(p, rows=x, low=x.amin(0), high=x.amax(0), row_weights=weights)
    small = InputSearch((0.1, 0.2, 0.5, 1.0)).apply(p, MinMax().apply(p, None))
    p = dataclasses.replace(p, row_weights=weights.flip(0))
    large = InputSearch((0.1, 0.2, 0.5, 1.0)).apply(p, MinMax().apply(p, None))
    assert float(small.input_scale) < 0.5 * float(large.input_scale)


def test_the_sums_of_both_groups_still_fit():
    p = problem(outliers=32)
    x = p.rows.clone()
    x[:, -32:] *= 1e5
    p = dataclasses.replace(p, rows=x, low=x.amin(0), high=x.amax(0))
    update = InputSearch((0.001, 1.0)).apply(p, MinMax().apply(p, None))
    scale = update.input_scale[:, None] * update.weight_scale
    assert float((scale[1] / scale[0]).max()) <= numerics.ratio_limit(p.weight.shape[1], p.split)


def test_there_is_nothing_to_search_per_token_or_without_rows():
    p = problem(per_token=True)
    update = RangeSearch().apply(p, None)
    assert InputSearch().apply(p, update) is update
    with pytest.raises(ValueError, match="put RangeSearch or MinMax first"):
        InputSearch().apply(p, None)


def test_settings_are_checked():
    with pytest.raises(RecipeError, match="ratios"):
        InputSearch(ratios=())
    with pytest.raises(RecipeError, match="rows = 0"):
        InputSearch(rows=0)
