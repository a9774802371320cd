"""The integers that attention in 8 bits multiplies, made once when a span is stored instead of in every call."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from fxq.cache.codecs.codec import Codec, Kind, Memory, Noise, shape_of
from fxq.cache.codecs.record import Field, Record, Shape
from fxq.kernels.attention.eight_bits.int8 import VALUE_BLOCK, key_mean, quantized_rows, quantized_values


@dataclasses.dataclass(frozen=True)
class Int8Attention(Codec):
    """Keys, rotated, less the mean of their span, with a scale for each token and head; values with one a channel.

    A scale of values is for VALUE_BLOCK tokens. So ``fxq::attention_int8`` quantizes a piece of keys and values
    (SageAttention, arXiv 2410.02367); where that is what a model's attention is, it multiplies these integers as they
    lie. Others read the numbers they stand for.
    """

    name: ClassVar[str] = "int8_attention"
    rotated: ClassVar[bool] = True
    integers: ClassVar[bool] = True

    def fields(self, shape: Shape, kind: Kind) -> tuple[Field, ...]:
        """Codes; scales and mean of keys, scales of values."""
        heads, size = shape.heads, shape.head_dim
        codes = Field("codes", torch.int8, "token", (heads, size))
        if kind == "keys":
            scale = Field("scale", torch.float32, "token", (heads,))
            return codes, scale, Field("mean", torch.float32, "span", (heads, size))
        return codes, Field("scale", torch.float32, "span", (-(-shape.span // VALUE_BLOCK), heads, size))

    def encode(self, x: Tensor, kind: Kind, memory: Memory, seed: int = 0) -> tuple[Record, Memory]:
        """Round as attention does."""
        shape = shape_of(x)
        if kind == "keys":
            mean = key_mean(x)
            codes, scale = quantized_rows(x.float() - mean.unsqueeze(1))
            found = {
                "codes": codes.transpose(1, 2),
                "scale": scale.squeeze(3).transpose(1, 2),
                "mean": mean.unsqueeze(1),
            }
        else:
            pairs = [quantized_values(block) for block in x.split(VALUE_BLOCK, 1)]
            joined = torch.cat([codes for codes, _ in pairs], 2).transpose(1, 2)
            found = {"codes": joined, "scale": torch.cat([scale for _, scale in pairs], 2).transpose(1, 2).unsqueeze(1)}
        stored = found | {"codes": found["codes"].to(torch.int8)}
        record = Record(self.fields(shape, kind), {name: t.contiguous() for name, t in stored.items()}, shape)
        return record, {}

    def decode(self, record: Record, kind: Kind) -> Tensor:
        """Codes times scales, and the mean."""
        stored, span = record.tensors, record.shape.span
        codes = stored["codes"].float().unflatten(1, (-1, span))  # [B, spans, span, heads, head_dim]
        if kind == "keys":
            scale = stored["scale"].unflatten(1, (-1, span)).unsqueeze(-1)
            return (codes * scale + stored["mean"].unsqueeze(2)).flatten(1, 2)
        return (codes * stored["scale"].repeat_interleave(VALUE_BLOCK, 2)[:, :, :span]).flatten(1, 2)

    def seeded(self, shape: Shape, kind: Kind, batch: int, spans: int, noise: Noise) -> dict[str, Tensor]:
        """As of every codec, with codes of -127..127 and scales that make numbers about 1 large."""
        found = {}
        for field in self.fields(shape, kind):
            x = noise(field.name, field.size(batch, spans, shape.span))
            if field.name == "codes":
                x = (x * 255).floor().clamp(0, 254) - 127
            elif field.name == "scale":
                x = (x + 0.5) / 64
            else:
                x = (x - 0.5) / 4
            found[field.name] = x.to(field.dtype)
        return found
