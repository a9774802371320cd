"""How Triton kernels go over a tensor: row by row."""

from __future__ import annotations

from torch import Tensor


def flat_rows(x: Tensor) -> Tensor:
    """[rows, K] of x [..., K], contiguous along K; a copy only where the strides need one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


MAX_WIDTH = 16384
"""Widest row: its float32 values are 64 KiB of shared memory."""


def warps_of(block: int) -> int:
    """Warps that hold a row of so many channels, 16 per thread."""
    return min(16, max(1, block // 512))
