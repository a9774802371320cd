"""The reference numerics of float8 e4m3: what :mod:`fxq.numerics` is for integers, and with its conventions.

``float8_e4m3fn`` has a sign, four bits of exponent and three of mantissa, no infinity and one NaN of either sign
(S.1111.111); the largest number is 448, the least normal one 2^-6 and the least 2^-9. Source: OCP 8-bit Floating Point
Specification (OFP8); arXiv 2209.05433.

* Values are symmetric: a float format gains nothing from a zero point.
* Activations with a static scale are ``e4m3(x * (1 / scale[g]))``, rounded half to even, at most 448 in magnitude.
* Or the scale is measured per token: ``scale[r, g] = max_k |x[r, k]| / 448`` over the group's channels, 1 where the row
  is zero there.
* Weights are ``e4m3(w / scale[g, n])``.
* ``y = sum_g input_scale[g] * weight_scale[g, n] * sum_k q_x q_w + offset[n]``, summed in float32; the offset is the
  bias.
* What is not finite stays visible: as NaN where the scale is static, else as a scale that is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq.numerics import group_slices

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""Largest finite float8_e4m3fn."""

LEAST_MAGNITUDE = 448 * 2.0**-126
"""A row of a group counts as zero up to it (5.3e-36): its scale would not be a normal float32."""

_NAN = 0x7F  # S.1111.111
_MANTISSA, _LEAST_EXPONENT = 3, -6


def round_to(values: Tensor) -> Tensor:
    """float8_e4m3fn of float values, any shape: half to even, at most 448 in magnitude; NaN stays NaN."""
    return values.clamp(-LARGEST, LARGEST).to(E4M3)


def has_nan(values: Tensor) -> bool:
    """Whether float8_e4m3fn values hold the bits of a NaN."""
    return bool(((values.view(torch.uint8) & _NAN) == _NAN).any())


def spacing(values: Tensor) -> Tensor:
    """Distance float32 from each float8_e4m3fn value to the next larger magnitude."""
    magnitude = values.float().abs().clamp(min=2.0**_LEAST_EXPONENT)
    exponent = torch.frexp(magnitude).exponent - 1
    return torch.ldexp(torch.ones_like(magnitude), exponent - _MANTISSA)


def quantize_input(x: Tensor, scale: Tensor, split: int) -> Tensor:
    """Quantize activations, channels already in ``[normal | outlier]`` order, with static scales.

    Args:
        x: float [..., K].
        scale: float32 [G].
        split: number of normal channels.

    Returns:
        float8_e4m3fn [..., K]; NaN where x, or the reciprocal of a scale, is not finite.
    """
    parts = []
    for g, part in enumerate(group_slices(x.shape[-1], split)):
        values, inverse = x[..., part].float(), scale[g].reciprocal()
        finite = values.isfinite() & inverse.isfinite()
        parts.append(torch.where(finite, (values * inverse).clamp(-LARGEST, LARGEST), torch.nan))
    return torch.cat(parts, dim=-1).to(E4M3)


def dequantize_input(q: Tensor, scale: Tensor, split: int) -> Tensor:
    """float32 [..., K] of float8 activations with static scales [G]."""
    parts = group_slices(q.shape[-1], split)
    return torch.cat([q[..., part].float() * scale[g] for g, part in enumerate(parts)], dim=-1)


def quantize_per_token(x: Tensor, split: int) -> tuple[Tensor, Tensor]:
    """Quantize activations, channels already in ``[normal | outlier]`` order, with a scale per token and group.

    Args:
        x: float [..., K].
        split: number of normal channels.

    Returns:
        float8_e4m3fn [..., K] and the scales float32 [..., G]. A row's group with NaN or infinity has the scale NaN and
        zeros for values.
    """
    parts, scales = [], []
    for part in group_slices(x.shape[-1], split):
        values = x[..., part].float()
        scale = token_scale(values.abs().amax(-1, keepdim=True))
        scaled = (values * scale.reciprocal()).clamp(-LARGEST, LARGEST)
        parts.append(torch.where(scale.isnan(), 0.0, scaled))
        scales.append(scale)
    return torch.cat(parts, dim=-1).to(E4M3), torch.cat(scales, dim=-1)


def token_scale(top: Tensor) -> Tensor:
    """Scale of rows whose largest magnitude is ``top``: 1 where it counts as zero, NaN where it is not finite."""
    # By a tensor: CUDA makes of a division by a number a product with its reciprocal.
    scale = torch.where(top <= LEAST_MAGNITUDE, 1.0, top / torch.full_like(top, LARGEST))
    return torch.where(top.isfinite(), scale, torch.nan)


def dequantize_per_token(q: Tensor, scale: Tensor, split: int) -> Tensor:
    """float32 [..., K] of float8 activations with ``scale`` [..., G]."""
    parts = group_slices(q.shape[-1], split)
    return torch.cat([q[..., part].float() * scale[..., g, None] for g, part in enumerate(parts)], dim=-1)


def quantize_weight(weight: Tensor, scale: Tensor, split: int) -> Tensor:
    """float8_e4m3fn [N, K] nearest to a float weight in ``[normal | outlier]`` order; ``scale`` [G, N]."""
    parts = [
        round_to(weight[:, part].float() / scale[g].unsqueeze(1))
        for g, part in enumerate(group_slices(weight.shape[1], split))
    ]
    return torch.cat(parts, dim=1)


def matmul(q_x: Tensor, input_scale: Tensor, q_w: Tensor, weight_scale: Tensor, offset: Tensor, split: int) -> Tensor:
    """``y`` float32 [..., N] of float8 activations [..., K] and weights [N, K], accumulated in float32.

    Args:
        q_x: activations.
        input_scale: float32 [G], or [..., G] of :func:`quantize_per_token`.
        q_w: weights.
        weight_scale: float32 [G, N].
        offset: float32 [N].
        split: number of normal channels.
    """
    rows = q_x.reshape(-1, q_x.shape[-1]).float()
    measured = input_scale.reshape(-1, input_scale.shape[-1]) if input_scale.ndim == q_x.ndim else None
    y = offset.expand(rows.shape[0], -1)
    with torch.autocast(q_x.device.type, enabled=False):
        for g, part in enumerate(group_slices(rows.shape[1], split)):
            product = rows[:, part] @ q_w[:, part].float().T
            if measured is None:
                y = y + product * (input_scale[g] * weight_scale[g])
            else:
                y = y + product * weight_scale[g] * measured[:, g, None]
    return y.reshape(*q_x.shape[:-1], q_w.shape[0])
