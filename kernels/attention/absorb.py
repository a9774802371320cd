"""What attention to a part of the tokens lacks, added back: a linear map of each video's own attention results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxq.kernels.arguments import AbsorbMap
from fxq.kernels.op import declare
from fxq.kernels.quantize.op import FLOATS


def _supports(a: AbsorbMap) -> str:
    x, found = a
    if x.ndim != 3 or x.dtype not in FLOATS:
        return f"x is {x.dtype} {tuple(x.shape)}: expected float32, bfloat16 or float16 [B, S, groups * width]"
    shape = tuple(found.shape)
    if found.dtype != torch.float32 or len(shape) != 4 or shape[0] != x.shape[0] or shape[2] != shape[3]:
        return f"map is {found.dtype} {shape}: expected float32 [{x.shape[0]}, groups, width, width]"
    if shape[1] * shape[2] != x.shape[2]:
        return f"map is {shape}: {shape[1]} groups of {shape[2]} channels are not the {x.shape[2]} of x"
    return ""


def _fake(a: AbsorbMap) -> Tensor:
    return a.x.new_empty(a.x.shape)


def _samples() -> Sequence[AbsorbMap]:
    random = torch.Generator().manual_seed(7)
    cases: list[AbsorbMap] = []
    for shape, groups, dtype in (
        ((2, 5, 32), 1, torch.float32),
        ((2, 7, 48), 3, torch.bfloat16),
        ((1, 0, 32), 2, torch.float32),
    ):
        width = shape[2] // groups
        x = torch.randn(shape, generator=random, dtype=torch.float32).to(dtype)
        found = torch.randn(shape[0], groups, width, width, generator=random, dtype=torch.float32) / width
        cases.append(AbsorbMap(x, found))
    return cases


@declare(AbsorbMap, fake=_fake, samples=_samples, supports=_supports, max_error=2**-6)
def absorb(a: AbsorbMap) -> Tensor:
    """``x + x map``, computed in float32, each group of channels by its own map; a map of zeros gives x.

    Returns:
        [B, S, groups * width] in x's dtype, contiguous.

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    x, found = a
    rows = x.float().unflatten(2, (found.shape[1], found.shape[2])).transpose(1, 2)  # [B, groups, S, width]
    return (rows + rows @ found).transpose(1, 2).flatten(2).to(x.dtype).contiguous()
