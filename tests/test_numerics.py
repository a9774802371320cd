import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxq import numerics
from fxq.passes.methods.ranges import affine

BITS = st.integers(2, 8)
SEEDS = st.integers(0, 2**30)


@st.composite
def inputs(draw):
    """(x [M, K], scale [G], zero_point [G], split, bits) with values inside and outside the range."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    width, bits = draw(st.integers(1, 70)), draw(BITS)
    split = draw(st.integers(1, width))
    groups = len(numerics.group_slices(width, split))
    scale = torch.rand(groups, generator=generator) * 10.0 ** draw(st.integers(-3, 3)) + 1e-4
    zero = torch.randint(-300, 300, (groups,), generator=generator, dtype=torch.int32)
    x = torch.randn(draw(st.integers(1, 5)), width, generator=generator) * scale.max() * 2**bits
    return x, scale, zero, split, bits


@given(inputs())
def test_quantizing_a_dequantized_input_gives_the_same_integers(case):
    x, scale, zero, split, bits = case
    q = numerics.quantize_input(x, scale, zero, split, bits)
    x_hat = numerics.dequantize_input(q, scale, zero, split)
    assert q.dtype == torch.int8
    assert torch.equal(numerics.quantize_input(x_hat, scale, zero, split, bits), q)


@given(inputs())
def test_inside_the_range_the_error_is_half_a_scale_and_outside_the_input_is_clipped(case):
    x, scale, zero, split, bits = case
    low, high = numerics.integer_range(bits)
    x_hat = numerics.dequantize_input(numerics.quantize_input(x, scale, zero, split, bits), scale, zero, split)
    for g, part in enumerate(numerics.group_slices(x.shape[1], split)):
        least, most = (low - zero[g]) * scale[g], (high - zero[g]) * scale[g]
        error = (x_hat[:, part] - x[:, part].clamp(least, most)).abs()
        assert bool((error <= scale[g] * 0.5001 + 1e-6 * x.abs().max()).all())
        assert bool((x_hat[:, part] >= least).all() and (x_hat[:, part] <= most).all())


@given(inputs())
def test_quantization_is_monotone(case):
    x, scale, zero, split, bits = case
    q = numerics.quantize_input(x.sort(0).values, scale, zero, split, bits)
    assert bool((q.to(torch.int16).diff(dim=0) >= 0).all())


@given(seed=SEEDS, bits=st.sampled_from([4, 8]), width=st.integers(1, 70), outputs=st.integers(1, 9))
def test_weight_quantization_is_idempotent_and_bounded(seed, bits, width, outputs):
    generator = torch.Generator().manual_seed(seed)
    split = int(torch.randint(1, width + 1, (1,), generator=generator))
    weight = torch.randn(outputs, width, generator=generator)
    groups = numerics.group_slices(width, split)
    high = numerics.integer_range(bits)[1]
    scale = torch.stack([weight[:, part].abs().amax(1).clamp_min(1e-6) / high for part in groups])
    q = numerics.quantize_weight(weight, scale, split, bits)
    w_hat = numerics.dequantize_weight(q, scale, split)
    assert torch.equal(numerics.quantize_weight(w_hat, scale, split, bits), q)
    for g, part in enumerate(groups):
        assert bool(((w_hat - weight)[:, part].abs() <= scale[g][:, None] * 0.5001).all())


@given(seed=SEEDS, outputs=st.integers(0, 7), blocks=st.integers(1, 4))
def test_int4_packing_round_trips(seed, outputs, blocks):
    q = torch.randint(-8, 8, (outputs, 32 * blocks), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    packed = numerics.pack_int4(q)
    assert packed.dtype == torch.uint8 and packed.shape == (outputs, 16 * blocks)
    assert torch.equal(numerics.unpack_int4(packed), q)


def test_int4_packing_has_the_documented_bytes():
    q = torch.zeros(1, 32, dtype=torch.int8)
    q[0, 0], q[0, 16], q[0, 5], q[0, 21] = -8, 7, -1, 1
    packed = numerics.pack_int4(q)
    assert packed[0, 0] == 0x78 and packed[0, 5] == 0x1F and int(packed.sum()) == 0x78 + 0x1F


@pytest.mark.parametrize("shape", [(2, 31), (2, 33), (32,), (1, 2, 32)])
def test_int4_packing_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="K a multiple of 32"):
        numerics.pack_int4(torch.zeros(shape, dtype=torch.int8))


@pytest.mark.parametrize("value", [-9, 8, 127])
def test_int4_packing_refuses_values_that_do_not_fit(value):
    with pytest.raises(ValueError, match=rf"values in -8..7, got .*{value}"):
        numerics.pack_int4(torch.full((1, 32), value, dtype=torch.int8))


@given(inputs(), st.booleans(), SEEDS)
def test_the_integer_path_with_folded_zero_points_equals_the_float_path(case, with_bias, seed):
    x, scale, zero, split, bits = case
    generator = torch.Generator().manual_seed(seed)
    outputs, width = 5, x.shape[1]
    q_w = torch.randint(-128, 128, (outputs, width), dtype=torch.int8, generator=generator)
    w_scale = torch.rand(len(scale), outputs, generator=generator) + 0.1
    bias = torch.randn(outputs, generator=generator) if with_bias else None
    q_x = numerics.quantize_input(x, scale, zero, split, bits)
    offset = numerics.fold_offset(bias, q_w, w_scale, scale, zero, split)
    got = numerics.dual_scale_matmul(q_x, q_w, w_scale, scale, offset, split).double()
    x_hat = numerics.dequantize_input(q_x, scale, zero, split).double()
    w_hat = numerics.dequantize_weight(q_w, w_scale, split).double()
    want = x_hat @ w_hat.T + (0 if bias is None else bias.double())
    size = x_hat.abs().amax().clamp_min(float(scale.max()) * 300) * w_hat.abs().amax() * width
    assert float((got - want).abs().max()) <= 1e-5 * float(size) + 1e-5


def test_rounding_is_half_to_even():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]])
    q = numerics.quantize_input(x, torch.ones(1), torch.zeros(1, dtype=torch.int32), 5, 8)
    assert q.tolist() == [[0, 2, 2, 0, -2]]


def test_infinities_saturate():
    x = torch.tensor([[torch.inf, -torch.inf]])
    q = numerics.quantize_input(x, torch.ones(1), torch.tensor([3], dtype=torch.int32), 2, 6)
    assert q.tolist() == [[31, -32]]


@given(low=st.floats(-1e6, 1e6, width=32), span=st.floats(0, 1e6, width=32), bits=BITS)
def test_an_affine_range_covers_its_ends_and_keeps_the_zero_point_small(low, span, bits):
    high = low + span
    scale, zero = affine(low, high, bits)
    least, most = numerics.integer_range(bits)
    assert scale > 0 and abs(zero) < 2**21
    if span >= 1e-8:
        slack = 0.51 * scale
        assert (least - zero) * scale <= low + slack and (most - zero) * scale >= high - slack


def test_a_range_of_zeros_has_scale_one():
    assert affine(0.0, 0.0, 8) == (1.0, 0)


@pytest.mark.parametrize("bits", [1, 9, 0, -4])
def test_bit_widths_outside_2_to_8_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits = {bits}: expected 2..8"):
        numerics.integer_range(bits)


@pytest.mark.parametrize("split", [0, 65, -1])
def test_a_split_outside_the_width_is_refused(split):
    with pytest.raises(ValueError, match=f"split = {split}: expected 1..64"):
        numerics.group_slices(64, split)


@st.composite
def rows_of_any_size(draw):
    """(x [M, K], split, bits): rows of very different magnitude, the first one zero."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    count, width = draw(st.integers(2, 5)), draw(st.integers(1, 70))
    x = torch.randn(count, width, generator=generator) * 10.0 ** torch.randint(-20, 20, (count, 1), generator=generator)
    x[0] = 0
    return x, draw(st.integers(1, width)), draw(BITS)


