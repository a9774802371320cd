"""Keys and values in integers, as the native attention in 8 bits reads them beside pieces in floats."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Coded(NamedTuple):
    """A piece of T tokens whose integers were made before; the mean of its keys is among the means of the call.

    Attributes:
        k: int8 [B, T, heads, head_dim].
        k_scale: float32 [B, T, heads].
        v: int8 [B, T, heads, head_dim].
        v_scale: float32 [B, blocks, heads, head_dim].
        skip: first tokens that are not read.
    """

    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor
    skip: int

    def rows_as_they_lie(self) -> Coded:
        """With dense rows behind the first axis, whose stride stays: the memory of a cache has room to grow."""
        k, k_scale, v, v_scale = (x if x[:1].is_contiguous() else x.contiguous() for x in self[:4])
        return Coded(k, k_scale, v, v_scale, self.skip)
