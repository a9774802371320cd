"""QuaRot (arXiv 2404.00456): a Hadamard rotation of each head spreads outlier channels, then rounding per token."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from fxq.cache.codecs.codec import Codec, Kind, Memory, Noise, shape_of
from fxq.cache.codecs.record import Field, Record, Shape
from fxq.cache.codecs.rtn import block_fields, dequantize_blocks, quantize_blocks, seeded_codes
from fxq.cache.codecs.scalar import Grid, ScaleDtype


@dataclasses.dataclass(frozen=True)
class QuaRot(Codec):
    """As :class:`~fxq.cache.codecs.rtn.PerToken` behind a rotation that needs no storage."""

    bits: int = 2
    block: int = 32
    asymmetric: bool = True
    scale_dtype: ScaleDtype = "float8_e4m3fn"

    name: ClassVar[str] = "quarot"

    def __post_init__(self) -> None:
        self.grid  # noqa: B018

    @property
    def grid(self) -> Grid:
        """The scalar quantizer."""
        return Grid(self.bits, self.asymmetric, self.scale_dtype)

    def fields(self, shape: Shape, kind: Kind) -> tuple[Field, ...]:
        """Those of rounding per token."""
        hadamard(shape.head_dim, torch.device("cpu"))
        return block_fields(self.grid, self.block, shape)

    def encode(self, x: Tensor, kind: Kind, memory: Memory, seed: int = 0) -> tuple[Record, Memory]:
        """Rotate, then round."""
        shape = shape_of(x)
        rotated = x.float() @ hadamard(shape.head_dim, x.device)
        return Record(self.fields(shape, kind), quantize_blocks(rotated, self.grid, self.block), shape), {}

    def seeded(self, shape: Shape, kind: Kind, batch: int, spans: int, noise: Noise) -> dict[str, Tensor]:
        """As of every codec, with codes that the grid has."""
        return seeded_codes(self.grid, super().seeded(shape, kind, batch, spans, noise))

    def decode(self, record: Record, kind: Kind) -> Tensor:
        """Numbers, rotated back."""
        rotated = dequantize_blocks(record, self.grid, self.block)
        return rotated @ hadamard(rotated.shape[-1], rotated.device).T


def hadamard(size: int, device: torch.device) -> Tensor:
    """Sylvester's orthonormal Hadamard matrix, float32 [size, size].

    Raises:
        ValueError: when the size is no power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"heads of {size} channels have no Hadamard matrix of this kind: expected a power of two")
    matrix = torch.ones(1, 1, dtype=torch.float32, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5