@given(rows_of_any_size())
def test_the_largest_magnitude_of_a_token_and_group_gets_the_largest_integer(case):
    x, split, bits = case
    q, scale = numerics.quantize_per_token(x, split, bits)
    high = numerics.integer_range(bits)[1]
    assert q.dtype == torch.int8 and scale.dtype == torch.float32
    for g, part in enumerate(numerics.group_slices(x.shape[1], split)):
        assert q[1:, part].abs().amax(1).tolist() == [high] * (len(x) - 1)
        error = (q[:, part].double() * scale[:, g, None].double() - x[:, part].double()).abs()
        assert bool((error <= scale[:, g, None].double() * (0.5 + 2**-16 * high)).all())


@given(rows_of_any_size())
def test_a_zero_row_has_scale_one_and_zero_integers(case):
    x, split, bits = case
    q, scale = numerics.quantize_per_token(x, split, bits)
    assert not q[0].any() and scale[0].unique().tolist() == [1.0]


@given(rows_of_any_size(), st.integers(-10, 10))
def test_a_token_times_a_power_of_two_keeps_its_integers(case, exponent):
    x, split, bits = case
    q, scale = numerics.quantize_per_token(x, split, bits)
    other, other_scale = numerics.quantize_per_token(x * 2.0**exponent, split, bits)
    assert torch.equal(other, q) and torch.equal(other_scale[1:], scale[1:] * 2.0**exponent)


