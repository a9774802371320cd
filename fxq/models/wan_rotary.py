"""The rotary embedding of Wan's keys as caches need it: to any place, and back."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fxq.models.causal_wan import apply_rope, rope_tables

BLOCK = 256
"""Tokens that a CPU rotates at a time: what comes between stays in its cache."""


@dataclasses.dataclass(frozen=True)
class WanRotary:
    """The rotary embedding of keys in a cache, for frames of ``rows`` x ``columns`` tokens."""

    head_dim: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """Tokens of a frame."""
        return self.rows * self.columns

    def __call__(self, x: Tensor, first_frame: int, inverse: bool = False) -> Tensor:
        """Rotate keys [B, T, heads, head_dim] of whole frames to their places, or back."""
        cos, sin = (table.to(x.device) for table in self.tables(x.shape[1] // self.tokens, first_frame))
        sin = -sin if inverse else sin
        if x.device.type != "cpu" or x.shape[1] <= BLOCK:
            return apply_rope(x, cos, sin)
        blocks = zip(x.split(BLOCK, 1), cos.split(BLOCK), sin.split(BLOCK), strict=True)
        return torch.cat([apply_rope(*block) for block in blocks], 1)

    def tables(self, frames: int, first_frame: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, see :func:`~fxq.models.causal_wan.rope_tables`."""
        return rope_tables(self.head_dim, frames, self.rows, self.columns, first_frame)
