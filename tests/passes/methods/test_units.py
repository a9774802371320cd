import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxq.passes.methods.units import TINY, unit, unit_of


@given(st.floats(min_value=2.0**-149, max_value=2.0**127, width=32, allow_subnormal=True))
def test_a_unit_is_a_power_of_two_near_its_magnitude(top):
    size = unit(torch.tensor([top]))
    mantissa, _ = torch.frexp(size)
    assert float(mantissa) == 0.5 and bool(torch.isfinite(1 / size)) and float(size) >= TINY
    assert 2.0**-24 < float(torch.tensor([top]) / size) <= 4


def test_units_of_zeros_and_of_nothing_are_one():
    assert unit(torch.zeros(3)).tolist() == [1.0] * 3
    assert unit_of(torch.empty(0, 4)) == 1.0 and unit_of(torch.zeros(2, 2)) == 1.0


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_dividing_by_a_unit_and_multiplying_with_it_changes_nothing(scale):
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)) * scale
    assert torch.equal(x / unit_of(x) * unit_of(x), x) and 0.4 < float((x / unit_of(x)).abs().max()) <= 4
