"""How far quantized numbers are from the float weight that they were made of: what tells another model's weight."""

from __future__ import annotations

from torch import Tensor

from fxq.kernels import float8
from fxq.numerics import group_slices, integer_range

MOST_DEVIATION = 1.0
"""Steps: rounding to nearest deviates by .29 on average, other methods by less than 1; more is another weight."""


def deviation_in_steps(
    weight: Tensor, codes: Tensor, weight_scale: Tensor, split: int, bits: int, multiplier: Tensor | None = None
) -> float:
    """Root-mean-square distance of a float weight from its numbers, in steps; clipped ones do not count.

    A step of float8 is the distance to the next number, which grows with it.

    Args:
        weight: float [N, K], channels in ``[normal | outlier]`` order.
        codes: int8 [N, K], unpacked, or float8_e4m3fn.
        weight_scale: float32 [G, N].
        split: normal channels.
        bits: of the integers.
        multiplier: [N, K], steps of the grid that codes stand for; None: 1.
    """
    is_float8, total, count = codes.dtype == float8.E4M3, 0.0, 0
    low, high = (-float8.LARGEST - 1, float8.LARGEST) if is_float8 else integer_range(bits)
    for g, part in enumerate(group_slices(codes.shape[1], split)):
        values, wanted = codes[:, part].float(), weight[:, part].float() / weight_scale[g][:, None]
        if multiplier is not None:
            values, wanted = values / multiplier[:, part], wanted / multiplier[:, part]
        inside = (values > low + 1) & (values < high)
        steps = wanted - values
        steps = (steps / float8.spacing(codes[:, part]) if is_float8 else steps)[inside]
        total, count = total + float(steps.square().sum()), count + steps.numel()
    return (total / max(count, 1)) ** 0.5
