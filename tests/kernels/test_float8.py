import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxq.kernels import float8
from fxq.kernels.float8 import E4M3, LARGEST

SEEDS = st.integers(0, 2**30)


def value_of(byte):
    """What a byte of e4m3 stands for, by the fields of its bits; None for NaN (OFP8, table 1)."""
    sign, exponent, mantissa = -1 if byte >> 7 else 1, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return None
    if not exponent:
        return sign * Fraction(mantissa, 8) * Fraction(2) ** -6
    return sign * (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)


POSITIVE = [value_of(byte) for byte in range(127)]
"""Every number that is not negative, ascending; the place of one is its byte."""


def nearest(x):
    """The byte of the number nearest to x, of two the one with an even mantissa; 448 is the largest."""
    size = min(abs(Fraction(x)), POSITIVE[-1])
    above = next(i for i, number in enumerate(POSITIVE) if number >= size)
    if POSITIVE[above] == size or not above:
        found = above
    else:
        low, high = size - POSITIVE[above - 1], POSITIVE[above] - size
        found = above - 1 if low < high or (low == high and above % 2) else above
    return found | (128 if math.copysign(1, x) < 0 else 0)


def bits(values):
    return values.contiguous().view(torch.uint8)


def test_every_byte_stands_for_the_number_of_its_fields():
    numbers = torch.arange(256, dtype=torch.uint8).view(E4M3).float().tolist()
    for byte, number in enumerate(numbers):
        want = value_of(byte)
        assert math.isnan(number) if want is None else Fraction(number) == want
    assert max(POSITIVE) == LARGEST and min(n for n in POSITIVE if n) == Fraction(2) ** -9


def test_every_number_and_what_lies_between_two_rounds_to_the_nearest():
    middle = [(a + b) / 2 for a, b in itertools.pairwise(POSITIVE)]
    tried = [float(n) for n in (*POSITIVE, *middle)] + [449.0, 463.9, 464.0, 1e30, 2.0**-10, 2.0**-11, 2.0**-60]
    tried += [math.nextafter(x, math.inf) for x in map(float, middle)]
    tried += [-x for x in tried]
    got = bits(float8.round_to(torch.tensor(tried, dtype=torch.float64).float())).tolist()
    assert got == [nearest(float(torch.tensor(x).float())) for x in tried]


@given(st.floats(-1000, 1000, width=32))
def test_any_number_rounds_to_the_nearest(x):
    assert bits(float8.round_to(torch.tensor([x]))).item() == nearest(x)


def test_nan_is_known_by_its_bits_and_is_nothing_else():
    for byte in range(256):
        held = torch.full((2, 3), 0x3A, dtype=torch.uint8)
        held[1, 1] = byte
        assert float8.has_nan(held.view(E4M3)) == (value_of(byte) is None)


def test_spacing_is_the_distance_to_the_next_number():
    values = torch.arange(126, dtype=torch.uint8).view(E4M3)
    want = [float(b - a) for a, b in itertools.pairwise(POSITIVE)]
    assert float8.spacing(values).tolist() == want
    negative = torch.arange(128, 254, dtype=torch.uint8).view(E4M3)
    assert float8.spacing(negative).tolist() == want


@st.composite
def rows_and_split(draw):
    generator = torch.Generator().manual_seed(draw(SEEDS))
    width = draw(st.integers(1, 40))
    x = torch.randn(draw(st.integers(1, 4)), width, generator=generator) * 10.0 ** draw(st.integers(-6, 6))
    return x, draw(st.integers(1, width))


@given(rows_and_split(), SEEDS)
def test_static_inputs_are_the_nearest_multiples_of_their_groups_scale(case, seed):
    x, split = case
    groups = 1 if split == x.shape[1] else 2
    scale = torch.rand(groups, generator=torch.Generator().manual_seed(seed)) * float(x.abs().max()) / 300 + 1e-9
    q = float8.quantize_input(x, scale, split)
    of_channel = scale[(torch.arange(x.shape[1]) >= split).long()]
    wanted = (x * of_channel.reciprocal()).flatten().tolist()
    assert q.dtype == E4M3 and bits(q).flatten().tolist() == [nearest(value) for value in wanted]
    assert torch.equal(float8.dequantize_input(q, scale, split), q.float() * of_channel)


@given(rows_and_split())
def test_scales_per_token_use_the_whole_range_of_every_row_and_group(case):
    x, split = case
    q, scale = float8.quantize_per_token(x, split)
    for part, column in zip((slice(0, split), slice(split, None)), scale.unbind(-1), strict=False):
        top = x[:, part].abs().amax(1)
        assert torch.equal(column, top / torch.full_like(top, 448)) and bool(
            (q[:, part].float().abs().amax(1) == 448).all()
        )
        error = (float8.dequantize_per_token(q, scale, split)[:, part] - x[:, part]).abs()
        # Half a unit in the last of four places of what is normal, half of the least number below.
        assert bool((error <= x[:, part].abs() * 2.0**-4 * 1.001 + column[:, None] * 2.0**-10 * 1.001).all())


def test_rows_of_nothing_have_the_scale_1_and_rows_that_are_not_finite_nan():
    x = torch.randn(5, 8)
    x[0], x[1], x[2, 3], x[3, 7] = 0, 1e-37, float("nan"), float("inf")
    q, scale = float8.quantize_per_token(x, 6)
    assert scale[:2].tolist() == [[1, 1], [1, 1]] and not bool(q[:2].float().any())
    assert scale.isnan().tolist() == [[False] * 2, [False] * 2, [True, False], [False, True], [False] * 2]
    assert not bool(q.float()[2, :6].any()) and not float8.has_nan(q)
    y = float8.matmul(q, scale, torch.ones(3, 8).to(E4M3), torch.ones(2, 3), torch.zeros(3), 6)
    assert y.isnan().all(1).tolist() == [False, False, True, True, False]
    static = float8.quantize_input(x, torch.ones(2), 6).float()
    assert static.isnan().sum() == 2 and bool(static[2, 3].isnan()) and bool(static[3, 7].isnan())


@pytest.mark.parametrize("split", [12, 7])
@pytest.mark.parametrize("measured", [True, False])
def test_a_product_is_that_of_the_numbers_it_stands_for(split, measured):
    torch.manual_seed(0)
    groups = 1 if split == 12 else 2
    weight, weight_scale = torch.randn(5, 12), torch.rand(groups, 5) * 0.01 + 0.01
    x, offset = torch.randn(2, 3, 12), torch.randn(5)
    q_w = float8.quantize_weight(weight, weight_scale, split)
    q, scale = float8.quantize_per_token(x, split)
    if not measured:
        scale = torch.rand(groups) * 0.01 + 0.01
        q = float8.quantize_input(x, scale, split)
    rows = (float8.dequantize_per_token if measured else float8.dequantize_input)(q, scale, split).double()
    group = (torch.arange(12) >= split).long()
    want = rows @ (q_w.double() * weight_scale[group].T).T + offset.double()
    got = float8.matmul(q, scale, q_w, weight_scale, offset, split)
    assert got.shape == (2, 3, 5)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
