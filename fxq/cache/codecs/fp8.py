"""float8_e4m3fn with one scale per head and span: the cautious choice where hardware reads it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from fxq.cache.codecs.codec import Codec, Kind, Memory, Noise, shape_of
from fxq.cache.codecs.record import Field, Record, Shape
from fxq.cache.codecs.scalar import E4M3_MOST
from fxq.kernels.attention.forms import Numbers


@dataclasses.dataclass(frozen=True)
class Float8(Codec):
    """The largest magnitude of a head's span becomes 448."""

    name: ClassVar[str] = "float8"

    def fields(self, shape: Shape, kind: Kind) -> tuple[Field, ...]:
        """Numbers and scales."""
        numbers = Field("x", torch.float8_e4m3fn, "token", (shape.heads, shape.head_dim))
        return (numbers, Field("scale", torch.float32, "span", (shape.heads,)))

    def encode(self, x: Tensor, kind: Kind, memory: Memory, seed: int = 0) -> tuple[Record, Memory]:
        """Scale and cast."""
        shape, values = shape_of(x), x.float()
        scale = (values.abs().amax(dim=(1, 3)) / E4M3_MOST).clamp_min(torch.finfo(torch.float32).tiny)
        numbers = (values / scale[:, None, :, None]).clamp(-E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn)
        return Record(self.fields(shape, kind), {"x": numbers, "scale": scale.unsqueeze(1)}, shape), {}

    def seeded(self, shape: Shape, kind: Kind, batch: int, spans: int, noise: Noise) -> dict[str, Tensor]:
        """As of every codec, with scales above 0."""
        found = super().seeded(shape, kind, batch, spans, noise)
        return found | {"scale": found["scale"].abs()}

    def decode(self, record: Record, kind: Kind) -> Tensor:
        """Numbers times scales."""
        scale = record.tensors["scale"].repeat_interleave(record.shape.span, dim=1)  # [B, T, heads]
        return record.tensors["x"].float() * scale.unsqueeze(-1)

    def form(self, shape: Shape, kind: Kind) -> Numbers:
        """Numbers with a scale of each head's span."""
        return Numbers(shape.span)
