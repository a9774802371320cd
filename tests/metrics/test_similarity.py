import math

import numpy as np
import pytest
import torch

from fxq.metrics.similarity import ssim


def video(seed=0, shape=(2, 3, 3, 20, 17)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_identical_videos_are_alike_whatever_their_size():
    for shape in ((2, 3, 3, 20, 17), (1, 1, 1, 5, 9)):
        assert ssim(video(shape=shape), video(shape=shape)) == pytest.approx(np.ones(shape[0]), abs=1e-12)


def test_constant_frames_differ_by_luminance_alone():
    # Two constants a and b have no variance: (2ab + c1) / (a^2 + b^2 + c1) with c1 = (0.01 * 2)^2.
    a, b = 0.5, -0.25
    got = ssim(torch.full((1, 2, 1, 12, 12), a), torch.full((1, 2, 1, 12, 12), b))
    assert got[0] == pytest.approx((2 * a * b + 4e-4) / (a * a + b * b + 4e-4), abs=1e-12)


def test_one_window_is_the_formula_with_weighted_moments():
    x, y = video(1, (1, 1, 1, 11, 11)).double(), video(2, (1, 1, 1, 11, 11)).double()
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / np.outer(line, line).sum()
    a, b = x[0, 0, 0].numpy(), y[0, 0, 0].numpy()
    mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
    var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
    covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
    c1, c2 = 0.02**2, 0.06**2
    wanted = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    wanted /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    assert ssim(x, y)[0] == pytest.approx(wanted, abs=1e-12)


def test_more_noise_is_less_alike_and_values_outside_of_the_range_are_clamped():
    clean, noise = video(), torch.randn((2, 3, 3, 20, 17), generator=torch.Generator().manual_seed(3))
    less, more = ssim(clean + 0.05 * noise, clean), ssim(clean + 0.3 * noise, clean)
    assert (more < less).all() and (less < 1).all()
    assert ssim(clean * 9, clean.sign()) == pytest.approx(ssim((clean * 9).clamp(-1, 1), clean.sign()))
    assert math.isclose(ssim(clean * 4, clean * 4, -4, 4)[0], 1)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 3, 20, 17\) and \(1, 3, 3, 20, 17\)"):
        ssim(video(), video()[:1])
    with pytest.raises(ValueError, match="expected a range"):
        ssim(video(), video(), 1, 1)
