"""Mean and leading components of each head of a span, and a scalar quantizer on what they leave."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from fxq.cache.codecs.codec import Codec, Kind, Memory, Noise, shape_of
from fxq.cache.codecs.klt import eigenbasis
from fxq.cache.codecs.record import Field, Record, Shape
from fxq.cache.codecs.rtn import block_fields, dequantize_blocks, quantize_blocks, seeded_codes
from fxq.cache.codecs.scalar import Grid, ScaleDtype


@dataclasses.dataclass(frozen=True)
class LowRank(Codec):
    """``rank`` components with coefficients of 8 bits per token; the residual in blocks (as LoRC, arXiv 2410.03111)."""

    rank: int = 4
    bits: int = 2
    block: int = 32
    asymmetric: bool = True
    scale_dtype: ScaleDtype = "bfloat16"

    name: ClassVar[str] = "low_rank"

    def __post_init__(self) -> None:
        self.grid  # noqa: B018
        if self.rank < 1:
            raise ValueError(f"rank = {self.rank}: expected 1 or more components")

    @property
    def grid(self) -> Grid:
        """The scalar quantizer of the residual."""
        return Grid(self.bits, self.asymmetric, self.scale_dtype)

    @property
    def _coefficients(self) -> Grid:
        return Grid(8, True, "bfloat16")

    def fields(self, shape: Shape, kind: Kind) -> tuple[Field, ...]:
        """Mean, components and their coefficients, and the residual's."""
        if self.rank > shape.head_dim:
            raise ValueError(f"rank = {self.rank}: a head has {shape.head_dim} channels")
        per = (shape.heads, self.rank)
        return (
            *block_fields(self.grid, self.block, shape),
            Field("mean", torch.bfloat16, "span", (shape.heads, shape.head_dim)),
            Field("basis", torch.bfloat16, "span", (shape.heads, shape.head_dim, self.rank)),
            Field("coefficients", torch.uint8, "token", per),
            Field("coefficient_scale", torch.bfloat16, "span", per),
            Field("coefficient_zero", torch.bfloat16, "span", per),
        )

    def encode(self, x: Tensor, kind: Kind, memory: Memory, seed: int = 0) -> tuple[Record, Memory]:
        """Fit every head's span, then round."""
        shape = shape_of(x)
        fields, heads = self.fields(shape, kind), x.float().transpose(1, 2)  # [B, heads, T, head_dim]
        mean = heads.mean(dim=2).to(torch.bfloat16)
        centred = heads - mean.float().unsqueeze(2)
        basis = torch.stack([eigenbasis(video) for video in centred])[..., : self.rank].to(torch.bfloat16)
        codes, scale, zero = self._coefficients.quantize((centred @ basis.float()).transpose(2, 3))
        assert zero is not None
        low = self._coefficients.dequantize(codes, scale, zero).transpose(2, 3) @ basis.float().transpose(2, 3)
        tensors = quantize_blocks((centred - low).transpose(1, 2), self.grid, self.block) | {
            "mean": mean.unsqueeze(1),
            "basis": basis.unsqueeze(1),
            "coefficients": codes.permute(0, 3, 1, 2).contiguous(),
            "coefficient_scale": scale.unsqueeze(1),
            "coefficient_zero": zero.unsqueeze(1),
        }
        return Record(fields, tensors, shape), {}

    def seeded(self, shape: Shape, kind: Kind, batch: int, spans: int, noise: Noise) -> dict[str, Tensor]:
        """As of every codec, with codes that the grids have."""
        found = seeded_codes(self.grid, super().seeded(shape, kind, batch, spans, noise))
        scale = found["coefficient_scale"].float().abs().clamp(0.125, 1) / 256
        return found | {"coefficient_scale": scale.to(torch.bfloat16)}

    def decode(self, record: Record, kind: Kind) -> Tensor:
        """Mean, components and residual."""
        t = record.tensors
        spans = (record.spans, record.shape.span)
        codes = t["coefficients"].unflatten(1, spans).permute(0, 1, 3, 4, 2)  # [B, spans, heads, rank, T]
        values = self._coefficients.dequantize(codes, t["coefficient_scale"], t["coefficient_zero"])
        low = values.transpose(-1, -2) @ t["basis"].float().transpose(-1, -2)  # [B, spans, heads, T, head_dim]
        x = (low + t["mean"].float().unsqueeze(3)).transpose(2, 3).flatten(1, 2)
        return x + dequantize_blocks(record, self.grid, self.block)
