import pytest
import torch

from fxq.passes.transforms.scaling import column_tops, scaled_weight, smoothing_scale
from tests.toys import rows


@pytest.mark.parametrize("unit", [2.0**-100, 2.0**100])
def test_scales_have_no_unit_and_their_geometric_mean_is_one(unit):
    x, w = rows(96).abs(), rows(96, seed=3).abs()
    scale = smoothing_scale(x, w, 0.5)
    torch.testing.assert_close(scale, (x / w).sqrt().double() / (x / w).sqrt().log().mean().exp(), rtol=1e-5, atol=0)
    assert torch.equal(smoothing_scale(x * unit, w / unit, 0.5), scale)


def test_dead_channels_have_a_scale_of_one_and_those_nearly_dead_a_finite_one():
    x, w = torch.tensor([1.0, 0.0, 1.0, 1e-37, 1e30]), torch.tensor([2.0, 1.0, 0.0, 1.0, 1e-30])
    scale = smoothing_scale(x, w, 0.75)
    assert scale[1] == scale[2] == 1 and bool((scale >= 2.0**-12).all() and (scale <= 2.0**12).all())
    assert torch.equal(smoothing_scale(torch.zeros(3), torch.ones(3), 0.5), torch.ones(3, dtype=torch.float64))


def test_a_scaled_weight_undoes_the_scaling_of_its_input_in_its_dtype():
    x, weight, multiplier = rows(5, 96), rows(7, 96, seed=3), rows(96, seed=4).abs() + 0.1
    torch.testing.assert_close((x * multiplier) @ scaled_weight(weight, multiplier).T, x @ weight.T)
    assert scaled_weight(weight.bfloat16(), multiplier).dtype == torch.bfloat16


def test_columns_are_as_large_as_in_any_weight_that_reads_them():
    assert column_tops([torch.tensor([[1.0, -5], [2, 3]]), torch.tensor([[-4.0, 1]])]).tolist() == [4, 5]
