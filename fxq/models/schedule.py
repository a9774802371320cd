"""Few-step flow-matching schedule of Self-Forcing (arXiv 2506.08009): shifted sigmas, warped steps, renoise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSchedule:
    """Flow matching with ``x_t = (1 - sigma) x0 + sigma noise``.

    The training grid has ``resolution`` steps: ``u = 1 .. 1/resolution``, ``sigma = shift u / (1 + (shift - 1) u)``,
    ``timestep = 1000 sigma``. ``prediction`` says what the network returns: ``"flow"`` (noise - x0) or ``"x0"``.
    """

    shift: float = 5.0
    resolution: int = 1000
    prediction: str = "flow"

    def __post_init__(self) -> None:
        if self.prediction not in ("flow", "x0"):
            raise ValueError(f"prediction {self.prediction!r}: expected 'flow' or 'x0'")

    @property
    def sigmas(self) -> Tensor:
        """Noise levels of the grid, float32 [resolution], from 1 downwards."""
        u = torch.linspace(1.0, 0.0, self.resolution + 1, dtype=torch.float32)[:-1]
        return self.shift * u / (1 + (self.shift - 1) * u)

    @property
    def timesteps(self) -> Tensor:
        """Timesteps of the grid, float32 [resolution], from 1000 downwards."""
        return self.sigmas * 1000

    def warp(self, steps: Sequence[float]) -> tuple[float, ...]:
        """Map nominal steps (1000, 750, ...) onto the shifted grid: ``timesteps[1000 - step]``."""
        grid = torch.cat((self.timesteps, torch.zeros(1, dtype=torch.float32)))
        return tuple(float(grid[round((1000 - step) * self.resolution / 1000)]) for step in steps)

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level of the grid point nearest to each timestep of ``t``; float64, same shape."""
        grid, sigmas = self.timesteps.double().to(t.device), self.sigmas.double().to(t.device)
        return sigmas[(grid - t.double().unsqueeze(-1)).abs().argmin(-1)]

    def x0(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """Clean estimate from noisy ``x`` [B, F, C, H, W], network ``output`` and timesteps ``t`` [B, F]."""
        if self.prediction == "x0":
            return output
        sigma = self.sigma(t)[:, :, None, None, None]
        return (x.double() - sigma * output.double()).to(output.dtype)

    def renoise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noisy latents at timesteps ``t`` [B, F] from a clean estimate and fresh noise [B, F, C, H, W].

        Mixed in float32 at least, so that a bfloat16 model gets sigma unrounded; the result has the noise's dtype.
        """
        sigma = self.sigma(t)[:, :, None, None, None].float()
        return ((1 - sigma) * x0 + sigma * noise).to(noise.dtype)
