"""Covariances of quantized inputs over all calibration rows, from moments of the inputs as they are and a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from fxq.core.rows import Moments
from fxq.passes.methods import Units

_STRIP = 1024  # rows of a matrix of channels computed at a time
_DOUBT = 4.0  # rows a channel at which a sample's word on covariances counts for half


class SampleMoments:
    """What a sample says of inputs x beside their quantized values x', in units and from an origin each.

    Rounding hardly depends on anything but the channel's own value, so the covariance of x_i and x'_j is near
    ``b_j cov(x_i, x_j)`` with ``b_j = cov(x_j, x'_j) / var(x_j)``, exactly so for normal inputs (Bussgang), and that of
    x'_i and x'_j near ``b_i b_j cov(x_i, x_j)``. With cov(x) of all rows the sample has to tell 2 K numbers only. What
    it says beyond that, K^2 numbers, is taken for as much as its rows are worth.
    """

    def __init__(self, width: int, sums: torch.dtype, device: torch.device) -> None:
        self.square = torch.zeros(width, width, dtype=sums, device=device)  # of x
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.mixed = torch.zeros(width, dtype=torch.float64, device=device)  # diagonal of x x'
        self.weights = 0.0  # squared

    def add(self, rows: Tensor, quantized: Tensor, w: Tensor) -> None:
        """Add rows x and x' float32 [R, K] of weights [R]."""
        weighted = rows * w[:, None]
        for at in strips(len(self.square)):
            self.square[at] += weighted[:, at].T @ rows
        self.mean += weighted.sum(0)
        self.mixed += (weighted * quantized).sum(0)
        self.weights += float(w.double().square().sum())

    def complete(
        self, moments: Moments, units: Units, origin: Tensor, mean: Tensor, gram: Tensor, cross: Tensor, weight: Tensor
    ) -> Tensor:
        """Make covariances of all rows of those of the sample, in place.

        Args:
            moments: of all rows.
            units: of the sample.
            origin: float32 [K], of x.
            mean: float64 [K], of x' in the sample.
            gram: [K, K], covariance of x'.
            cross: [N, K], of the outputs and x'.
            weight: float32 [N, K].

        Returns:
            float64 [K], what the mean of all inputs is above that of the sample.
        """
        trust = 1 / (1 + _DOUBT * len(mean) * self.weights)
        covariance = self.square
        for at in strips(len(gram)):
            covariance[at] -= torch.outer(self.mean[at], self.mean).to(gram.dtype)
        own = covariance.diagonal().double()
        slope = torch.where(own > 0, (self.mixed - self.mean * mean) / own, torch.ones_like(own))
        noise = (gram.diagonal().double() - slope.square() * own).clamp_min(0)
        slope = slope.to(gram.dtype)
        for at in strips(len(gram)):
            covariance[at] = (moments.covariance[at].to(gram.dtype) / units.inputs**2 - trust * covariance[at]) * slope
        cross.mul_(trust)
        for at in strips(len(cross)):
            cross[at] += weight[at].to(cross.dtype) @ covariance
        gram.mul_(trust).add_(covariance.mul_(slope[:, None]))
        gram.diagonal().add_((1 - trust) * noise.to(gram.dtype))
        return moments.mean / units.inputs - origin.double() - self.mean


def strips(count: int) -> list[slice]:
    """Slices of some rows of a matrix each: what is computed for them takes little beside the matrix."""
    return [slice(start, min(count, start + _STRIP)) for start in range(0, count, _STRIP)]
