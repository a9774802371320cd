"""The Triton kernels of k-means: a tile of tokens against all centroids, and the mean of one cluster's tokens.

No sum depends on an order of threads: each program adds up its own in a fixed order, and nothing is atomic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq.kernels.jit import Pointer, Scalar, constexpr, jit, tl, triton

BLOCK_T, BLOCK_C, BLOCK_D = 64, 64, 32
"""Tokens, centroids and channels that a program compares at a time."""

MEAN_T, MEAN_D = 32, 64
"""Tokens and channels that a program adds up at a time."""


@jit
def nearest_kernel(
    x_ptr: Pointer,
    centroids_ptr: Pointer,
    names_ptr: Pointer,
    T: Scalar,
    C: Scalar,
    D: Scalar,
    BLOCK_T: constexpr,
    BLOCK_C: constexpr,
    BLOCK_D: constexpr,
) -> None:
    """BLOCK_T of the T tokens of a group, whose C centroids pass by in order; D channels."""
    group = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    x_rows = x_ptr + (group * T + token)[:, None] * D
    least = tl.full((BLOCK_T,), float("inf"), tl.float32)
    found = tl.zeros((BLOCK_T,), tl.int32)
    for start in range(0, C, BLOCK_C):
        name = start + tl.arange(0, BLOCK_C)
        rows = centroids_ptr + (group * C + name)[:, None] * D
        product = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        square = tl.zeros((BLOCK_C,), tl.float32)
        for first in range(0, D, BLOCK_D):
            channel = first + tl.arange(0, BLOCK_D)
            inside = (channel < D)[None, :]
            x = tl.load(x_rows + channel[None, :], mask=(token < T)[:, None] & inside, other=0.0)
            c = tl.load(rows + channel[None, :], mask=(name < C)[:, None] & inside, other=0.0)
            square += tl.sum(c * c, 1)
            product = tl.dot(x, tl.trans(c), product, input_precision="tf32x3")  # [BLOCK_T, BLOCK_C]
        distance = tl.where((name < C)[None, :], square[None, :] - 2.0 * product, float("inf"))
        close, at = tl.min(distance, 1, return_indices=True, return_indices_tie_break_left=True)
        # Less, not equal: the first of two centroids that are as near keeps the token.
        found = tl.where(close < least, start + at, found)
        least = tl.minimum(least, close)
    tl.store(names_ptr + group * T + token, found.to(tl.int64), mask=token < T)


@jit
def means_kernel(
    x_ptr: Pointer,
    order_ptr: Pointer,
    ends_ptr: Pointer,
    centroids_ptr: Pointer,
    y_ptr: Pointer,
    D: Scalar,
    BLOCK_T: constexpr,
    BLOCK_D: constexpr,
) -> None:
    """One cluster and BLOCK_D of its D channels; its tokens are the rows ``order[ends[i - 1] : ends[i]]`` of x."""
    cluster = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(ends_ptr + cluster - 1, mask=cluster > 0, other=0)
    end = tl.load(ends_ptr + cluster)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(begin, end, BLOCK_T):
        at = start + tl.arange(0, BLOCK_T)
        row = tl.load(order_ptr + at, mask=at < end, other=0)  # [BLOCK_T], the sorted tokens
        mask = (at < end)[:, None] & (channel < D)[None, :]
        sums += tl.sum(tl.load(x_ptr + row[:, None] * D + channel[None, :], mask=mask, other=0.0), 0)
    kept = tl.load(centroids_ptr + cluster * D + channel, mask=channel < D, other=0.0)
    mean = tl.where(end > begin, tl.div_rn(sums, tl.maximum(end - begin, 1).to(tl.float32)), kept)
    tl.store(y_ptr + cluster * D + channel, mean, mask=channel < D)


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """As :func:`fxq.kernels.cluster.kmeans.nearest`, on the current device."""
    groups, tokens, width = x.shape
    names = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
    if names.numel():
        nearest_kernel[(triton.cdiv(tokens, BLOCK_T), groups)](
            x.contiguous(),
            centroids.contiguous(),
            names,
            T=tokens,
            C=centroids.shape[1],
            D=width,
            BLOCK_T=BLOCK_T,
            BLOCK_C=BLOCK_C,
            BLOCK_D=BLOCK_D,
            num_warps=8,
            num_stages=2,
        )
    return names


def means(x: Tensor, order: Tensor, sizes: Tensor, centroids: Tensor) -> Tensor:
    """As :func:`fxq.kernels.cluster.kmeans.means`, on the current device.

    Args:
        x: float32 [groups, T, width].
        order: int64 [groups * T], the rows of all groups sorted by cluster.
        sizes: int64 [groups * C], how many rows each cluster has.
        centroids: float32 [groups, C, width].
    """
    groups, count, width = centroids.shape
    y = torch.empty(centroids.shape, dtype=torch.float32, device=x.device)
    if y.numel():
        means_kernel[(groups * count, triton.cdiv(width, MEAN_D))](
            x.contiguous(),
            order,
            sizes.cumsum(0),
            centroids.contiguous(),
            y,
            D=width,
            BLOCK_T=MEAN_T,
            BLOCK_D=MEAN_D,
            num_warps=4,
        )
    return y
