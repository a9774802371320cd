"""KIVI (arXiv 2402.02750): keys per channel over groups of tokens, values per token, both asymmetric."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from fxq.cache.codecs.codec import Codec, Kind, Memory, Noise
from fxq.cache.codecs.record import Field, Record, Shape
from fxq.cache.codecs.rtn import PerChannel, PerToken
from fxq.cache.codecs.scalar import ScaleDtype
from fxq.kernels.attention.forms import Form


@dataclasses.dataclass(frozen=True)
class Kivi(Codec):
    """``group`` tokens of a channel share a key's scale (0: the span), ``block`` channels of a token a value's."""

    bits: int = 2
    group: int = 0
    block: int = 32
    scale_dtype: ScaleDtype = "bfloat16"

    name: ClassVar[str] = "kivi"

    def __post_init__(self) -> None:
        self._of("keys"), self._of("values")  # refuse what they cannot store

    def _of(self, kind: Kind) -> Codec:
        if kind == "keys":
            return PerChannel(self.bits, self.group, True, self.scale_dtype)
        return PerToken(self.bits, self.block, True, self.scale_dtype)

    def fields(self, shape: Shape, kind: Kind) -> tuple[Field, ...]:
        """Those of the kind's axis."""
        return self._of(kind).fields(shape, kind)

    def encode(self, x: Tensor, kind: Kind, memory: Memory, seed: int = 0) -> tuple[Record, Memory]:
        """Round along the kind's axis."""
        return self._of(kind).encode(x, kind, memory, seed)

    def seeded(self, shape: Shape, kind: Kind, batch: int, spans: int, noise: Noise) -> dict[str, Tensor]:
        """As of the kind's axis."""
        return self._of(kind).seeded(shape, kind, batch, spans, noise)

    def decode(self, record: Record, kind: Kind) -> Tensor:
        """As of the kind's axis."""
        return self._of(kind).decode(record, kind)

    def form(self, shape: Shape, kind: Kind) -> Form | None:
        """As of the kind's axis."""
        return self._of(kind).form(shape, kind)
