"""Encoded spans of one layer's keys or values, one after the other in memory that grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from fxq.cache.codecs.record import Field, Record, RecordError, Shape
from fxq.cache.tokens import Tokens

_GROWING = ("token", "span")


@dataclasses.dataclass(frozen=True)
class Spans:
    """Spans of a codec. Immutable as :class:`~fxq.cache.tokens.Tokens`: growing gives others that share the memory.

    Args:
        fields: what the codec declares.
        shape: of the layer and its spans.
        grown: stored tensors with a slice for each token or span.
        once: the others.
    """

    fields: tuple[Field, ...]
    shape: Shape
    grown: Mapping[str, Tokens]
    once: Mapping[str, Tensor]

    @classmethod
    def of(cls, record: Record) -> Spans:
        """The spans of a record, copied when they grow."""
        grown = {f.name: Tokens.of(record.tensors[f.name]) for f in record.fields if f.per in _GROWING}
        return cls(record.fields, record.shape, grown, {n: t for n, t in record.tensors.items() if n not in grown})

    def appended(self, record: Record) -> Spans:
        """With the spans of a record at the end.

        Raises:
            RecordError: when it is of another codec, or what is stored once a video differs.
        """
        if record.fields != self.fields or record.shape != self.shape:
            raise RecordError("records of different codecs or shapes cannot be joined")
        for name, tensor in self.once.items():
            if record.tensors[name] is not tensor and not torch.equal(record.tensors[name], tensor):
                raise RecordError(f"{name} is stored once and differs between the records")
        grown = {name: tokens.appended(record.tensors[name]) for name, tokens in self.grown.items()}
        return dataclasses.replace(self, grown=grown)

    def without(self, count: int) -> Spans:
        """Without the first ``count`` spans."""
        step = {field.name: self.shape.span if field.per == "token" else 1 for field in self.fields}
        grown = {name: tokens.without(0, count * step[name]) for name, tokens in self.grown.items()}
        return dataclasses.replace(self, grown=grown)

    @property
    def record(self) -> Record:
        """All spans together, as views."""
        tensors = {name: tokens.tensor for name, tokens in self.grown.items()}
        return Record(self.fields, tensors | dict(self.once), self.shape)

    @property
    def records(self) -> tuple[Record, ...]:
        """Span by span, as views."""
        whole = self.record
        return tuple(whole.spans_of(i, i + 1) for i in range(whole.spans))

    @property
    def reserved(self) -> int:
        """Bytes of memory that waits for more spans, or holds evicted ones until the rest moves."""
        return sum(t.nbytes - t.tensor.numel() * t.tensor.element_size() for t in self.grown.values())
