"""Rows of calibration: what they weigh, and sums over all of them, however many there are."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable

import torch
from torch import Tensor

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]

LEAST_GRADIENT = 0.02
"""Of the mean squared gradient, added to that of every row: none counts for nothing."""

WIDE = 4096
"""Most channels whose products are summed in float64; others take half the memory."""

_ROWS = 4096  # multiplied at a time


class Weighting(enum.StrEnum):
    """Loss weight of a calibration row, by its chunk unless said.

    ``SENSITIVITY`` measures it by forked rollouts, ``UNIFORM`` is 1, ``EXPONENTIAL`` is 2^-i, ``REVERSED`` is the
    measured one backwards, and ``SINGLE_SCALE_ONLY`` is the measured one in single-scale layers and 1 elsewhere (the
    released code of arXiv 2605.21072). ``GRADIENT`` weighs rows, not chunks: by the squared gradient of the model's
    output (:mod:`fxq.calibration.observers`).
    """

    SENSITIVITY = "sensitivity"
    UNIFORM = "uniform"
    EXPONENTIAL = "exponential"
    REVERSED = "reversed"
    SINGLE_SCALE_ONLY = "single_scale_only"
    GRADIENT = "gradient"

    @property
    def needs_sensitivity(self) -> bool:
        """Whether the weights follow from measured sensitivities."""
        return self not in (Weighting.UNIFORM, Weighting.EXPONENTIAL, Weighting.GRADIENT)

    def of_chunks(self, alpha: Tensor | None, chunks: int) -> Tensor:
        """Loss weight of each chunk, float32 [chunks] with mean 1.

        Args:
            alpha: measured sensitivities, float [chunks]; read where they are needed.
            chunks: number of chunks.

        Raises:
            ValueError: when sensitivities are needed and not given.
        """
        if self in (Weighting.UNIFORM, Weighting.GRADIENT):
            raw = torch.ones(chunks, dtype=torch.float32, device="cpu")
        elif self is Weighting.EXPONENTIAL:
            raw = 0.5 ** torch.arange(chunks, dtype=torch.float32)
        else:
            if alpha is None:
                raise ValueError(f"weighting {self.value!r} needs measured sensitivities")
            raw = alpha.flip(0) if self is Weighting.REVERSED else alpha
        return (raw / raw.mean()).float()

    def in_layer(self, weights: Tensor, outliers: int) -> Tensor:
        """The weights of chunks, float32 [chunks], in a layer with a number of outlier channels."""
        return torch.ones_like(weights) if self is Weighting.SINGLE_SCALE_ONLY and outliers else weights


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of the rows of a layer's inputs, weights adding up to 1.

    ``mean`` float64 [K], ``covariance`` float64 or, of wide inputs, float32 [K, K]; ``concentration`` is the sum of
    squared weights, one over the number of rows that they amount to (Kish).
    """

    mean: Tensor
    covariance: Tensor
    concentration: float

    def of_channels(self, order: Tensor, factors: Tensor | None) -> Moments:
        """The moments of ``factors`` [K] times the inputs, with channels in ``order`` int64 [K]."""
        mean, covariance = self.mean[order], self.covariance[order][:, order]
        if factors is not None:
            own = factors.double()[order]
            mean = mean * own
            covariance = covariance.mul_(own.to(covariance.dtype)).mul_(own.to(covariance.dtype)[:, None])
        return Moments(mean, covariance, self.concentration)

    def to(self, device: torch.device) -> Moments:
        """The same on a device."""
        return Moments(self.mean.to(device), self.covariance.to(device), self.concentration)


class RowSums:
    """Sums of x and x x^T, all rows alike, and with ``gradients`` once more with the squared gradient of each row.

    They are on the device of the rows; 16 K^2 bytes with gradients, half of that without, and half again of inputs of
    more than :data:`WIDE` channels.
    """

    def __init__(self, width: int, gradients: bool, allocate: Allocate) -> None:
        self.dtype = torch.float64 if width <= WIDE else torch.float32
        self.count = 0
        self.gradient, self.gradient_square = 0.0, 0.0
        kinds = 1 + gradients
        self.sums = allocate((kinds, width), torch.float64).zero_()
        self.squares = allocate((kinds, width, width), self.dtype).zero_()

    def add(self, rows: Tensor, gradients: Tensor | None = None) -> None:
        """Add the rows [R, K] of a call, with their squared gradients [R]."""
        self.count += len(rows)
        for part in rows.split(_ROWS):
            self._add(0, part.to(self.dtype))
        if gradients is None:
            return
        self.gradient += float(gradients.double().sum())
        self.gradient_square += float(gradients.double().square().sum())
        index = (gradients > 0).nonzero().flatten()
        for some in index.split(_ROWS):
            root = gradients[some].double().sqrt()
            x = rows[some.to(rows.device)].to(self.dtype)
            self._add(1, x * root.to(x.device, x.dtype)[:, None], root)

    def _add(self, kind: int, x: Tensor, root: Tensor | None = None) -> None:
        self.squares[kind].addmm_(x.T, x)
        self.sums[kind] += x.double().sum(0) if root is None else root.to(x.device) @ x.double()

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add the sums of other rows of the same layer."""
        count, gradient, square = state["totals"].tolist()
        self.count += int(count)
        self.gradient, self.gradient_square = self.gradient + gradient, self.gradient_square + square
        self.sums += state["sums"].to(self.sums.device)
        self.squares += state["squares"].to(self.squares.device)

    def state(self) -> dict[str, Tensor]:
        """What :meth:`merge` needs of it, on the CPU."""
        totals = torch.tensor([self.count, self.gradient, self.gradient_square], dtype=torch.float64, device="cpu")
        return {"totals": totals, "sums": self.sums.cpu(), "squares": self.squares.cpu()}

    def moments(self, gradients: bool) -> Moments:
        """Mean and covariance, rows weighed by their squared gradients, see :data:`LEAST_GRADIENT`, or all alike."""
        mean_gradient = self.gradient / self.count
        if not gradients or not mean_gradient > 0:
            return self._moments((1.0,), self.count, 1 / self.count)
        mass = self.count * (1 + LEAST_GRADIENT)
        squares = self.gradient_square / mean_gradient**2
        squares += self.count * LEAST_GRADIENT * (2 + LEAST_GRADIENT)
        return self._moments((LEAST_GRADIENT, 1 / mean_gradient), mass, squares / mass**2)

    def _moments(self, factors: tuple[float, ...], mass: float, concentration: float) -> Moments:
        mean = self.sums[0] * (factors[0] / mass)
        covariance = self.squares[0] * (factors[0] / mass)
        for kind, factor in enumerate(factors[1:], 1):
            mean.add_(self.sums[kind], alpha=factor / mass)
            covariance.add_(self.squares[kind], alpha=factor / mass)
        covariance.addr_(mean.to(self.dtype), mean.to(self.dtype), alpha=-1)
        return Moments(mean, covariance, concentration)
