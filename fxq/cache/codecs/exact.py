"""Spans as they are: for layers that no codec serves, and as the reference of all others."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fxq.cache.codecs.codec import Codec, Kind, Memory, shape_of
from fxq.cache.codecs.record import Field, Record, Shape
from fxq.kernels.attention.forms import Numbers


@dataclasses.dataclass(frozen=True)
class Exact(Codec):
    """Numbers in a float dtype, one by one."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"

    name: ClassVar[str] = "exact"

    def fields(self, shape: Shape, kind: Kind) -> tuple[Field, ...]:
        """The numbers themselves."""
        return (Field("x", getattr(torch, self.dtype), "token", (shape.heads, shape.head_dim)),)

    def encode(self, x: Tensor, kind: Kind, memory: Memory, seed: int = 0) -> tuple[Record, Memory]:
        """Cast."""
        shape = shape_of(x)
        return Record(self.fields(shape, kind), {"x": x.to(getattr(torch, self.dtype))}, shape), {}

    def decode(self, record: Record, kind: Kind) -> Tensor:
        """Cast back."""
        return record.tensors["x"].float()

    def form(self, shape: Shape, kind: Kind) -> Numbers:
        """Numbers without scales."""
        return Numbers()
