"""Attention with float8 weights and values: exact where float8 is, and else as near as its three bits are."""

import pytest
import torch

from fxq.kernels import attention, attention_int8, attention_int8_fp8, float8, used
from fxq.kernels.attention.eight_bits import int8_fp8, triton_int8
from tests.kernels.attention.eight_bits.test_int8 import error, exact, normal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "lengths", "heads", "size"),
    [(1, (1,), 1, 1), (7, (3, 0, 254), 2, 66), (33, (65, 2), 2, 16), (40, (300, 77, 1), 3, 128), (5, (257,), 1, 131)],
)
def test_it_is_near_attention_in_float64(rows, lengths, heads, size, dtype):
    q = normal(2, rows, heads, size).to(dtype)
    k, v = ([normal(2, n, heads, size, seed=i + n).to(dtype) for n in lengths] for i in (1, 2))
    got = attention_int8_fp8(q, k, v)
    assert got.shape == (2, rows, heads * size) and got.dtype == dtype and got.is_contiguous()
    assert error(got, exact(q, k, v)) < 0.045


def test_values_that_float8_holds_are_exact_under_equal_weights():
    q, k = normal(1, 7, 1, 64), torch.zeros(1, 130, 1, 64)
    v = torch.full((1, 130, 1, 64), -448.0)
    v[:, 64:128], v[:, 128:] = 224.0, 2.0**-9
    want = (64 * -448.0 + 64 * 224.0 + 2 * 2.0**-9) / 130
    got = attention_int8_fp8(q, [k], [v])
    assert torch.allclose(got, torch.full_like(got, want), atol=1e-5, rtol=1e-6)


def test_weights_are_float8_relative_to_the_largest_of_64_tokens():
    """Tokens far below the largest score of all keep their three bits beside each other."""
    q = torch.full((1, 1, 1, 16), 2.0)
    k = torch.zeros(1, 128, 1, 16)
    k[:, 64:] -= 1.5 * torch.arange(1, 65).view(1, -1, 1, 1) / 64 + 2
    v = torch.zeros(1, 128, 1, 16)
    v[0, 64:, 0] = torch.eye(64)[:, :16]
    got = attention_int8_fp8(q, [k], [v])[0, 0]
    found = got / got.max()
    levels = float8.E4M3
    rounded = (found * float8.LARGEST).to(levels).float() / float8.LARGEST
    assert got.min() > 0 and torch.allclose(found, rounded, rtol=1e-3, atol=0), "all of them are levels of float8"
    assert float(got.sum()) < 1e-4, "they are far below the others"


def test_a_piece_is_quantized_by_itself_and_a_mean_of_the_keys_costs_nothing():
    q, k, v = normal(1, 9, 2, 64), normal(1, 90, 2, 64, seed=1), normal(1, 90, 2, 64, seed=2)
    plain, shift = error(attention_int8_fp8(q, [k], [v]), exact(q, [k], [v])), 30 * normal(1, 1, 2, 64, seed=3)
    pieces, values = [k[:, :30] + shift, k[:, 30:] + 1.02 * shift], list(v.split([30, 60], 1))
    assert error(attention_int8_fp8(q, pieces, values), exact(q, pieces, values)) < plain + 3e-3
    small = [values[0] * 1e-6, values[1] * 1e6]
    got, want = attention_int8_fp8(q, [k[:, :30]] * 2, [small[0], small[0]]), attention(q, [k[:, :30]], [small[0]])
    assert error(got, want.double()) < 0.05, "a scale is that of the piece"


def test_scales_of_values_have_a_least_one_and_zeros_have_one_too():
    v = torch.zeros(1, 5, 1, 3)
    v[..., 1], v[0, 2, 0, 2] = 1e-30, 896.0
    codes, scale = int8_fp8.quantized_values(v)
    assert scale.flatten().tolist() == [1.0, triton_int8.LEAST_SCALE, 2.0] and codes.dtype == float8.E4M3
    assert codes.float()[0, 0, :, 2].tolist() == [0.0, 0.0, 448.0, 0.0, 0.0] and not codes.float()[..., 0].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_key_that_is_not_finite_shows_in_every_row_and_a_value_in_its_channel(value):
    q, k, v = normal(1, 9, 2, 16), normal(1, 70, 2, 16, seed=1), normal(1, 70, 2, 16, seed=2)
    k[0, 66, 1, 3] = value
    got = attention_int8_fp8(q, [k[:, :5], k[:, 5:]], [v[:, :5], v[:, 5:]]).unflatten(2, (2, 16))
    assert got[:, :, 0].isfinite().all() and not got[:, :, 1].isfinite().any()
    k[0, 66, 1, 3], v[0, 68, 0, 5] = 0.0, value
    broken = ~attention_int8_fp8(q, [k], [v]).isfinite()
    assert broken[..., 5].all() and int(broken.sum()) == 9


def test_without_a_key_the_result_is_zero():
    q = normal(1, 3, 1, 16)
    assert torch.equal(attention_int8_fp8(q, [q[:, :0]], [q[:, :0]]), torch.zeros(1, 3, 16))
    assert attention_int8_fp8(q[:, :0], [q], [q]).shape == (1, 0, 16)


def test_scores_are_those_of_int8_and_a_cpu_runs_the_reference():
    """One-hot values of powers of two are exact in both, so only the weights' three bits differ."""
    assert used("attention_int8_fp8", "cpu") == "reference"
    q, k = normal(1, 5, 1, 64), normal(1, 40, 1, 64, seed=1)
    v = torch.eye(40, 64).reshape(1, 40, 1, 64)
    one, other = (op(q, [k], [v])[0, :, :40] for op in (attention_int8_fp8, attention_int8))
    ratio = one / other
    assert float((ratio / ratio.median(-1, keepdim=True).values - 1).abs().max()) < 2**-3
    with pytest.raises(ValueError, match=r"fxq::attention_int8_fp8: .*q is torch.float64"):
        attention_int8_fp8(q.double(), [k], [k])
