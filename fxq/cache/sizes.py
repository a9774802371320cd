"""Bytes of a cache from its policy alone: what :class:`~fxq.cache.store.Cache` will hold, before there is one."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping

from fxq.cache.codecs.codec import Codec, Kind
from fxq.cache.codecs.record import Shape
from fxq.cache.frames import frames_after
from fxq.cache.policy import CachePolicy


@dataclasses.dataclass(frozen=True)
class CacheSize:
    """Bytes of one video's keys and values in all layers: tokens as they are, and encoded spans."""

    exact: int
    packed: int

    @property
    def total(self) -> int:
        """Both."""
        return self.exact + self.packed


def cache_size(
    policy: CachePolicy, chunk: int, tokens: int, layers: int, heads: int, head_dim: int, frames: int, width: int = 2
) -> CacheSize:
    """Bytes of one video's cache after so many frames; memory that waits for more tokens is not counted.

    Args:
        policy: what is kept, and how.
        chunk: frames of a chunk.
        tokens: of a frame.
        layers: of the model.
        heads: of a layer.
        head_dim: channels of a head.
        frames: of the video so far, whole chunks.
        width: bytes of an exact number.

    Raises:
        ValueError: when the policy does not fit, with what would.
    """
    policy.check(chunk)
    policy.check_layers(layers)
    held = frames_after(policy, chunk, frames)
    sink = min(policy.sink, frames)
    span, spans = policy.span * chunk, held.packed // (policy.span * chunk)
    token = heads * head_dim * width
    shape = Shape(heads, head_dim, span * tokens)
    exact = packed = 0
    for (kind, codec), count in _codecs(policy, layers).items():
        begin = held.first_packed + held.packed if codec is not None and held.packed else held.first
        exact += count * (sink + max(0, held.frames - begin)) * tokens * token
        packed += 0 if codec is None or not spans else count * _stored(codec, shape, kind, spans)
    if policy.positions == "relative":
        exact += layers * sink * tokens * token  # keys of the sink before their rotation
    return CacheSize(exact, packed)


@functools.lru_cache(maxsize=64)
def _codecs(policy: CachePolicy, layers: int) -> Mapping[tuple[Kind, Codec | None], int]:
    """How many layers store their keys, and how many their values, by each codec."""
    kinds: tuple[Kind, ...] = ("keys", "values")
    return collections.Counter((kind, policy.codec(kind, layer)) for kind in kinds for layer in range(layers))


@functools.lru_cache(maxsize=256)
def _stored(codec: Codec, shape: Shape, kind: Kind, spans: int) -> int:
    return sum(field.nbytes(spans * shape.span, spans) for field in codec.fields(shape, kind))
