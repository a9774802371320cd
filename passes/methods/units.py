"""Powers of two that take numbers of any unit into the middle of float32, where squares neither vanish nor overflow."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 2.0**-126
"""Smallest normal float32: the least scale there is. Its reciprocal is finite."""


def unit(top: Tensor) -> Tensor:
    """A power of two close to each magnitude, float32 of the shape of ``top``; 1 for zeros.

    ``x / unit(x.abs().max())`` lies in -4..4 and is exact, and so is multiplying by the unit unless the result is
    subnormal: what is computed in between does not depend on the unit of ``x``.

    Args:
        top: finite magnitudes, any shape.
    """
    top = top.float()
    exponent = torch.where(top > 0, torch.frexp(top).exponent, 1).to(torch.int32).clamp(-125, 127)
    return ((exponent + 126) << 23).view(torch.float32)


def unit_of(x: Tensor) -> float:
    """:func:`unit` of the largest magnitude of a tensor; 1 for an empty one."""
    if not x.numel():
        return 1.0
    return float(unit(torch.maximum(x.amax(), -x.amin())))
