"""The grid of a layer's weights: what one integer of each is worth."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fxq import numerics
from fxq.core.method import LayerProblem, Scheme
from fxq.passes.methods.units import TINY

LARGEST = 15
"""Multipliers have 4 bits; a code times one fits an int8."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Scales of each output and group of channels, and of a ``weight_group`` multipliers.

    ``scale`` float32 [G, N] for channels ``[normal | outlier]``, ``split`` of them normal; ``multiplier`` int8
    [N, K / 32], 1..15, or None: the step of a weight is its scale times the multiplier of its 32 channels (two levels
    of integers below a scale of floats, as in QServe, arXiv 2405.04532).
    """

    scale: Tensor
    split: int
    multiplier: Tensor | None = None

    def steps(self, width: int, outputs: slice = slice(None)) -> Tensor:
        """Value of one integer of each weight, float32 [N, K], of some outputs."""
        scale, slices = self.scale[:, outputs], numerics.group_slices(width, self.split)
        parts = [s[:, None].expand(-1, p.stop - p.start) for s, p in zip(scale, slices, strict=True)]
        found = torch.cat(parts, 1)
        return found if self.multiplier is None else found * expanded(self.multiplier[outputs])

    def of_channels(self, channels: Tensor) -> Tensor:
        """:meth:`steps` of some channels int64 [C], [C, N]: what is alike for all outputs lies side by side."""
        found = self.scale[(channels >= self.split).long()]
        if self.multiplier is None:
            return found
        return found * self.multiplier.T[channels // numerics.PACK_BLOCK]

    def of_outputs(self, index: Tensor) -> Grid:
        """The grid of some outputs."""
        multiplier = None if self.multiplier is None else self.multiplier[index]
        return Grid(self.scale[:, index], self.split, multiplier)

    def multiplied(self, integers: Tensor, outputs: slice = slice(None)) -> Tensor:
        """Integers [N, K] of some outputs as multiples of their scale alone."""
        return integers if self.multiplier is None else integers * expanded(self.multiplier[outputs])


def expanded(multiplier: Tensor) -> Tensor:
    """Multipliers [N, K / 32] as one for each channel, [N, K]."""
    return multiplier.repeat_interleave(numerics.PACK_BLOCK, 1)


def grouped(problem: LayerProblem, steps: Tensor) -> Grid:
    """The grid whose steps are nearest to those wanted for each 32 channels.

    The scale of an output and its channels of one kind is a fifteenth of their largest step.

    Args:
        problem: whose ``split`` is a multiple of 32.
        steps: float32 [N, K / 32]; 0 where weights are zeros.
    """
    blocks, scales, multipliers = problem.split // numerics.PACK_BLOCK, [], []
    for part in (steps[:, :blocks], steps[:, blocks:]):
        if part.shape[1]:
            top = part.amax(1)
            scale = torch.where(top > 0, (top / LARGEST).clamp(min=TINY), 1.0)
            scales.append(scale)
            multipliers.append((part / scale[:, None]).round().clamp(1, LARGEST))
    return Grid(torch.stack(scales), problem.split, torch.cat(multipliers, 1).to(torch.int8))


def multipliers(codes: Tensor) -> Tensor:
    """Multipliers int8 [N, K / 32] with which integers int8 [N, K] are codes of 4 bits: the largest that divide them.

    Where no number up to 15 leaves codes in -8..7 it is 1.
    """
    blocks = codes.reshape(len(codes), -1, numerics.PACK_BLOCK).to(torch.int16)
    found = torch.ones(blocks.shape[:2], dtype=torch.int8, device=codes.device)
    low, high = numerics.integer_range(4)
    least, most = blocks.amin(2), blocks.amax(2)
    for factor in range(2, LARGEST + 1):
        fits = (least >= low * factor) & (most <= high * factor) & ~(blocks % factor).any(2)
        found = torch.where(fits, factor, found)
    return found.to(torch.int8)


def group_steps(scheme: Scheme, codes: Tensor) -> Tensor | None:
    """Multipliers [N, K] of integers int8 [N, K] in groups; None where the scheme has none."""
    return expanded(multipliers(codes)) if scheme.weight_group else None
