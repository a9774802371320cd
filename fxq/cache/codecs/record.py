"""What a codec stores of a span of tokens: named tensors whose axes are declared once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fxq.kernels.attention.codecs import LEADING_AXES

Per = Literal["token", "span", "video", "model"]
"""What a stored tensor has one slice of: ``token`` [B, T, ...], ``span`` [B, spans, ...], ``video`` [B, ...] or
``model`` [...], which lies with the weights and is no part of a video's bytes."""


@dataclasses.dataclass(frozen=True)
class Field:
    """One stored tensor of a codec.

    Args:
        name: its name in files and signatures.
        dtype: as it is stored.
        per: which axis follows the batch.
        shape: the axes after those.
    """

    name: str
    dtype: torch.dtype
    per: Per
    shape: tuple[int, ...]

    def size(self, batch: int, spans: int, span: int) -> tuple[int, ...]:
        """Shape of the whole tensor for so many videos, each of so many spans of ``span`` tokens."""
        return (*(batch, spans * span if self.per == "token" else spans)[: LEADING_AXES[self.per]], *self.shape)

    def nbytes(self, tokens: int, spans: int) -> int:
        """Bytes of one video's slice for so many tokens in so many spans."""
        count = {"token": tokens, "span": spans, "video": 1, "model": 0}[self.per]
        return count * math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer's cache: ``heads`` of ``head_dim`` channels, encoded in spans of ``span`` tokens."""

    heads: int
    head_dim: int
    span: int

    @property
    def elements(self) -> int:
        """Numbers of one span of keys or values."""
        return self.span * self.heads * self.head_dim


class RecordError(ValueError):
    """Stored tensors are not what the codec declares."""


@dataclasses.dataclass(frozen=True)
class Record:
    """Whole spans of one layer's keys or values as a codec stores them. Tensors are never written in place.

    Args:
        fields: what the codec declares.
        tensors: one by each field's name.
        shape: of the layer and its spans.

    Raises:
        RecordError: naming the tensor that does not fit.
    """

    fields: tuple[Field, ...]
    tensors: Mapping[str, Tensor]
    shape: Shape

    def __post_init__(self) -> None:
        if set(self.tensors) != {field.name for field in self.fields}:
            raise RecordError(f"stored are {sorted(self.tensors)}, declared {sorted(f.name for f in self.fields)}")
        for field in self.fields:
            tensor, lead = self.tensors[field.name], LEADING_AXES[field.per]
            if tensor.dtype != field.dtype or tuple(tensor.shape[lead:]) != field.shape or tensor.ndim < lead:
                raise RecordError(
                    f"{field.name} is {tensor.dtype} {tuple(tensor.shape)}: expected {field.dtype} per {field.per} "
                    f"of {field.shape}"
                )
        for field in self.fields:
            tensor = self.tensors[field.name]
            want = (self.batch, self.tokens if field.per == "token" else self.spans)[: LEADING_AXES[field.per]]
            if tuple(tensor.shape[: len(want)]) != want:
                raise RecordError(
                    f"{field.name} {tuple(tensor.shape)} does not hold {self.batch} videos of {self.spans} spans of "
                    f"{self.shape.span} tokens"
                )

    @property
    def batch(self) -> int:
        """Number of videos."""
        return next(self.tensors[field.name].shape[0] for field in self.fields if field.per != "model")

    @property
    def spans(self) -> int:
        """Number of whole spans."""
        for field in self.fields:
            if field.per in ("token", "span"):
                return self.tensors[field.name].shape[1] // (self.shape.span if field.per == "token" else 1)
        return 0

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.spans * self.shape.span

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors stored for these videos."""
        own = [self.tensors[field.name] for field in self.fields if field.per != "model"]
        return sum(tensor.numel() * tensor.element_size() for tensor in own)

    def spans_of(self, start: int, stop: int) -> Record:
        """The spans ``start`` to ``stop``, as views."""

        def cut(field: Field) -> Tensor:
            tensor = self.tensors[field.name]
            if field.per in ("video", "model"):
                return tensor
            step = self.shape.span if field.per == "token" else 1
            return tensor[:, start * step : stop * step]

        return dataclasses.replace(self, tensors={field.name: cut(field) for field in self.fields})
