"""A cache as tensors and facts, from which another process goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxq.cache.codecs.codec import Codec, Kind
from fxq.cache.codecs.record import Field, Record, RecordError, Shape
from fxq.cache.frames import Frames
from fxq.cache.settings import CacheSettingsError, policy_from_json, policy_to_json
from fxq.cache.spans import Spans
from fxq.cache.store import Cache, Layout, Line, Rotary
from fxq.cache.tables import same_memory
from fxq.cache.tokens import Tokens

_COUNTS = ("frames", "first", "first_packed", "packed")
_LARGEST = 2**40


class SavedCacheError(ValueError):
    """Tensors and facts that are no cache that can be gone on with."""


def cache_to_tensors(cache: Cache) -> tuple[dict[str, Tensor], dict[str, object]]:
    """All that a cache holds, tensors by name and JSON facts; memory that waits for tokens is left out."""
    tensors: dict[str, Tensor] = {}
    for kind, lines in (("keys", cache.keys), ("values", cache.values)):
        for layer, line in enumerate(lines):
            place = f"{kind}.{layer}"
            tensors[f"{place}.exact"] = line.exact.tensor
            if line.sink is not None:
                tensors[f"{place}.sink"] = line.sink.tensor
            if line.spans is not None and line.records:
                stored = line.spans.record.tensors
                tensors |= {f"{place}.record.{name}": tensor for name, tensor in stored.items()}
            tensors |= {f"{place}.memory.{name}": tensor for name, tensor in line.memory.items()}
    tensors |= {f"origins.{layer}": tensor for layer, tensor in enumerate(cache.origins)}
    facts: dict[str, object] = {name: getattr(cache, name) for name in _COUNTS}
    facts |= {"policy": policy_to_json(cache.policy), "layout": dataclasses.asdict(cache.layout)}
    facts |= {"layers": len(cache.keys), "closed": list(cache.closed)}
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, facts


def cache_from_tensors(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], like: Cache, rotary: Rotary) -> Cache:
    """Inverse of :func:`cache_to_tensors`.

    Args:
        tensors: what was stored; every shape and dtype is checked against what the codecs declare.
        facts: as stored.
        like: an empty cache of the rollout that goes on: its model's layers, heads and dtype, its policy.
        rotary: of the model's keys.

    Raises:
        SavedCacheError: naming what does not fit.
    """
    try:
        policy, layout = policy_from_json(facts["policy"]), Layout(**facts["layout"])
    except (CacheSettingsError, KeyError, TypeError) as error:
        raise SavedCacheError(f"the saved cache's settings do not fit: {error}") from None
    if policy != like.policy or layout != like.layout:
        raise SavedCacheError(
            f"the saved cache is of another policy, {policy_to_json(policy)} in {layout}; go on with the settings that "
            "it was made with"
        )
    span, sink = policy.span * layout.chunk, min(policy.sink, (held := _frames(facts, like)).frames)
    frames, first, first_packed, packed = dataclasses.astuple(held)
    shell = dataclasses.replace(
        like, rotary=rotary, frames=frames, first=first, first_packed=first_packed, packed=packed
    )
    exact = max(0, frames - max(first, first_packed + packed)) * layout.tokens
    closed = _closed(facts, like)
    taken: set[str] = set()

    def take(name: str, want: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        taken.add(name)
        found = tensors.get(name)
        if found is None or tuple(found.shape) != want or found.dtype != dtype:
            shown = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
            raise SavedCacheError(f"{name} is {shown}: expected {dtype} {want}")
        return found

    def line(kind: Kind, layer: int, empty: Line) -> Line:
        place, old = f"{kind}.{layer}", empty.exact.tensor
        batch, _, heads, width = old.shape
        gone = layer in closed
        if empty.codec is None:
            whole = (sink + (0 if gone else max(0, frames - first))) * layout.tokens
            return Line(None, Tokens.of(take(f"{place}.exact", (batch, whole, heads, width), old.dtype)), closed=gone)
        held = Tokens.of(take(f"{place}.exact", (batch, 0 if gone else exact, heads, width), old.dtype))
        kept = Tokens.of(take(f"{place}.sink", (batch, sink * layout.tokens, heads, width), old.dtype))
        shape = Shape(heads, width, span * layout.tokens)
        spans = _spans(empty.codec, kind, shape, 0 if gone else packed // span, batch, place, take)
        memory = {
            name.removeprefix(f"{place}.memory."): tensors[name]
            for name in tensors
            if name.startswith(f"{place}.memory.")
        }
        taken.update(f"{place}.memory.{name}" for name in memory)
        if any(not tensor.is_floating_point() and tensor.dtype != torch.uint8 for tensor in memory.values()):
            raise SavedCacheError(f"{place}: the memory of its codec holds other dtypes than codecs leave there")
        stored = spans.once.items() if spans is not None else ()
        once = {name: tensor for name, tensor in stored if name in memory and tensor.equal(memory[name])}
        if empty.codec.needs_tables and not same_memory(memory | once, empty.memory):
            raise SavedCacheError(
                f"{place}: the saved cache was made with other tables than this rollout's: go on with its bundle"
            )
        return Line(empty.codec, held, kept, spans, memory | once, gone)

    keys = tuple(line("keys", i, empty) for i, empty in enumerate(like.keys))
    values = tuple(line("values", i, empty) for i, empty in enumerate(like.values))
    origins: tuple[Tensor, ...] = ()
    if policy.positions == "relative" and sink:
        shapes = [entry.exact.tensor.shape for entry in like.keys]
        dtypes = [entry.exact.tensor.dtype for entry in like.keys]
        origins = tuple(
            take(f"origins.{i}", (s[0], sink * layout.tokens, s[2], s[3]), d)
            for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))
        )
    if unknown := sorted(set(tensors) - taken):
        raise SavedCacheError(f"the saved cache holds {unknown[0]!r}, which no setting of its policy stores")
    return dataclasses.replace(shell, keys=keys, values=values, origins=origins)


def _spans(codec: Codec, kind: Kind, shape: Shape, spans: int, batch: int, place: str, take: Any) -> Spans | None:
    if not spans:
        return None
    fields = codec.fields(shape, kind)

    def size(field: Field) -> tuple[int, ...]:
        lead = {"token": (batch, spans * shape.span), "span": (batch, spans), "video": (batch,), "model": ()}[field.per]
        return (*lead, *field.shape)

    stored = {field.name: take(f"{place}.record.{field.name}", size(field), field.dtype) for field in fields}
    try:
        whole = Record(fields, stored, shape)
    except RecordError as error:
        raise SavedCacheError(f"{place}: {error}") from None
    return Spans.of(whole)


def _frames(facts: Mapping[str, Any], like: Cache) -> Frames:
    """Which frames were kept, and how, for a cache like an empty one of the same policy."""
    counts = [facts.get(name) for name in _COUNTS]
    if not all(type(count) is int and 0 <= count < _LARGEST for count in counts) or facts.get("layers") != len(
        like.keys
    ):
        raise SavedCacheError(f"the saved cache counts {counts} frames in {facts.get('layers')} layers")
    held = Frames(*(int(count) for count in counts if count is not None))
    span = like.policy.span * like.layout.chunk
    last = held.first_packed + held.packed
    if held.packed % span or held.first < like.policy.sink or last > max(held.frames, held.first):
        raise SavedCacheError(f"the saved cache's frames {counts} do not follow each other")
    return held


def _closed(facts: Mapping[str, Any], like: Cache) -> tuple[int, ...]:
    """Layers that keep their sink alone, for a cache like an empty one of the same policy."""
    closed, layers = facts.get("closed", []), len(like.keys)
    fits = isinstance(closed, list) and all(type(i) is int and 0 <= i < layers for i in closed)
    if not fits or sorted(set(closed)) != closed or (closed and like.policy.absorb is None):
        raise SavedCacheError(f"the saved cache has no history of layers {closed!r}: expected some of {layers} layers")
    return tuple(closed)
