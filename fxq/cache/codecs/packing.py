"""Codes of a few bits in bytes: along channels in equal fields, or as bit planes over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

PACKED_BITS = (1, 2, 4, 8)
"""Widths of which a whole number fits a byte."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n] below ``2**bits`` as uint8 [..., ceil(n * bits / 8)]; the first code lies in the lowest bits.

    Raises:
        ValueError: when ``bits`` is not 1, 2, 4 or 8.
    """
    _check(bits)
    each = 8 // bits
    codes = codes.to(torch.uint8)
    if missing := -codes.shape[-1] % each:
        codes = torch.nn.functional.pad(codes, (0, missing))
    fields = codes.unflatten(-1, (-1, each))
    packed = fields[..., 0].clone()
    for i in range(1, each):
        packed |= fields[..., i] << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`pack`: uint8 [..., count]."""
    _check(bits)
    each = 8 // bits
    parts = [(packed >> (bits * i)) & (2**bits - 1) for i in range(each)]
    return torch.stack(parts, dim=-1).flatten(-2)[..., :count]


def packed_size(count: int, bits: int) -> int:
    """Bytes of ``count`` codes."""
    return -(-count * bits // 8)


def _check(bits: int) -> None:
    if bits not in PACKED_BITS:
        raise ValueError(f"bits = {bits}: expected one of {', '.join(map(str, PACKED_BITS))}")
