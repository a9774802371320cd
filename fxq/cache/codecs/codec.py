"""What a codec is: settings, the fields it stores, how a span of keys or values becomes them and back."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fxq.cache.codecs.record import Field, Record, Shape
from fxq.kernels.attention.codecs import Coefficients
from fxq.kernels.attention.forms import Form

Kind = Literal["keys", "values"]


Noise = Callable[[str, tuple[int, ...]], Tensor]
"""Numbers float64 in 0..1 for a tensor of a name and shape, the same on every machine."""

Memory = Mapping[str, Tensor]
"""What a codec carries from one span of a video to the next, [B, ...] each; empty before the first."""


@dataclasses.dataclass(frozen=True)
class Codec(ABC):
    """A way to store keys or values; a frozen dataclass of its settings, one file each.

    Keys come before their rotary embedding, unless it is ``rotated``: a rotation mixes channels that have little to do
    with each other and changes from token to token.
    """

    name: ClassVar[str]
    rotated: ClassVar[bool] = False
    """Whether it stores keys rotated, which stay where they are: for absolute positions alone."""
    integers: ClassVar[bool] = False
    """Whether attention in 8 bits multiplies what it stores."""

    @abstractmethod
    def fields(self, shape: Shape, kind: Kind) -> tuple[Field, ...]:
        """What is stored, for keys or values of a layer.

        Raises:
            ValueError: when the settings do not fit the shape, with what would.
        """

    @property
    def needs_tables(self) -> bool:
        """Whether it does nothing without what :meth:`learned` gives."""
        return False

    def learned(self, x: Tensor) -> Memory:
        """What lies with the model and every video begins with, from calibration tokens [T, heads, head_dim]."""
        return {}

    def table_problem(self, tables: Memory, shape: Shape, kind: Kind) -> str:
        """Why tensors are not what :meth:`learned` gives for a shape, or ""."""
        for field in self.fields(shape, kind):
            if field.per != "model":
                continue
            if (tensor := tables.get(field.name)) is None:
                return f"{field.name} is missing"
            if tensor.dtype != field.dtype or tuple(tensor.shape) != field.shape:
                return f"{field.name} is {tensor.dtype} {tuple(tensor.shape)}: expected {field.dtype} {field.shape}"
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                return f"{field.name} holds NaN or infinity"
        return ""

    @abstractmethod
    def encode(self, x: Tensor, kind: Kind, memory: Memory, seed: int = 0) -> tuple[Record, Memory]:
        """Store one span.

        The result of a video does not depend on the others of its batch, on the process's random state or on how
        often it is computed.

        Args:
            x: float [B, T, heads, head_dim], one span.
            kind: keys (not rotated, unless the codec is) or values.
            memory: what the previous span's call returned; empty for the first.
            seed: of the codec's own generator, such as the layer's number.
        """

    def seeded(self, shape: Shape, kind: Kind, batch: int, spans: int, noise: Noise) -> dict[str, Tensor]:
        """Stored tensors of so many spans that decode to numbers of chance, about 1 large: for a call that is compared.

        They are made, not encoded: no sum in them depends on a machine. Here floats are uniform with mean 0 and
        variance 1, and every bit of an integer is.
        """
        found = {}
        for field in self.fields(shape, kind):
            x = noise(field.name, field.size(batch, spans, shape.span))
            x = (x - 0.5) * 12**0.5 if field.dtype.is_floating_point else (x * 256).floor()
            found[field.name] = x.to(field.dtype)
        return found

    @abstractmethod
    def decode(self, record: Record, kind: Kind) -> Tensor:
        """float32 [B, T, heads, head_dim] of all spans of a record."""

    def coefficients(self, record: Record, kind: Kind) -> Coefficients | None:
        """The numbers of all spans of a record in a basis of few vectors; None where there is none that is shorter."""
        return None

    def form(self, shape: Shape, kind: Kind) -> Form | None:
        """How kernels read what is stored; None: :meth:`decode` alone does."""
        return None

    def bits_per_element(self, shape: Shape, kind: Kind, spans: int = 1) -> float:
        """Stored bits per element of a video of so many spans; every stored byte counts."""
        fields = self.fields(shape, kind)
        total = sum(field.nbytes(spans * shape.span, spans) for field in fields)
        return 8 * total / (spans * shape.elements)


def shape_of(x: Tensor) -> Shape:
    """The shape of a span [B, T, heads, head_dim].

    Raises:
        ValueError: when x is not of that form, or holds what is not finite: no codec can bring it back.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"a span is {x.dtype} {tuple(x.shape)}: expected float [B, tokens, heads, head_dim]")
    if x.numel() and not bool(torch.stack(x.aminmax()).isfinite().all()):
        raise ValueError("a span of the cache holds NaN or infinity; the video that it belongs to is lost already")
    return Shape(x.shape[2], x.shape[3], x.shape[1])


def per_video(tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack what was computed for each video alone."""
    return {name: torch.stack([t[name] for t in tensors]) for name in tensors[0]} if tensors else {}


def of_video(memory: Memory, index: int) -> dict[str, Tensor]:
    """One video's part of a memory."""
    return {name: tensor[index] for name, tensor in memory.items()}
