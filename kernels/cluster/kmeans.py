"""K-means whose result is the same for a group of tokens, whatever stands beside it and however often it runs.

Groups (heads) are clustered alone. These are functions, not operators of the dispatcher: no graph holds them. Tensors
on "cuda" take the Triton kernels where Triton is installed for NVIDIA, those on a CPU native kernels, others the torch
operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq.kernels import native
from fxq.kernels.cluster import triton as cluster_triton
from fxq.kernels.jit import HAS_TRITON
from fxq.kernels.native import encode

BLOCK = 4096
"""Tokens that torch compares at a time: their distances stay in the cache of the CPU."""


def used(device: str) -> str:
    """Name of the implementation that runs on a device type: "triton", "native" or "torch"."""
    if device == "cpu" and native.ready():
        return "native"
    return "triton" if HAS_TRITON and device == "cuda" else "torch"


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """The first of the centroids at the least squared distance.

    Args:
        x: float32 [groups, T, width].
        centroids: float32 [groups, C, width].

    Returns:
        int64 [groups, T].

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    _check(x, centroids)
    chosen = used(x.device.type)
    if chosen == "native":
        return encode.nearest(x, centroids)
    if chosen == "triton":
        with torch.cuda.device(x.device):
            return cluster_triton.nearest(x, centroids)
    # |c|^2 - 2 x.c is the squared distance without what all have in common. Groups alone: no product depends on others.
    names = [_nearest(*pair) for pair in zip(x, centroids, strict=True)]
    return torch.stack(names) if names else x.new_empty(x.shape[:2], dtype=torch.int64)


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    square, columns = centroids.square().sum(-1), centroids.T.contiguous()
    return torch.cat([torch.addmm(square, some, columns, alpha=-2).argmin(-1) for some in x.split(BLOCK)])


def named(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`nearest`, and what the nearest centroid leaves of ``x``, float32 [groups, T, width].

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    _check(x, centroids)
    if used(x.device.type) == "native":
        return encode.nearest_and_rest(x, centroids)
    names = nearest(x, centroids)
    return names, x - centroids.gather(1, names.unsqueeze(-1).expand(x.shape))


def means(x: Tensor, names: Tensor, centroids: Tensor) -> Tensor:
    """The mean of each cluster's tokens, added up in their order; a cluster without tokens keeps its centroid.

    Args:
        x: float32 [groups, T, width].
        names: int64 [groups, T] of :func:`nearest`.
        centroids: float32 [groups, C, width].

    Returns:
        float32 [groups, C, width].

    Raises:
        ValueError: on a wrong dtype or shape.
    """
    _check(x, centroids)
    if names.dtype != torch.int64 or names.shape != x.shape[:2]:
        raise ValueError(f"names are {names.dtype} {tuple(names.shape)}: expected int64 {tuple(x.shape[:2])}")
    if used(x.device.type) == "native":
        return encode.means(x, names, centroids)
    groups, count, width = centroids.shape
    flat = (names + torch.arange(groups, device=x.device).unsqueeze(1) * count).flatten()
    order, sizes = flat.argsort(stable=True), flat.bincount(minlength=groups * count)
    if used(x.device.type) == "triton":
        with torch.cuda.device(x.device):
            return cluster_triton.means(x, order, sizes, centroids)
    sums = torch.segment_reduce(x.flatten(0, 1)[order], "sum", lengths=sizes, axis=0)
    mean = (sums / sizes.clamp_min(1).unsqueeze(1)).view(groups, count, width)
    return torch.where(sizes.view(groups, count, 1) > 0, mean, centroids)


def _check(x: Tensor, centroids: Tensor) -> None:
    for name, tensor in (("x", x), ("centroids", centroids)):
        if tensor.dtype != torch.float32 or tensor.ndim != 3:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: expected float32 [groups, rows, width]")
    if (len(x), x.shape[2]) != (len(centroids), centroids.shape[2]) or not centroids.shape[1]:
        raise ValueError(
            f"centroids are {tuple(centroids.shape)}, x {tuple(x.shape)}: expected the same groups and width"
        )
