"""Scales of least squared error for float8 e4m3 (:mod:`fxq.kernels.float8`).

A float format rounds relative to each value: by how much the scale is off changes little, but for values that it clips
and for the least ones, which have a fixed step. Between two powers of two the values fall on other steps, so scales up
to twice the least one that clips nothing are tried beside those that clip.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxq.kernels import float8
from fxq.passes.methods.clipping import SAMPLE_LIMIT, clips, representative
from fxq.passes.methods.units import TINY, unit

_SEARCH_LIMIT = 1 << 21  # weights searched at a time
_WIDER = (1.0, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875)  # times the least scale that clips nothing of the inputs


def float_scale(top: float) -> float:
    """The least scale under which magnitudes up to ``top`` are not clipped; 1 for zeros."""
    return max(top / float8.LARGEST, TINY) if top > 0 else 1.0


def search_float_weight(weight: Tensor, percentiles: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Per-output-channel scale of least squared error, whatever the unit; 1 for channels of zeros.

    Args:
        weight: float32 [N, K].
        percentiles: of ``|w|`` per channel that are tried as clipping points.
        ratios: fractions of the channel's absolute maximum that are tried as clipping points, and twice as much.

    Returns:
        float32 [N].
    """
    step = max(1, _SEARCH_LIMIT // weight.shape[1])
    return torch.cat([_search_rows(rows, percentiles, ratios) for rows in weight.split(step)])


def _search_rows(weight: Tensor, percentiles: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """:func:`search_float_weight` of a weight whose temporaries fit into memory."""
    size = unit(torch.maximum(weight.amax(1), -weight.amin(1)))
    weight = weight / size[:, None]
    magnitude = weight.abs()
    top = magnitude.amax(1)
    ordered = magnitude.sort(1).values
    clipped = [ordered[:, round(p * (weight.shape[1] - 1))] for p in percentiles]
    clipped += [top * r for ratio in ratios for r in dict.fromkeys((ratio, 2 * ratio))]
    best_scale = top / float8.LARGEST
    best_error = torch.full_like(top, torch.inf)
    for clip in clipped:
        scale = torch.where(clip > 0, clip / float8.LARGEST, best_scale).clamp(min=TINY)
        found = float8.round_to(weight / scale[:, None]).float()
        error = found.mul_(scale[:, None]).sub_(weight).square_().sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return torch.where(top > 0, (best_scale * size).clamp(min=TINY), 1.0)


def search_float_input(
    values: Tensor,
    percentiles: Sequence[float],
    weights: Tensor | None = None,
    extremes: tuple[float, float] | None = None,
    seed: int = 0,
) -> float:
    """Scale of least squared error over clipping percentiles of both tails, and over wider scales that clip nothing.

    Args:
        values: float32 sample of one group's activations [..., K].
        percentiles: fractions in 0.5..1, 1 meaning no clipping.
        weights: float [R], the number of calibration rows that each row stands for; None: all the same.
        extremes: exact minimum and maximum of the calibration data; None: those of the sample.
        seed: of the choice of channels.
    """
    rows = values.reshape(-1, values.shape[-1])
    low, high = extremes or (float(rows.min()), float(rows.max()))
    size = float(unit(torch.tensor(max(-low, high), dtype=torch.float32, device="cpu")))
    whole = rows.numel() <= SAMPLE_LIMIT
    flat, counts = representative(rows / size if whole else rows, weights, seed)
    flat = flat if whole else flat / size
    tried = [max(-least, most) for least, most in clips(flat, counts, percentiles, (low / size, high / size))]
    if 1.0 in percentiles:
        tried += [max(-low, high) / size * wider for wider in _WIDER]
    best, found = torch.inf, float_scale(max(-low, high) / size)
    for top in tried:
        scale = float_scale(top)
        error = float8.round_to(flat / scale).float().mul_(scale).sub_(flat).square_()
        total = float(error.mean() if counts is None else torch.dot(error, counts))
        if total < best:
            best, found = total, scale
    return max(found * size, TINY)
