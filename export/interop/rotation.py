"""Weights rotated within groups of channels and rounded to 16 levels with a scale for every 16 of them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fxq.passes.methods.units import unit
from fxq.passes.transforms.conv_rot import regular_hadamard, rotation_size

__all__ = ["GROUP", "LEVELS", "RotatedInt4", "quantize_rotated", "rotate", "rotation_size"]

GROUP = 16
LEVELS = 16
_LARGEST = 127
_FIT_STEPS = 25
_FIT_SAMPLES = 2**18


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotatedInt4:
    """``codes`` uint8 [N, K] in 0..15 of a weight rotated in groups of ``rotation`` channels.

    A code stands for ``round(codebook[code] * group_scale) * channel_scale``; ``codebook`` float32 [16] ascending,
    ``group_scale`` float8_e4m3fn [N, K / 16], ``channel_scale`` float32 [N].
    """

    codes: Tensor
    codebook: Tensor
    group_scale: Tensor
    channel_scale: Tensor
    rotation: int

    def packed(self) -> Tensor:
        """int8 [N, K / 2]: even channels in the low nibble, odd ones in the high nibble."""
        return (self.codes[:, 0::2] | (self.codes[:, 1::2] << 4)).contiguous().view(torch.int8)

    def weight(self) -> Tensor:
        """float32 [N, K]: what is stored, rotated back."""
        levels = _grid(self.codebook, self.group_scale)
        codes = self.codes.long().unflatten(1, (-1, GROUP))
        rotated = levels.gather(2, codes).flatten(1) * self.channel_scale.unsqueeze(1)
        return rotate(rotated, self.rotation)


def rotate(weight: Tensor, size: int) -> Tensor:
    """Multiply each group of ``size`` input channels of [N, K] with the regular Hadamard matrix; its own inverse."""
    matrix = regular_hadamard(size).to(weight.device, torch.float32)
    return (weight.float().unflatten(1, (-1, size)) @ matrix).flatten(1)


def quantize_rotated(weight: Tensor, size: int) -> RotatedInt4:
    """Round a float weight [N, K] after rotating groups of ``size`` channels.

    The levels are fitted to the layer (Lloyd's algorithm), the group scales by least squares; in any unit.
    """
    rotated = rotate(weight, size)
    units = unit(rotated.abs().amax(1))
    groups = (rotated / units[:, None]).unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(dim=2, keepdim=True).clamp(min=1e-8)
    codebook = _fit(groups / scale)
    for _ in range(2):
        levels = codebook[_nearest(groups / scale, codebook)]
        scale = (groups * levels).sum(2, True) / levels.square().sum(2, True).clamp(min=1e-8)
        scale = scale.clamp(min=1e-8)
    largest = (scale * codebook.abs().max()).amax(dim=(1, 2)).clamp(min=1e-8)
    channel_scale = largest / _LARGEST
    group_scale = (scale.squeeze(2) / channel_scale.unsqueeze(1)).to(torch.float8_e4m3fn)
    levels = _grid(codebook, group_scale)
    borders = (levels[..., 1:] + levels[..., :-1]) / 2
    codes = torch.searchsorted(borders, groups / channel_scale.view(-1, 1, 1)).to(torch.uint8).flatten(1)
    return RotatedInt4(
        codes=codes, codebook=codebook, group_scale=group_scale, channel_scale=channel_scale * units, rotation=size
    )


def _grid(codebook: Tensor, group_scale: Tensor) -> Tensor:
    """The integers [N, groups, 16] that the codes of each group stand for."""
    return (codebook * group_scale.float().unsqueeze(2)).round().clamp(-_LARGEST, _LARGEST)


def _nearest(values: Tensor, codebook: Tensor) -> Tensor:
    return torch.bucketize(values, (codebook[1:] + codebook[:-1]) / 2)


def _fit(values: Tensor) -> Tensor:
    """Levels float32 [16], ascending, with the least squared distance to a sample of ``values``."""
    flat = values.flatten()
    if len(flat) > _FIT_SAMPLES:  # at random: equal distances would meet the same channels again and again
        random = torch.Generator(device="cpu").manual_seed(0)
        flat = flat[torch.randint(len(flat), (_FIT_SAMPLES,), generator=random, device="cpu").to(flat.device)]
    sample = flat.contiguous()
    codebook = torch.quantile(sample, (torch.arange(LEVELS, dtype=torch.float32, device=flat.device) + 0.5) / LEVELS)
    for _ in range(_FIT_STEPS):
        codes = _nearest(sample, codebook)
        count = torch.bincount(codes, minlength=LEVELS)
        total = torch.bincount(codes, weights=sample.double(), minlength=LEVELS)
        codebook = torch.where(count > 0, (total / count.clamp(min=1)).float(), codebook)
    return codebook.sort().values
