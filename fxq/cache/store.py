"""The cache of a rollout: exact tokens, encoded spans, and what a call of the denoiser gets of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Literal, Protocol

from torch import Tensor

from fxq.cache.codecs.codec import Codec, Kind, Memory
from fxq.cache.codecs.record import Record
from fxq.cache.frames import Frames
from fxq.cache.policy import CachePolicy
from fxq.cache.spans import Spans
from fxq.cache.tokens import Tokens, joined, rest_of


class Rotary(Protocol):
    """The rotary embedding of a model's keys."""

    def __call__(self, x: Tensor, first_frame: int, inverse: bool = False) -> Tensor:
        """Rotate keys [B, T, heads, head_dim] of whole frames that begin with ``first_frame``, or rotate them back."""

    def tables(self, frames: int, first_frame: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines float32 [T, head_dim / 2] of so many frames."""


Memories = tuple[Sequence[Memory], Sequence[Memory]]
"""Per layer, what the codecs of keys and of values begin with."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How tokens make frames and chunks: ``tokens`` a frame, ``chunk`` frames a chunk."""

    tokens: int
    chunk: int


@dataclasses.dataclass(frozen=True)
class Line:
    """Keys or values of one layer, oldest first: sink, encoded spans, exact tokens.

    Without a codec ``exact`` begins with the sink's tokens and ``sink`` is None. ``memory`` is the codec's. A line that
    is ``closed`` holds the sink for good.
    """

    codec: Codec | None
    exact: Tokens
    sink: Tokens | None = None
    spans: Spans | None = None
    memory: Memory = dataclasses.field(default_factory=dict)
    closed: bool = False

    @property
    def records(self) -> tuple[Record, ...]:
        """The encoded spans."""
        return () if self.spans is None else self.spans.records


@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of all layers. Immutable: every change gives a new cache that shares what stays.

    ``frames`` have come in, of which the sink's and those from ``first`` on are kept; ``packed`` frames from
    ``first_packed`` on are encoded (a span goes when its last frame goes).
    """

    policy: CachePolicy
    layout: Layout
    rotary: Rotary
    keys: tuple[Line, ...]
    values: tuple[Line, ...]
    origins: tuple[Tensor, ...] = ()
    frames: int = 0
    first: int = 0
    first_packed: int = 0
    packed: int = 0

    @classmethod
    def empty(
        cls,
        policy: CachePolicy,
        layout: Layout,
        rotary: Rotary,
        like: Sequence[Tensor],
        memories: Memories | None = None,
        frames: int = 0,
    ) -> Cache:
        """A cache without tokens.

        Args:
            policy: what is kept, and how.
            layout: frames and chunks in tokens.
            rotary: of the model's keys.
            like: per layer, an empty tensor [B, 0, heads, head_dim].
            memories: per layer, what the codecs of keys and of values begin with, where it lies with the model.
            frames: that will come in, where it is known: memory of lines that keep all of them is then taken once, with
                room for no more.

        Raises:
            ValueError: when the policy does not fit, or a codec's tables are missing, with what would do.
        """
        policy.check(layout.chunk)
        policy.check_layers(len(like))

        def lines(kind: Kind, given: Sequence[Memory] | None) -> tuple[Line, ...]:
            found = []
            for i, tensor in enumerate(like):
                codec = policy.codec(kind, i)
                if codec is not None and codec.needs_tables and not (given and given[i]):
                    raise ValueError(
                        f"layer {i}, {kind}: codec {codec.name} has no basis, which comes from calibration: run a "
                        "module that fxq.quantize made with this cache in its recipe, within rollout.using(module), "
                        "give the rollout cache_tables, or take fit='video'"
                    )
                sink = None if codec is None else Tokens.of(tensor)
                most = frames * layout.tokens if codec is None and policy.window == -1 else 0
                found.append(
                    Line(codec, Tokens.of(tensor, most), sink, None, dict(given[i]) if given and codec else {})
                )
            return tuple(found)

        keys, values = memories or (None, None)
        return cls(policy, layout, rotary, lines("keys", keys), lines("values", values), first=policy.sink)

    @property
    def sink(self) -> int:
        """Frames of the sink that have come in."""
        return min(self.policy.sink, self.frames)

    @property
    def held(self) -> Frames:
        """Which frames are kept and which of them are encoded."""
        return Frames(self.frames, self.first, self.first_packed, self.packed)

    @property
    def kept(self) -> int:
        """Frames that the next chunk attends to."""
        return self.sink + max(0, self.frames - self.first)

    def fork(self) -> Cache:
        """The same cache, which stays readable however this one is continued."""
        for line in (*self.keys, *self.values):
            line.exact.fork()
            if line.sink is not None:
                line.sink.fork()
        return self

    def append(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Cache:
        """With one more chunk: per layer keys, rotated to their frames, and values [B, T, heads, head_dim]."""
        split = max(0, self.policy.sink - self.frames) * self.layout.tokens

        def grown(line: Line, new: Tensor) -> Line:
            if line.closed:
                return line
            if line.sink is None or not split:
                return dataclasses.replace(line, exact=line.exact.appended(new))
            sink = line.sink.appended(new[:, :split])
            return dataclasses.replace(line, sink=sink, exact=line.exact.appended(new[:, split:]))

        origins = self.origins
        if self.policy.positions == "relative" and split:
            new = [self.rotary(k[:, :split], self.frames, inverse=True) for k in keys]
            origins = tuple(joined([old, k]) for old, k in zip(origins, new, strict=True)) if origins else tuple(new)
        return dataclasses.replace(
            self,
            keys=tuple(map(grown, self.keys, keys)),
            values=tuple(map(grown, self.values, values)),
            origins=origins,
            frames=self.frames + keys[0].shape[1] // self.layout.tokens,
        )

    def evict(self) -> Cache:
        """Without the oldest frames that the window has no room for beside the next chunk."""
        after = self.held.evicted(self.policy, self.layout.chunk)
        if after == self.held:
            return self
        first, per_frame, excess = after.first, self.layout.tokens, after.first - self.first
        gone = (self.packed - after.packed) // self._span
        first_exact = self.first_packed + self.packed
        dropped = max(0, first - max(self.first, first_exact)) * per_frame

        def shorter(line: Line, sink: Tensor | None) -> Line:
            if line.closed:
                return line if sink is None or line.codec else dataclasses.replace(line, exact=Tokens.of(sink))
            if line.codec is None:
                lead = self.sink * per_frame
                return dataclasses.replace(line, exact=line.exact.without(lead, lead + excess * per_frame, sink))
            spans = line.spans and line.spans.without(gone)
            return dataclasses.replace(line, exact=line.exact.without(0, dropped), spans=spans)

        return dataclasses.replace(
            self,
            keys=tuple(shorter(line, self._sink_keys(i, first)) for i, line in enumerate(self.keys)),
            values=tuple(shorter(line, None) for line in self.values),
            first=first,
            first_packed=after.first_packed,
            packed=after.packed,
        )

    def _sink_keys(self, layer: int, first: int) -> Tensor | None:
        """The sink's keys where they lie when the window begins with frame ``first``; None where they stay."""
        if not self.origins:
            return None
        origin = self.origins[layer]
        return self.rotary(origin, first - origin.shape[1] // self.layout.tokens)

    def commit(self) -> Cache:
        """With every whole span encoded that has grown old enough; each is encoded once."""
        cache, after = self, self.held.committed(self.policy, self.layout.chunk)
        while cache.packed < after.packed:
            begin = after.first_packed + cache.packed
            cache = cache._with_span(begin, self._span)
        return cache

    def _with_span(self, begin: int, span: int) -> Cache:
        count = span * self.layout.tokens

        def encoded(line: Line, kind: Kind, seed: int) -> Line:
            if line.codec is None or line.closed:
                return line
            x = line.exact.tensor[:, :count]
            if kind == "keys" and not line.codec.rotated:
                x = self.rotary(x, begin, inverse=True)
            record, memory = line.codec.encode(x, kind, line.memory, seed)
            exact = rest_of(line.exact, count)
            spans = Spans.of(record) if line.spans is None else line.spans.appended(record)
            return dataclasses.replace(line, exact=exact, spans=spans, memory=memory)

        return dataclasses.replace(
            self,
            keys=tuple(encoded(line, "keys", i) for i, line in enumerate(self.keys)),
            values=tuple(encoded(line, "values", i) for i, line in enumerate(self.values)),
            first_packed=self.first_packed if self.packed else begin,
            packed=self.packed + span,
        )

    @property
    def closed(self) -> tuple[int, ...]:
        """Layers that keep their sink alone."""
        return tuple(i for i, line in enumerate(self.keys) if line.closed)

    def closing(self, layers: Collection[int]) -> Cache:
        """Without the history of some layers, of which the sink alone stays and nothing new is kept."""

        def closed(line: Line, sink: Tensor) -> Line:
            kept = Tokens.of(sink.clone())
            exact = kept if line.codec is None else Tokens.of(kept.tensor[:, :0])
            return Line(line.codec, exact, None if line.codec is None else kept, memory=line.memory, closed=True)

        def lines(kind: Kind, old: Sequence[Line]) -> tuple[Line, ...]:
            return tuple(closed(line, self.sink_of(kind, i)) if i in layers else line for i, line in enumerate(old))

        return dataclasses.replace(self, keys=lines("keys", self.keys), values=lines("values", self.values))

    def prefix(self) -> tuple[list[Tensor], list[Tensor]]:
        """What a call attends to besides its own tokens: per layer keys, rotated, and values [B, P, heads, head_dim].

        Layers without encoded spans are views; others are decoded, all of them at once.
        """
        keys = [self._dense(line, "keys", i) for i, line in enumerate(self.keys)]
        return keys, [self._dense(line, "values", i) for i, line in enumerate(self.values)]

    def _dense(self, line: Line, kind: Kind, layer: int) -> Tensor:
        if line.codec is None:
            return line.exact.tensor
        exact, pieces = line.exact.tensor, [self.sink_of(kind, layer)]
        for i, record in enumerate(line.records):
            x, frame = line.codec.decode(record, kind).to(exact.dtype), self.first_packed + i * self._span
            pieces.append(self.rotary(x, frame) if kind == "keys" and not line.codec.rotated else x)
        if pieces[1:] and (gone := self.first - self.first_packed) > 0:
            pieces[1] = pieces[1][:, gone * self.layout.tokens :]
        return joined([*pieces, exact])

    def line(self, kind: Kind, layer: int) -> Line:
        """Keys or values of a layer."""
        return (self.keys if kind == "keys" else self.values)[layer]

    def sink_of(self, kind: Kind, layer: int) -> Tensor:
        """A layer's sink [B, T, heads, head_dim], keys rotated to where they lie for the next chunk."""
        line = self.line(kind, layer)
        if line.sink is None:
            return line.exact.tensor[:, : self.sink * self.layout.tokens]
        if kind == "keys" and self.first > self.policy.sink:
            moved = self._sink_keys(layer, self.first)
            return line.sink.tensor if moved is None else moved
        return line.sink.tensor

    def history(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys, rotated, and values behind the sink, decoded [B, L, heads, head_dim]."""
        skip = self.sink * self.layout.tokens
        keys = self._dense(self.keys[layer], "keys", layer)
        return keys[:, skip:], self._dense(self.values[layer], "values", layer)[:, skip:]

    def exact(self, kind: Kind, layer: int) -> Tensor:
        """What a codec would get of the exact tokens: values, or keys before their rotation [B, T, heads, head_dim].

        Raises:
            ValueError: when the exact tokens do not begin with the video's first frame.
        """
        line = self.line(kind, layer)
        if line.closed or line.sink is not None or self.first > self.policy.sink:
            raise ValueError("this cache was encoded or evicted: take one of a policy without codec and window")
        x = line.exact.tensor
        return self.rotary(x, 0, inverse=True) if kind == "keys" else x

    def newest(self, kind: Kind, layer: int) -> Tensor:
        """The chunk that came in last as a codec would get it: values, or keys before their rotation.

        [B, T, heads, head_dim], of a layer without codec that keeps its history.
        """
        chunk = self.layout.chunk
        x = self.line(kind, layer).exact.tensor[:, -chunk * self.layout.tokens :]
        return self.rotary(x, self.frames - chunk, inverse=True) if kind == "keys" else x

    @property
    def _span(self) -> int:
        return self.policy.span * self.layout.chunk

    def nbytes(self, kind: Literal["exact", "packed", "all", "reserved"] = "all") -> int:
        """Bytes of all layers' keys and values: tokens as they are, encoded spans, or both.

        ``reserved`` are those of memory that waits for more encoded spans, which the others leave out.
        """
        lines = (*self.keys, *self.values)
        spans = [line.spans for line in lines if line.spans is not None]
        if kind == "reserved":
            return sum(found.reserved for found in spans)
        exact = sum(line.exact.nbytes + (0 if line.sink is None else line.sink.nbytes) for line in lines)
        exact += sum(origin.numel() * origin.element_size() for origin in self.origins)
        packed = sum(found.record.nbytes for found in spans)
        return {"exact": exact, "packed": packed, "all": exact + packed}[kind]

    @property
    def moved(self) -> int:
        """Bytes that were copied from one place to another since the cache was empty."""
        return sum(line.exact.buffer.moved for line in (*self.keys, *self.values))