@given(rows_of_any_size())
def test_the_per_token_product_is_that_of_the_dequantized_operands(case):
    x, split, bits = case
    x = x / x.abs().amax(1, keepdim=True).clamp_min(1e-30)
    q, scale = numerics.quantize_per_token(x, split, bits)
    weight_scale = torch.rand(scale.shape[1], 3) + 0.1
    q_w = torch.randint(-128, 128, (3, x.shape[1]), dtype=torch.int8)
    got = numerics.per_token_matmul(q, scale, q_w, weight_scale, torch.ones(3), split)
    want = numerics.dequantize_per_token(q, scale, split) @ numerics.dequantize_weight(q_w, weight_scale, split).T + 1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-2)


@st.composite
def rows_to_one_side(draw):
    """(x [M, K], split, bits): rows of any magnitude around any center; the first is zero, the second positive."""
    x, split, bits = draw(rows_of_any_size())
    x = x + draw(st.integers(-4, 4)) * x.abs().amax(1, keepdim=True)
    x[1] = x[1].abs()
    return x, split, bits


@given(rows_to_one_side())
def test_a_token_with_a_zero_point_is_rounded_to_half_a_step(case):
    x, split, bits = case
    q, scale = numerics.quantize_per_token(x, split, bits, asymmetric=True)
    low, high = numerics.integer_range(bits)
    groups = numerics.group_slices(x.shape[1], split)
    assert scale.shape == (len(x), 2 * len(groups)) and scale.dtype == torch.float32 and q.dtype == torch.int8
    for g, part in enumerate(groups):
        step, zero = (scale[:, i, None].double() for i in (g, len(groups) + g))
        least, top = (
            f(x[:, part].double(), 1).clamp(**end) for f, end in ((torch.amin, {"max": 0}), (torch.amax, {"min": 0}))
        )
        assert torch.equal(zero, zero.round()) and bool(((zero >= low) & (zero <= high)).all())
        spans = top > least
        torch.testing.assert_close(step[spans, 0] * (high - low), (top - least)[spans], rtol=1e-6, atol=0)
        # The zero point is rounded too, so that a value at an end may be clipped by half a step more.
        error = ((q[:, part].double() - zero) * step - x[:, part].double()).abs()
        assert bool((error <= step * (1 + 2**-14)).all())
        inside = (q[:, part] > low) & (q[:, part] < high)
        assert bool((error <= step * (0.5 + 2**-14))[inside].all())


