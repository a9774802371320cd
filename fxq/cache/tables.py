"""What codecs learn from calibration and the model keeps: gathered from rollouts, checked, under names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fxq.cache.codecs.codec import Codec, Kind, Memory
from fxq.cache.codecs.record import Shape
from fxq.cache.policy import CachePolicy
from fxq.cache.store import Cache, Memories

KINDS: tuple[Kind, ...] = ("keys", "values")


class TableError(ValueError):
    """Tables that are missing, or that are none of their codec's."""


def place(kind: Kind, layer: int) -> str:
    """The name of a layer's keys or values, ``keys.3``."""
    return f"{kind}.{layer}"


def learning(policy: CachePolicy, layers: int) -> Iterator[tuple[Kind, int, Codec]]:
    """The layers, by kind, whose codec lies with the model."""
    for kind in KINDS:
        for layer in range(layers):
            codec = policy.codec(kind, layer)
            if codec is not None and codec.needs_tables:
                yield kind, layer, codec


def sampled(cache: Cache, policy: CachePolicy, count: int) -> dict[str, Tensor]:
    """Tokens of the chunk that came in last, spread evenly over it and the videos, as codecs get them.

    Args:
        cache: of a policy without codecs, which keeps the new chunk exact.
        policy: whose codecs are to learn.
        count: tokens at most.

    Returns:
        By :func:`place`, [tokens, heads, head_dim] each in CPU memory.
    """
    found = {}
    for kind, layer, _ in learning(policy, len(cache.keys)):
        tokens = cache.newest(kind, layer).flatten(0, 1)
        chosen = torch.linspace(0, len(tokens) - 1, min(count, len(tokens)), dtype=torch.float64).round().long()
        found[place(kind, layer)] = tokens[chosen.to(tokens.device)].cpu()
    return found


def learned(policy: CachePolicy, samples: Sequence[Mapping[str, Tensor]], layers: int) -> Memories:
    """What the codecs learn from the samples of every batch of rollouts; empty where they need nothing."""
    found: dict[Kind, list[Memory]] = {kind: [{} for _ in range(layers)] for kind in KINDS}
    for kind, layer, codec in learning(policy, layers):
        found[kind][layer] = codec.learned(torch.cat([sample[place(kind, layer)] for sample in samples]))
    return found["keys"], found["values"]


def to_tensors(tables: Memories) -> dict[str, Tensor]:
    """All tensors by ``keys.3.basis``."""
    pairs = zip(KINDS, tables, strict=True)
    places = {place(kind, i): memory for kind, memories in pairs for i, memory in enumerate(memories)}
    return {f"{where}.{name}": tensor for where, memory in places.items() for name, tensor in memory.items()}


def from_tensors(tensors: Mapping[str, Tensor], layers: int) -> Memories:
    """Inverse of :func:`to_tensors`."""
    keys, values = ([below(tensors, f"{place(kind, i)}.") for i in range(layers)] for kind in KINDS)
    return keys, values


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def same_memory(a: Memory, b: Memory) -> bool:
    """Whether two sets of tensors are equal, number by number."""
    return a.keys() == b.keys() and all(a[n] is b[n] or torch.equal(a[n], b[n].to(a[n].device)) for n in a)


def same_tables(some: Memories, others: Memories) -> bool:
    """Whether two sets of tables are equal, number by number."""
    return same_memory(to_tensors(some), to_tensors(others))


def check_tables(policy: CachePolicy, tables: Memories, shape: Shape, layers: int) -> None:
    """Refuse tables that the policy's codecs cannot work with.

    Args:
        policy: whose codecs they are of.
        tables: per layer, of keys and of values.
        shape: of a layer's cache.
        layers: of the model.

    Raises:
        TableError: naming layer and tensor.
    """
    if [len(memories) for memories in tables] != [layers, layers]:
        raise TableError(f"tables of {[len(m) for m in tables]} layers: expected keys and values of {layers}")
    for kind, layer, codec in learning(policy, layers):
        if problem := codec.table_problem(tables[KINDS.index(kind)][layer], shape, kind):
            raise TableError(f"layer {layer}, {kind}: codec {codec.name}: {problem}")
