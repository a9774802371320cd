"""How far integers are from the float weight that they were made of: what tells another model's weight."""

from __future__ import annotations

from torch import Tensor

from fxq.numerics import group_slices, integer_range

MOST_DEVIATION = 1.0
"""Steps: rounding to nearest deviates by .29 on average, other methods by less than 1; more is another weight."""


def deviation_in_steps(weight: Tensor, codes: Tensor, weight_scale: Tensor, split: int, bits: int) -> float:
    """Root-mean-square distance of a float weight from integers, in steps; clipped integers do not count.

    Args:
        weight: float [N, K], channels in ``[normal | outlier]`` order.
        codes: int8 [N, K], unpacked.
        weight_scale: float32 [G, N].
        split: normal channels.
        bits: of the integers.
    """
    low, high = integer_range(bits)
    total, count = 0.0, 0
    for g, part in enumerate(group_slices(codes.shape[1], split)):
        inside = (codes[:, part] > low + 1) & (codes[:, part] < high)
        steps = (weight[:, part].float() / weight_scale[g][:, None] - codes[:, part])[inside]
        total, count = total + float(steps.square().sum()), count + steps.numel()
    return (total / max(count, 1)) ** 0.5