@given(rows_to_one_side())
def test_zero_is_exact_and_zero_rows_have_scale_one(case):
    x, split, bits = case
    x[2:, 0] = 0
    q, scale = numerics.quantize_per_token(x, split, bits, asymmetric=True)
    back = numerics.dequantize_per_token(q, scale, split)
    assert not back[0].any() and not back[2:, 0].any()
    groups = len(numerics.group_slices(x.shape[1], split))
    assert not q[0].any() and scale[0].tolist() == [1.0] * groups + [0.0] * groups


@given(rows_to_one_side())
def test_a_zero_point_halves_the_steps_of_positive_rows(case):
    x, split, bits = case
    x[1] += 1e-20
    symmetric, asymmetric = (numerics.quantize_per_token(x, split, bits, kind)[1] for kind in (False, True))
    groups = symmetric.shape[1]
    low, high = numerics.integer_range(bits)
    torch.testing.assert_close(asymmetric[1, :groups] * (high - low), symmetric[1] * high, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_a_zero_point_that_is_not_finite_has_the_scale_nan(bad):
    x = torch.arange(-12.0, 24).reshape(4, 9)
    x[2, 7] = bad
    q, scale = numerics.quantize_per_token(x, 6, 8, asymmetric=True)
    assert scale.isnan().nonzero().tolist() == [[2, 1]]
    assert not q[2, 6:].any() and scale[2, 3] == 0 and bool(q[2, :6].any())
    y = numerics.per_token_matmul(q, scale, torch.ones(1, 9, dtype=torch.int8), torch.ones(2, 1), torch.zeros(1), 6)
    assert y.isnan().flatten().tolist() == [False, False, True, False]


def test_a_range_beyond_float32_has_a_finite_scale():
    x = torch.tensor([[3e38, -3e38, 1.5e38]])
    q, scale = numerics.quantize_per_token(x, 3, 8, asymmetric=True)
    torch.testing.assert_close(numerics.dequantize_per_token(q, scale, 3), x, rtol=0.02, atol=0)


@given(rows_to_one_side())
def test_the_product_with_zero_points_is_that_of_int64(case):
    x, split, bits = case
    q, scale = numerics.quantize_per_token(x, split, bits, asymmetric=True)
    groups = numerics.group_slices(x.shape[1], split)
    scale[:, : len(groups)] = 1
    q_w = torch.randint(-128, 128, (3, x.shape[1]), dtype=torch.int8)
    got = numerics.per_token_matmul(q, scale, q_w, torch.ones(len(groups), 3), torch.zeros(3), split)
    want = sum(
        (q[:, p].long() - scale[:, len(groups) + g, None].long()) @ q_w[:, p].long().T for g, p in enumerate(groups)
    )
    assert bool((want.abs() < 2**24).all()) and torch.equal(got.long(), want)


@given(rows_to_one_side())
def test_the_product_with_zero_points_is_that_of_the_dequantized_operands(case):
    x, split, bits = case
    x = x / x.abs().amax(1, keepdim=True).clamp_min(1e-30)
    q, scale = numerics.quantize_per_token(x, split, bits, asymmetric=True)
    weight_scale = torch.rand(scale.shape[1] // 2, 3) + 0.1
    q_w = torch.randint(-128, 128, (3, x.shape[1]), dtype=torch.int8)
    got = numerics.per_token_matmul(q, scale, q_w, weight_scale, torch.ones(3), split)
    inputs = numerics.dequantize_per_token(q, scale, split).double()
    want = inputs @ numerics.dequantize_weight(q_w, weight_scale, split).double().T + 1
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("signal", "noise", "want"),
    [
        (100.0, 1.0, 20.0),
        (1.0, 0.0, math.inf),
        (0.0, 1.0, -math.inf),
        (1.0, math.inf, -math.inf),
        (1e-200, 1e200, -math.inf),
        (math.inf, math.inf, math.nan),
        (1.0, math.nan, math.nan),
    ],
)
def test_decibels_of_what_overflowed_are_a_number_too(signal, noise, want):
    assert numerics.decibels(signal, noise) == pytest.approx(want, nan_ok=True)
