"""A history as a few keys and values of each head: the means of its clusters, and how many tokens each stands for."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fxq.cache.codecs.prq import kmeans
from fxq.kernels.cluster.kmeans import nearest

ITERATIONS = 20
"""Of k-means."""


@dataclasses.dataclass(frozen=True)
class Few:
    """``keys``, rotated, and ``values`` [B, T, heads, head_dim], ``weight`` float32 [B, T, heads]; T may be 0."""

    keys: Tensor
    values: Tensor
    weight: Tensor

    @classmethod
    def none(cls, like: Tensor) -> Few:
        """Of no history; ``like`` [B, T, heads, head_dim]."""
        empty = like[:, :0]
        return cls(empty, empty, torch.zeros(empty.shape[:3], dtype=torch.float32, device=like.device))

    def inputs(self) -> dict[str, Tensor]:
        """As a graph takes them."""
        return {"keys": self.keys, "values": self.values, "weight": self.weight}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.inputs().values())


def compressed(keys: Tensor, values: Tensor, count: int) -> Few:
    """The means of at most ``count`` clusters of each head's tokens, by keys and values together.

    Every video alone, with tokens at equal distances to begin with, so nothing is random.

    Args:
        keys: rotated [B, L, heads, head_dim].
        values: as ``keys``.
        count: of clusters.
    """
    videos = [_video(k.float(), v.float(), min(count, k.shape[0])) for k, v in zip(keys, values, strict=True)]
    k, v, weight = (torch.stack(part) for part in zip(*videos, strict=True))
    return Few(k.to(keys.dtype), v.to(values.dtype), weight)


def _video(keys: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    ratio = 0.5 * keys.std() / values.std().clamp_min(torch.finfo(torch.float32).tiny)
    tokens = torch.cat((keys, values * ratio), dim=-1).transpose(0, 1).contiguous()  # [heads, L, 2 * head_dim]
    first = torch.arange(count, device=tokens.device) * tokens.shape[1] // count
    names = nearest(tokens, kmeans(tokens, tokens[:, first], ITERATIONS).bfloat16().float())
    both = torch.cat((keys, values), dim=-1).transpose(0, 1)
    sums = both.new_zeros(len(both), count, both.shape[2])
    sums.scatter_add_(1, names.unsqueeze(-1).expand_as(both), both)
    weight = both.new_zeros(len(both), count).scatter_add_(1, names, torch.ones_like(names, dtype=both.dtype))
    means = (sums / weight.clamp_min(1).unsqueeze(-1)).transpose(0, 1)  # [count, heads, 2 * head_dim]
    return means[..., : keys.shape[2]], means[..., keys.shape[2] :], weight.T.contiguous()
