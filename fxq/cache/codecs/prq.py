"""Quant VideoGen (arXiv 2602.02958): stages of k-means centroids, then a scalar quantizer on what they leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fxq.cache.codecs.codec import Codec, Kind, Memory, Noise, of_video, per_video, shape_of
from fxq.cache.codecs.packing import PACKED_BITS, pack, packed_size, unpack
from fxq.cache.codecs.record import Field, Record, Shape
from fxq.cache.codecs.rtn import block_fields, dequantize_blocks, quantize_blocks, seeded_codes
from fxq.cache.codecs.scalar import Grid, ScaleDtype
from fxq.kernels.attention.forms import Blocks
from fxq.kernels.cluster.kmeans import means, named, nearest


@dataclasses.dataclass(frozen=True)
class Prq(Codec):
    """Semantic-aware smoothing and progressive residual quantization.

    Every head of a span is clustered alone, in each of ``stages`` what the stage before left. Centroids are bfloat16;
    the next span's k-means starts from them (section 4.3 of the paper), which ``warm_iterations`` then suffice for.
    In the first two thirds of the iterations they move by ``sample`` tokens of the span for each centroid, drawn by a
    generator of the codec's own (0: by all tokens), then by all; every token takes the nearest in the end.
    """

    stages: int = 1
    centroids: int = 256
    bits: int = 2
    block: int = 64
    asymmetric: bool = False
    scale_dtype: ScaleDtype = "float8_e4m3fn"
    iterations: int = 20
    warm_iterations: int = 6
    sample: int = 32

    name: ClassVar[str] = "prq"

    def __post_init__(self) -> None:
        self.grid  # noqa: B018
        if self.stages < 1 or not 2 <= self.centroids <= 256 or self.iterations < 1 or self.warm_iterations < 1:
            raise ValueError(
                f"stages = {self.stages}, centroids = {self.centroids}, iterations = {self.iterations}, "
                f"{self.warm_iterations}: expected 1 or more, 2 to 256 (a byte names one), 1 or more"
            )
        if self.sample < 0:
            raise ValueError(f"sample = {self.sample}: expected a number of tokens for each centroid, or 0 for all")

    @property
    def grid(self) -> Grid:
        """The scalar quantizer."""
        return Grid(self.bits, self.asymmetric, self.scale_dtype)

    @property
    def id_bits(self) -> int:
        """Stored bits that name a centroid."""
        return next(width for width in PACKED_BITS if 2**width >= self.centroids)

    def fields(self, shape: Shape, kind: Kind) -> tuple[Field, ...]:
        """Per number ``bits + 8 z / block + stages * (id_bits / head_dim + centroids * 16 / span)``; z as the grid."""
        if self.centroids > shape.span:
            raise ValueError(
                f"{self.centroids} centroids for spans of {shape.span} tokens: take fewer, or longer spans"
            )
        names = packed_size(shape.heads * self.stages, self.id_bits)
        form = (self.stages, shape.heads, self.centroids, shape.head_dim)
        return (
            *block_fields(self.grid, self.block, shape),
            Field("ids", torch.uint8, "token", (names,)),
            Field("centroids", torch.bfloat16, "span", form),
        )

    def encode(self, x: Tensor, kind: Kind, memory: Memory, seed: int = 0) -> tuple[Record, Memory]:
        """Cluster and round video by video."""
        shape = shape_of(x)
        fields = self.fields(shape, kind)
        stored = [self._video(video.float(), of_video(memory, i), seed) for i, video in enumerate(x)]
        tensors = per_video(stored)
        tensors["centroids"] = tensors["centroids"].unsqueeze(1)
        record = Record(fields, tensors, shape)
        return record, {"centroids": tensors["centroids"][:, 0]}

    def _video(self, x: Tensor, memory: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        rest = x.transpose(0, 1)  # [heads, T, head_dim]
        chosen = _chosen(len(x), self.sample * self.centroids, seed)
        found, ids = [], []
        for stage in range(self.stages):
            some = rest if chosen is None else rest[:, chosen.to(x.device)]
            if memory:
                start, iterations = memory["centroids"][stage].float(), self.warm_iterations
            else:
                start, iterations = _tokens_of(rest, self.centroids, seed * self.stages + stage), self.iterations
            whole = -(-iterations // 3)
            centroids = kmeans(rest, kmeans(some, start, iterations - whole), whole).to(torch.bfloat16)
            names, rest = named(rest, centroids.float())
            found.append(centroids)
            ids.append(names)
        names = torch.stack(ids, dim=-1).transpose(0, 1).flatten(1)  # [T, heads * stages]
        blocks = {
            name: t.transpose(0, 1).contiguous() for name, t in quantize_blocks(rest, self.grid, self.block).items()
        }
        return blocks | {"ids": pack(names, self.id_bits), "centroids": torch.stack(found)}

    def seeded(self, shape: Shape, kind: Kind, batch: int, spans: int, noise: Noise) -> dict[str, Tensor]:
        """As of every codec, with codes that the grid has and names of centroids that there are."""
        found = seeded_codes(self.grid, super().seeded(shape, kind, batch, spans, noise))
        names = noise("names", (batch, spans * shape.span, shape.heads * self.stages))
        return found | {"ids": pack((names * self.centroids).floor(), self.id_bits)}

    def decode(self, record: Record, kind: Kind) -> Tensor:
        """What was left, plus one centroid of every stage."""
        x = dequantize_blocks(record, self.grid, self.block).unflatten(1, (record.spans, record.shape.span))
        heads = x.shape[3]
        names = unpack(record.tensors["ids"], self.id_bits, heads * self.stages).long().clamp_max(self.centroids - 1)
        names = names.unflatten(1, (record.spans, record.shape.span)).unflatten(-1, (heads, self.stages))
        centroids = record.tensors["centroids"].float()  # [B, spans, stages, heads, C, head_dim]
        for stage in range(self.stages):
            x = x + _named(centroids[:, :, stage], names[..., stage].transpose(2, 3)).transpose(2, 3)
        return x.flatten(1, 2)

    def form(self, shape: Shape, kind: Kind) -> Blocks:
        """What was left, and the stages."""
        blocks = Blocks(self.bits, self.grid.offset, self.block)
        return blocks._replace(stages=self.stages, centroids=self.centroids, id_bits=self.id_bits)


def kmeans(x: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """Lloyd's iterations, each head alone; a cluster without tokens keeps its centroid.

    Sums run over tokens in their order, so that no order of threads changes them.

    Args:
        x: float32 [heads, T, head_dim].
        centroids: float32 [heads, C, head_dim] to start from.
        iterations: how many.
    """
    for _ in range(iterations):
        centroids = means(x, nearest(x, centroids), centroids)
    return centroids


def _named(centroids: Tensor, names: Tensor) -> Tensor:
    """[..., T, head_dim]: the centroid [..., C, head_dim] of every name [..., T]."""
    return centroids.gather(-2, names.unsqueeze(-1).expand(*names.shape, centroids.shape[-1]))


def _chosen(tokens: int, count: int, seed: int) -> Tensor | None:
    """``count`` of so many tokens, in order; None where there are no more, or ``count`` is 0."""
    if not 0 < count < tokens:
        return None
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def _tokens_of(x: Tensor, count: int, seed: int) -> Tensor:
    """``count`` different tokens of each head [heads, T, head_dim] by a generator of the codec's own."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(x.shape[1], generator=generator)[:count] for _ in range(len(x))])
    return _named(x, chosen.to(x.device))
