"""Rounding to nearest in blocks of channels of one token, or of tokens of one channel."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from fxq.cache.codecs.codec import Codec, Kind, Memory, Noise, shape_of
from fxq.cache.codecs.packing import pack, packed_size, unpack
from fxq.cache.codecs.record import Field, Record, Shape
from fxq.cache.codecs.scalar import Grid, ScaleDtype
from fxq.kernels import native
from fxq.kernels.attention.forms import Blocks
from fxq.kernels.attention.triton_pack import pack_blocks
from fxq.kernels.jit import HAS_TRITON
from fxq.kernels.native import encode


@dataclasses.dataclass(frozen=True)
class PerToken(Codec):
    """One scale for every ``block`` channels of a head and token; 8 bits are the safe INT8 cache."""

    bits: int = 2
    block: int = 32
    asymmetric: bool = False
    scale_dtype: ScaleDtype = "float8_e4m3fn"

    name: ClassVar[str] = "per_token"

    def __post_init__(self) -> None:
        self.grid  # noqa: B018  # refuses what it cannot store

    @property
    def grid(self) -> Grid:
        """The scalar quantizer."""
        return Grid(self.bits, self.asymmetric, self.scale_dtype)

    def fields(self, shape: Shape, kind: Kind) -> tuple[Field, ...]:
        """Packed codes, scales and, where asymmetric, least values."""
        return block_fields(self.grid, self.block, shape)

    def encode(self, x: Tensor, kind: Kind, memory: Memory, seed: int = 0) -> tuple[Record, Memory]:
        """Round every block."""
        shape = shape_of(x)
        return Record(self.fields(shape, kind), quantize_blocks(x.float(), self.grid, self.block), shape), {}

    def decode(self, record: Record, kind: Kind) -> Tensor:
        """Codes times scales."""
        return dequantize_blocks(record, self.grid, self.block)

    def seeded(self, shape: Shape, kind: Kind, batch: int, spans: int, noise: Noise) -> dict[str, Tensor]:
        """As of every codec, with codes that the grid has."""
        return seeded_codes(self.grid, super().seeded(shape, kind, batch, spans, noise))

    def form(self, shape: Shape, kind: Kind) -> Blocks:
        """A scale for each block of channels."""
        return Blocks(self.bits, self.grid.offset, self.block)


@dataclasses.dataclass(frozen=True)
class PerChannel(Codec):
    """One scale for every ``group`` tokens of a channel; 0 takes the span as one group.

    The axis that suits keys, whose channels differ far more than their tokens (KIVI, arXiv 2402.02750).
    """

    bits: int = 2
    group: int = 0
    asymmetric: bool = True
    scale_dtype: ScaleDtype = "bfloat16"

    name: ClassVar[str] = "per_channel"

    def __post_init__(self) -> None:
        self.grid  # noqa: B018
        if self.group < 0:
            raise ValueError(f"group = {self.group}: expected a number of tokens, or 0 for the whole span")

    @property
    def grid(self) -> Grid:
        """The scalar quantizer."""
        return Grid(self.bits, self.asymmetric, self.scale_dtype)

    def fields(self, shape: Shape, kind: Kind) -> tuple[Field, ...]:
        """Codes packed along the channels, a scale per group and channel."""
        group = self._group(shape)
        if shape.span % group:
            raise ValueError(f"a span of {shape.span} tokens is not whole groups of {group}: choose a divisor, or 0")
        wide = packed_size(shape.head_dim, self.bits)
        scales = (shape.span // group, shape.heads, shape.head_dim)
        found = [Field("codes", torch.uint8, "token", (shape.heads, wide))]
        found.append(Field("scale", self.grid.dtype, "span", scales))
        if self.asymmetric:
            found.append(Field("zero", self.grid.dtype, "span", scales))
        return tuple(found)

    def _group(self, shape: Shape) -> int:
        return self.group or shape.span

    def encode(self, x: Tensor, kind: Kind, memory: Memory, seed: int = 0) -> tuple[Record, Memory]:
        """Round every group."""
        shape = shape_of(x)
        fields = self.fields(shape, kind)
        groups = x.float().unflatten(1, (-1, self._group(shape))).movedim(2, -1)  # [B, groups, heads, head_dim, group]
        codes, scale, zero = self.grid.quantize(groups)
        stored = {"codes": pack(codes.movedim(-1, 2).flatten(1, 2), self.bits), "scale": scale.unsqueeze(1)}
        if zero is not None:
            stored["zero"] = zero.unsqueeze(1)
        return Record(fields, stored, shape), {}

    def decode(self, record: Record, kind: Kind) -> Tensor:
        """Codes times scales."""
        scale = record.tensors["scale"].flatten(1, 2)  # [B, groups, heads, head_dim]
        zero = record.tensors["zero"].flatten(1, 2) if self.asymmetric else None
        codes = unpack(record.tensors["codes"], self.bits, scale.shape[-1])
        groups = codes.unflatten(1, (scale.shape[1], -1)).movedim(2, -1)
        return self.grid.dequantize(groups, scale, zero).movedim(-1, 2).flatten(1, 2)

    def seeded(self, shape: Shape, kind: Kind, batch: int, spans: int, noise: Noise) -> dict[str, Tensor]:
        """As of every codec, with codes that the grid has."""
        return seeded_codes(self.grid, super().seeded(shape, kind, batch, spans, noise))

    def form(self, shape: Shape, kind: Kind) -> Blocks:
        """A scale for each channel and group of tokens."""
        return Blocks(self.bits, self.grid.offset, 1, self._group(shape))


def packs_in(device: str) -> str:
    """What rounds and packs codes of blocks on a device type: "triton", "native" or "torch"."""
    if device == "cpu" and native.ready():
        return "native"
    return "triton" if HAS_TRITON and device == "cuda" else "torch"


def block_fields(grid: Grid, block: int, shape: Shape) -> tuple[Field, ...]:
    """Fields of numbers [B, T, heads, head_dim] in blocks of channels.

    Raises:
        ValueError: when a head is not whole blocks.
    """
    if block < 1 or shape.head_dim % block:
        raise ValueError(f"block = {block}: a head of {shape.head_dim} channels is not whole blocks; choose a divisor")
    found = [Field("codes", torch.uint8, "token", (shape.heads, packed_size(shape.head_dim, grid.bits)))]
    found.append(Field("scale", grid.dtype, "token", (shape.heads, shape.head_dim // block)))
    if grid.asymmetric:
        found.append(Field("zero", grid.dtype, "token", (shape.heads, shape.head_dim // block)))
    return tuple(found)


def quantize_blocks(x: Tensor, grid: Grid, block: int) -> dict[str, Tensor]:
    """The tensors of :func:`block_fields` for float32 [B, T, heads, head_dim]; kernels round and pack in one pass."""
    blocks, chosen = x.unflatten(-1, (-1, block)), packs_in(x.device.type)
    if chosen == "triton":
        scale, zero = grid.measured(blocks)
        with torch.cuda.device(x.device):
            packed = pack_blocks(x, scale, zero, grid.bits)
    elif chosen == "native":
        scale, zero = grid.of_ranges(*encode.block_ranges(x, block))
        packed = encode.block_codes(x, scale, zero, grid.bits)
    else:
        codes, scale, zero = grid.quantize(blocks)
        packed = pack(codes.flatten(-2), grid.bits)
    stored = {"codes": packed, "scale": scale}
    return stored if zero is None else stored | {"zero": zero}


def seeded_codes(grid: Grid, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of :meth:`~fxq.cache.codecs.codec.Codec.seeded` with scales above 0 that make numbers about 1 large.

    A symmetric grid has no code of all ones: such become 0.
    """
    codes, scale = tensors["codes"], tensors["scale"].float().abs().clamp(0.125, 1)
    if not grid.asymmetric:
        parts = unpack(codes, grid.bits, codes.shape[-1] * 8 // grid.bits)
        codes = pack(torch.where(parts == 2**grid.bits - 1, 0, parts), grid.bits)
    return tensors | {"codes": codes, "scale": (scale * 2.0 ** (1 - grid.bits)).to(grid.dtype)}


def dequantize_blocks(record: Record, grid: Grid, block: int) -> Tensor:
    """float32 [B, T, heads, head_dim] of what :func:`quantize_blocks` made."""
    scale, zero = record.tensors["scale"], record.tensors.get("zero")
    codes = unpack(record.tensors["codes"], grid.bits, scale.shape[-1] * block)
    return grid.dequantize(codes.unflatten(-1, (-1, block)), scale, zero).flatten(-2)
