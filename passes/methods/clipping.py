"""The ranges that a search for scales tries, and the values that stand for all of a layer's inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxq.passes.methods import amounts, row_energies

SAMPLE_LIMIT = 1 << 20
"""Activations searched, about."""

_MOST_BETWEEN = 4  # ranges tried between the widest percentile and the extremes, when these lie far outside


def representative(rows: Tensor, weights: Tensor | None, seed: int) -> tuple[Tensor, Tensor | None]:
    """Values that stand for all of the rows [R, K], flat, and how many each stands for; None: all for the same."""
    count, width = rows.shape
    if weights is not None and bool((weights == weights[:1]).all()):
        weights = None
    if rows.numel() <= SAMPLE_LIMIT:
        return rows.flatten(), None if weights is None else weights.repeat_interleave(width)
    mass = torch.ones(count, dtype=torch.float64, device=rows.device) if weights is None else weights.double()
    taken = amounts(row_energies(rows), mass, SAMPLE_LIMIT, width).ceil().clamp(max=width)
    start = torch.rand(
        count, generator=torch.Generator(device="cpu").manual_seed(seed), dtype=torch.float64, device="cpu"
    )
    sizes = taken.long()
    row = torch.repeat_interleave(sizes)
    place = torch.arange(len(row), device=rows.device) - (sizes.cumsum(0) - sizes)[row]
    channel = ((place + start.to(rows.device)[row]) * (width / taken)[row]).long().clamp_(max=width - 1)
    return rows[row, channel], (mass * (width / taken)).float()[row]


def clips(
    flat: Tensor, counts: Tensor | None, percentiles: Sequence[float], extremes: tuple[float, float]
) -> list[tuple[float, float]]:
    """The ranges to try, by percentiles of the weighted values."""
    found = []
    tails = [1 - p for p in percentiles if p < 1]
    if tails:
        found = list(zip(_tail(flat, counts, tails, False), _tail(flat, counts, tails, True), strict=True))
    if len(tails) < len(percentiles):
        widest = max((high - low for low, high in found), default=0.0)
        ratio = (extremes[1] - extremes[0]) / widest if widest > 0 else 1.0
        steps = min(_MOST_BETWEEN, max(0, math.ceil(math.log2(ratio)) - 1)) if ratio > 2 else 0
        for step in range(1, steps + 1):
            part = ratio ** -(step / (steps + 1))
            found.append((extremes[0] * part, extremes[1] * part))
        found.append(extremes)
    return found


def _tail(flat: Tensor, counts: Tensor | None, tails: Sequence[float], largest: bool) -> list[float]:
    """The values beyond which a fraction of the weighted values lies at one end."""
    total = float(len(flat) if counts is None else counts.double().sum())
    beyond = [tail * (total - total / len(flat)) for tail in tails]
    most = min(len(flat), round(max(tails) * (len(flat) - 1)) + 2)
    while True:
        found, index = flat.topk(most, largest=largest)
        each = torch.ones_like(found, dtype=torch.float64) if counts is None else counts[index].double()
        middle = each.cumsum(0) - each / 2
        if most == len(flat) or float(middle[-1]) >= max(beyond):
            break
        most = min(len(flat), 4 * most)
    wanted = torch.tensor(beyond, dtype=torch.float64, device=middle.device)
    return [float(found[i]) for i in torch.searchsorted(middle, wanted).clamp(max=most - 1).tolist()]
