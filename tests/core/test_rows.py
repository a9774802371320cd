"""Sums over all rows: exact moments whatever the blocks, weighed as the sample is, merged, reordered and scaled."""

import pytest
import torch

from fxq.core.rows import LEAST_GRADIENT, WIDE, RowSums, Weighting


def empty(shape, dtype):
    return torch.full(shape, 7.0, dtype=dtype)  # whoever allocates does not clear


def rows(count, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) * 3 + torch.arange(width) * 100


def gradients(count, seed=1):
    found = torch.rand(count, generator=torch.Generator().manual_seed(seed)).double()
    found[::3] = 0
    return found


def sums(*parts, with_gradients=True, width=6):
    found = RowSums(width, with_gradients, empty)
    for x, g in parts:
        found.add(x, g if with_gradients else None)
    return found


def weighed(x, weights):
    weights = weights / weights.sum()
    mean = weights @ x.double()
    centred = x.double() - mean
    return mean, centred.T @ (centred * weights[:, None]), float(weights.square().sum())


def test_rows_that_weigh_the_same():
    x, g = rows(9000), gradients(9000)
    found = sums((x[:5000], g[:5000]), (x[5000:], g[5000:])).moments(False)
    mean, covariance, concentration = weighed(x, torch.ones(9000, dtype=torch.float64))
    assert torch.allclose(found.mean, mean, rtol=1e-12)
    assert torch.allclose(found.covariance, covariance, rtol=1e-6)
    assert found.concentration == pytest.approx(concentration)
    assert torch.equal(sums((x, None), with_gradients=False).moments(True).mean, sums((x, g)).moments(False).mean)


def test_rows_that_weigh_their_gradients():
    x, g = rows(500), gradients(500)
    found = sums((x, g)).moments(True)
    mean, covariance, concentration = weighed(x, g / g.mean() + LEAST_GRADIENT)
    assert torch.allclose(found.mean, mean, rtol=1e-12)
    assert torch.allclose(found.covariance, covariance, rtol=1e-6)
    assert found.concentration == pytest.approx(concentration)


def test_gradients_of_zero_weigh_all_alike():
    x, none = rows(50), torch.zeros(50, dtype=torch.float64)
    assert torch.equal(sums((x, none)).moments(True).covariance, sums((x, none)).moments(False).covariance)


def test_sums_of_others_are_added():
    x, g = rows(300), gradients(300)
    first, second = sums((x[:100], g[:100])), sums((x[100:], g[100:]))
    first.merge(second.state())
    whole = sums((x, g)).moments(True)
    assert torch.allclose(first.moments(True).covariance, whole.covariance, rtol=1e-9)
    assert first.count == 300 and first.moments(True).concentration == pytest.approx(whole.concentration)


def test_channels_in_another_order_and_scaled():
    x, g = rows(200), gradients(200)
    order, factors = torch.tensor([5, 0, 3, 1, 2, 4]), torch.linspace(0.5, 2, 6)
    want = sums(((x * factors)[:, order], g)).moments(True)
    found = sums((x, g)).moments(True).of_channels(order, factors)
    assert torch.allclose(found.mean, want.mean) and torch.allclose(found.covariance, want.covariance, atol=1e-2)
    assert torch.equal(sums((x, g)).moments(True).of_channels(order, None).mean, sums((x, g)).moments(True).mean[order])


def test_wide_inputs_take_half_the_memory():
    assert RowSums(WIDE, False, empty).squares.dtype == torch.float64
    wide = RowSums(WIDE + 1, False, empty)
    assert wide.squares.dtype == torch.float32 and wide.squares.shape == (1, WIDE + 1, WIDE + 1)


def test_half_precision_rows():
    x = rows(64).bfloat16()
    assert torch.allclose(sums((x, None), with_gradients=False).moments(False).mean, x.double().mean(0), rtol=1e-12)


def test_weights_of_chunks_have_a_mean_of_one():
    alpha = torch.tensor([1.0, 2.0, 5.0])
    assert Weighting.SENSITIVITY.of_chunks(alpha, 3).mean() == pytest.approx(1)
    assert torch.equal(Weighting.REVERSED.of_chunks(alpha, 3), Weighting.SENSITIVITY.of_chunks(alpha.flip(0), 3))
    assert torch.equal(Weighting.GRADIENT.of_chunks(None, 3), torch.ones(3))
