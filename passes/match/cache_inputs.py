"""What a packed graph gets of a cache: stored tensors as they lie, and what it was packed for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from fxq.cache.codecs.codec import Kind
from fxq.cache.codecs.record import Field, Shape
from fxq.cache.named import codecs_text
from fxq.cache.policy import CachePolicy
from fxq.cache.store import Cache
from fxq.calls.captured import convention
from fxq.core.graph import arguments
from fxq.kernels import attention_packed
from fxq.kernels.attention.codecs import LEADING_AXES

TABLES = ("packed_cos", "packed_sin")
"""Arguments of a packed graph beside those of the graph it was made from."""

MAPS = "absorb_maps"
"""Argument of a graph whose layers can forget their history: a list of maps, one of each."""

FEW = "absorb_tokens"
"""As :data:`MAPS`, of keys and values that stand for histories: ``keys``, ``values`` and ``weight`` of each layer."""

LayerPrefix = Tensor | Mapping[str, Tensor | Mapping[str, Tensor]]
"""A layer's keys or values: rotated and joined, or ``sink``, ``recent`` and ``packed``, the stored tensors by name."""


@dataclasses.dataclass(frozen=True)
class PackedInputs:
    """Inputs of a packed graph.

    Args:
        keys: per layer.
        values: per layer.
        cos: float32 [tokens, head_dim / 2] of the encoded tokens that are kept.
        sin: as ``cos``.
    """

    keys: Sequence[LayerPrefix]
    values: Sequence[LayerPrefix]
    cos: Tensor
    sin: Tensor


def packed_inputs(cache: Cache) -> PackedInputs:
    """A cache as a packed graph takes it; nothing is decoded, and nothing but moved sinks is copied."""
    end = cache.first_packed + cache.packed
    begin = min(max(cache.first, cache.first_packed), end)
    cos, sin = cache.rotary.tables(end - begin, begin)
    device = cache.keys[0].exact.tensor.device
    layers = range(len(cache.keys))
    keys = [_prefix(cache, "keys", i, len(cos)) for i in layers]
    return PackedInputs(keys, [_prefix(cache, "values", i, len(cos)) for i in layers], cos.to(device), sin.to(device))


def _prefix(cache: Cache, kind: Kind, layer: int, tokens: int) -> LayerPrefix:
    line, exact = cache.line(kind, layer), cache.line(kind, layer).exact.tensor
    if cache.line("keys", layer).codec is None and cache.line("values", layer).codec is None:
        return exact
    sink = cache.sink_of(kind, layer)
    if line.codec is None:
        begin = sink.shape[1]
        packed = {"exact": exact[:, begin : begin + tokens]}
        return {"sink": sink, "packed": packed, "recent": exact[:, begin + tokens :]}
    if line.spans is not None:
        stored = line.spans.record.tensors
    else:
        span = cache.policy.span * cache.layout.chunk * cache.layout.tokens
        fields = line.codec.fields(Shape(exact.shape[2], exact.shape[3], span), kind)
        stored = {field.name: _empty(field, exact, line.memory) for field in fields}
    names = [field.name for field in line.spans.fields] if line.spans is not None else list(stored)
    return {"sink": sink, "packed": {name: stored[name] for name in names}, "recent": exact}


def _empty(field: Field, like: Tensor, memory: Mapping[str, Tensor]) -> Tensor:
    """What a codec stores of no span."""
    if field.per == "model" and field.name in memory:
        return memory[field.name]
    lead = (like.shape[0], 0)[: LEADING_AXES[field.per]]
    return torch.zeros((*lead, *field.shape), dtype=field.dtype, device=like.device)


def graph_of(module: object) -> fx.GraphModule | None:
    """The captured graph that a module is, or was compiled from."""
    module = getattr(module, "_orig_mod", module)
    return module if isinstance(module, fx.GraphModule) else None


def added_arguments(module: object) -> list[str]:
    """Names of the arguments that a module takes beside those that a model has."""
    graph = graph_of(module)
    return [] if graph is None else [name for name in convention(graph)[0] if name in (*TABLES, MAPS, FEW)]


@dataclasses.dataclass(frozen=True)
class Packing:
    """What a graph was packed for: ``codecs`` of its layers as operators take them, and ``spans`` of how many tokens.

    Layers that it takes no encoded keys or values of are left out.
    """

    codecs: tuple[str, ...]
    spans: tuple[int, ...]

    @classmethod
    def of(cls, module: object) -> Packing | None:
        """That of a module, compiled ones as well; None for one that takes dense keys and values."""
        graph = graph_of(module)
        if graph is None or TABLES[0] not in convention(graph)[0]:
            return None
        calls = graph.graph.find_nodes(op="call_function", target=attention_packed.definition)
        named = [arguments(node) for node in calls]
        return cls(tuple(str(call["codec"]) for call in named), tuple(int(call["span"]) for call in named))

    @classmethod
    def for_cache(cls, policy: CachePolicy, layers: int, chunk: int) -> Packing:
        """That of caches with a policy.

        Args:
            policy: of the cache.
            layers: of the model.
            chunk: tokens of a chunk.
        """
        pairs = [(policy.codec("keys", i), policy.codec("values", i)) for i in range(layers)]
        texts = tuple(codecs_text(*pair) for pair in pairs if pair != (None, None))
        return cls(texts, (policy.span * chunk,) * len(texts))
